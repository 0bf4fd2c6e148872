"""Callbacks for one SAE (`Observer`), and how `SideBySide` runs them: a copy for each arm, which sees that arm only."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from metasae_lightning import run_folder
from metasae_lightning.errors import InputError
from metasae_lightning.step import Batch, StepOutput

# Names of the hooks that Lightning calls on a callback.
_hooks = {name for name in vars(Callback) if name.startswith("on_") or name in ("setup", "teardown")}
HOOKS = _hooks - {"on_save_checkpoint", "on_load_checkpoint"}
# Hooks that Lightning calls inside a step: they go to the arm that is taking its step.
STEP_HOOKS = {"on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad"}
# Methods that Lightning sets on a callback for the time of a hook.
LOG_METHODS = ("log", "log_dict")


class Observer(Callback):
    """A callback for one SAE: its hooks get a JointSAE, and a StepOutput or Evaluation under the key `output`.

    With `SideBySide` each arm has its own copy, which sees the arm's module, outputs, loggers and directory.
    """


class NotFinite(InputError):
    """An SAE has become NaN or infinite. This ends the run; with several arms it ends the arm only."""


class EachArm(Callback):
    """Copies of observers for each arm. Each hook is passed on to the copies, arm by arm.

    The class name is a key in checkpoints.

    Args:
        observers: The callbacks to copy.
        names: Names of the arms.
    """

    def __init__(self, observers: Sequence[Callback], names: Sequence[str]) -> None:
        for observer in observers:  # methods of an earlier run refer to its module, which would be copied too
            for key in LOG_METHODS:
                vars(observer).pop(key, None)
        self.copies = {name: copy.deepcopy(list(observers)) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """State of every copy, by arm and by the copy's key."""
        return {name: {observer.state_key: observer.state_dict() for observer in copies} for name, copies in self.copies.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of every copy."""
        for name, copies in self.copies.items():
            for observer in copies:
                if state := state_dict.get(name, {}).get(observer.state_key):
                    observer.load_state_dict(state)

    def call(self, hook: str, pl_module: Any, name: str, view: tuple[Any, Any], *args: Any, **kwargs: Any) -> None:
        """Call a hook of one arm's observers with the arm's view of trainer and module. `NotFinite` stops the arm."""
        trainer, module = view
        try:
            for observer in self.copies[name]:
                for key in LOG_METHODS:
                    setattr(observer, key, getattr(module, key))
                getattr(observer, hook)(trainer, module, *args, **kwargs)
        except NotFinite as error:
            pl_module.stop(name, str(error))

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Show each arm's observers a checkpoint with the arm's weights, and save the entries that they add."""
        added = checkpoint.setdefault("observers", {})
        for name, view in per_arm_views(trainer, pl_module).items():
            arm_checkpoint = {**checkpoint, "state_dict": view[1].state_dict()}
            self.call("on_save_checkpoint", pl_module, name, view, arm_checkpoint)
            added[name] = {key: value for key, value in arm_checkpoint.items() if key not in checkpoint}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Show each arm's observers the checkpoint with the arm's weights and the entries that these observers saved in it."""
        for name, view in per_arm_views(trainer, pl_module).items():
            arm_checkpoint = {
                **checkpoint,
                "state_dict": pl_module.arm_state_dict(
                    checkpoint.get("state_dict", {}), name
                ),  # no weights there under `Sharded`, which loads them itself
                **checkpoint.get("observers", {}).get(name, {}),
            }
            self.call("on_load_checkpoint", pl_module, name, view, arm_checkpoint)


class Proxy:
    """Forwards attribute access to the wrapped object, except for the overrides given. isinstance sees the wrapped object's class."""

    def __init__(self, wrapped: Any, **overrides: Any) -> None:
        vars(self).update(overrides, _wrapped=wrapped)

    def __getattr__(self, key: str) -> Any:
        return getattr(self._wrapped, key)

    def __setattr__(self, key: str, value: Any) -> None:
        setattr(self._wrapped, key, value)

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The class of the wrapped object, for annotations and isinstance."""
        return type(self._wrapped)


class ArmModule(Proxy):
    """An arm's module as its observers see it: logged names begin with the arm's name."""

    def __init__(self, arms: Any, name: str, trainer: Any) -> None:
        super().__init__(arms.arms[name], _arms=arms, _name=name, trainer=trainer)

    def log_dict(self, values: Mapping[str, Any], **kwargs: Any) -> None:
        """Log several values under the arm's name."""
        self._arms.log_dict({f"{self._name}/{key}": value for key, value in values.items()}, **kwargs)

    def log(self, name: str, value: Any, **kwargs: Any) -> None:
        """Log one value under the arm's name."""
        self._arms.log(f"{self._name}/{name}", value, **kwargs)

    def optimizers(self, **_: Any) -> Any:
        """The arm's optimisers: a list or, like Lightning's method, a single one."""
        optimizers = self._arms.optimizers_by_arm()[self._name]
        return optimizers if len(optimizers) > 1 else optimizers[0]


class ArmLogger(Proxy):
    """An arm's view of a logger that all arms share: tags begin with the arm's name."""

    @property
    def experiment(self) -> Any:
        """The logger's writer, with tags under the arm's name."""
        return ArmWriter(self._wrapped.experiment, _name=self._name)

    @property
    def tag_prefix(self) -> str:
        """What a tag begins with where it does not go through the writer."""
        return f"{self._name}/"


class ArmWriter(Proxy):
    """An arm's view of a logger's writer: the tags of all `add_...` methods begin with the arm's name."""

    def __getattr__(self, key: str) -> Any:
        method = getattr(self._wrapped, key)
        return partial(self._tagged, method) if key.startswith("add_") else method

    def _tagged(self, method: Any, tag: str, *args: Any, **kwargs: Any) -> Any:
        return method(f"{self._name}/{tag}", *args, **kwargs)


class ArmTrainer(Proxy):
    """The trainer as an arm's observers see it: with the arm's directory, loggers, callbacks, optimisers, metrics and stop flag."""

    def __init__(self, trainer: Trainer, arms: Any, name: str) -> None:
        super().__init__(trainer, _arms=arms, _name=name)

    @property
    def default_root_dir(self) -> str:
        """The arm's folder inside the run's folder."""
        return str(run_folder.arm_folder(Path(self._wrapped.default_root_dir), self._name))

    @property
    def loggers(self) -> list[Any]:
        """The arm's view of each logger."""
        return [logger.of(self._name) if hasattr(logger, "of") else ArmLogger(logger, _name=self._name) for logger in self._wrapped.loggers]

    @property
    def logger(self) -> Any:
        """The arm's view of the first logger."""
        return next(iter(self.loggers), None)

    @property
    def lightning_module(self) -> Any:
        """The arm's module."""
        return ArmModule(self._arms, self._name, self)

    @property
    def optimizers(self) -> list[Any]:
        """The arm's optimisers, without Lightning's wrapper."""
        return [optimizer.optimizer for optimizer in self._arms.optimizers_by_arm()[self._name]]

    @property
    def should_stop(self) -> bool:
        """Whether the arm, or the whole run, is to stop. Setting it to true stops the arm alone."""
        return self._wrapped.should_stop or self._name in self._arms.stopped

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "should_stop" and value:
            self._arms.stop(self._name, "an observer asked for it")
        else:
            super().__setattr__(key, value)

    @property
    def callbacks(self) -> list[Callback]:
        """The arm's copies of the observers."""
        callbacks: list[Any] = self._wrapped.callbacks
        return [observer for callback in callbacks if isinstance(callback, EachArm) for observer in callback.copies[self._name]]

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """The arm's logged values, without the arm's name."""
        prefix = f"{self._name}/"
        return {key.removeprefix(prefix): value for key, value in self._wrapped.callback_metrics.items() if key.startswith(prefix)}


def per_arm_views(trainer: Any, pl_module: Any) -> dict[str, tuple[Any, Any]]:
    """Each running arm's view of trainer and module, by name. Without arms, the trainer and the module themselves, with an empty name."""
    running = getattr(pl_module, "running", None)
    if running is None:
        return {"": (trainer, pl_module)}
    trainers = {name: ArmTrainer(trainer, pl_module, name) for name in running}
    return {name: (arm_trainer, arm_trainer.lightning_module) for name, arm_trainer in trainers.items()}


def copy_observers_per_arm(callbacks: Sequence[Callback], names: Sequence[str]) -> list[Callback]:
    """Replace all observers among the callbacks by one `EachArm`, at the first one's position. An `EachArm` of other arms is an error."""
    for callback in callbacks:
        if isinstance(callback, EachArm) and list(callback.copies) != list(names):
            raise InputError(f"the trainer's callbacks belong to the arms {', '.join(callback.copies)}: take a new trainer")
    observers = [callback for callback in callbacks if isinstance(callback, Observer)]
    if not observers:
        return list(callbacks)
    first = min(position for position, callback in enumerate(callbacks) if isinstance(callback, Observer))
    before, after = ([c for c in part if not isinstance(c, Observer)] for part in (callbacks[:first], callbacks[first:]))
    return [*before, EachArm(observers, names), *after]


def _arm_argument(argument: Any, name: str, module: Any) -> Any:
    """An argument of a hook as one arm sees it: the arm's own output, the columns of its hook in a batch, anything else unchanged."""
    if isinstance(argument, dict) and isinstance(argument.get("output"), dict):
        output = argument["output"][name]
        return {"output": output, **({"loss": output.loss} if isinstance(output, StepOutput) else {})}
    return argument.select_hook(module.hook) if isinstance(argument, Batch) else argument


def _forward_to_arms(hook: str) -> Callable[..., None]:
    """Make the method of `EachArm` that passes this hook on to the arms' observers."""

    def call_arms(self: EachArm, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        for name, view in per_arm_views(trainer, pl_module).items():
            if name in self.copies and (hook not in STEP_HOOKS or name == pl_module.current_arm):
                arm_args = [_arm_argument(value, name, view[1]) for value in args]
                arm_kwargs = {key: _arm_argument(value, name, view[1]) for key, value in kwargs.items()}
                self.call(hook, pl_module, name, view, *arm_args, **arm_kwargs)

    call_arms.__name__, call_arms.__doc__ = hook, "Call this hook of each arm's observers."
    return call_arms


for _hook in HOOKS:
    setattr(EachArm, _hook, _forward_to_arms(_hook))
