"""Callbacks that look at one SAE, and how several arms are shown to them, each as if it were alone."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from metasae_lightning.errors import InputError
from metasae_lightning.step import Batch, StepOutput

# What Lightning calls a callback by.
_hooks = {name for name in vars(Callback) if name.startswith("on_") or name in ("setup", "teardown")}
HOOKS = _hooks - {"on_save_checkpoint", "on_load_checkpoint"}
# What happens inside a step is of the arm that steps.
STEP_HOOKS = {"on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad"}
# What Lightning lends a callback.
LOG_METHODS = ("log", "log_dict")


class Observer(Callback):
    """A callback that looks at one SAE: a JointSAE, the StepOutput or the Evaluation under `output`.

    Beside others there is a copy for each arm, which sees that arm, its outputs, its loggers and its directory.
    """


class NotFinite(InputError):
    """An SAE has become NaN: alone, that ends its run; beside others, its arm."""


class EachArm(Callback):
    """A copy of some observers for each arm, called in turn.

    Args:
        observers: What looks at one SAE.
        names: The arms.
    """

    def __init__(self, observers: Sequence[Callback], names: Sequence[str]) -> None:
        for observer in observers:  # what Lightning gave them in an earlier run: a whole module hangs on it
            for key in LOG_METHODS:
                vars(observer).pop(key, None)
        self.copies = {name: copy.deepcopy(list(observers)) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """What the copies keep."""
        return {name: {own.state_key: own.state_dict() for own in copies} for name, copies in self.copies.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See above."""
        for name, copies in self.copies.items():
            for own in copies:
                if state := state_dict.get(name, {}).get(own.state_key):
                    own.load_state_dict(state)

    def call(self, hook: str, pl_module: Any, name: str, side: tuple[Any, Any], *given: Any, **named: Any) -> None:
        """Call one arm's observers; one that finds the arm broken stops it."""
        trainer, module = side
        try:
            for observer in self.copies[name]:
                for key in LOG_METHODS:
                    setattr(observer, key, getattr(module, key))
                getattr(observer, hook)(trainer, module, *given, **named)
        except NotFinite as error:
            pl_module.stop(name, str(error))

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Each is shown its arm's weights; what it adds is kept for it."""
        added = checkpoint.setdefault("observers", {})
        for name, side in per_arm_views(trainer, pl_module).items():
            own = {**checkpoint, "state_dict": side[1].state_dict()}
            self.call("on_save_checkpoint", pl_module, name, side, own)
            added[name] = {key: value for key, value in own.items() if key not in checkpoint}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """See above."""
        for name, side in per_arm_views(trainer, pl_module).items():
            own = {
                **checkpoint,
                "state_dict": pl_module.arm_state_dict(checkpoint.get("state_dict", {}), name),  # a sharded one is read by its strategy
                **checkpoint.get("observers", {}).get(name, {}),
            }
            self.call("on_load_checkpoint", pl_module, name, side, own)


class Proxy:
    """Something with a few attributes of its own, and for the rest what it stands in for; it passes for one of that kind."""

    def __init__(self, whole: Any, **own: Any) -> None:
        vars(self).update(own, _whole=whole)

    def __getattr__(self, key: str) -> Any:
        return getattr(self._whole, key)

    def __setattr__(self, key: str, value: Any) -> None:
        setattr(self._whole, key, value)

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What annotations and isinstance see."""
        return type(self._whole)


class ArmModule(Proxy):
    """An arm as a callback sees a module: its figures are logged under its name."""

    def __init__(self, arms: Any, name: str, trainer: Any) -> None:
        super().__init__(arms.arms[name], _arms=arms, _name=name, trainer=trainer)

    def log_dict(self, figures: Mapping[str, Any], **how: Any) -> None:
        """Log under the arm's name."""
        self._arms.log_dict({f"{self._name}/{key}": value for key, value in figures.items()}, **how)

    def log(self, name: str, value: Any, **how: Any) -> None:
        """Log under the arm's name."""
        self._arms.log(f"{self._name}/{name}", value, **how)

    def optimizers(self, **_: Any) -> Any:
        """The arm's own, as a module gives its own."""
        own = self._arms.optimizers_by_arm()[self._name]
        return own if len(own) > 1 else own[0]


class ArmLogger(Proxy):
    """A logger that has no part for each arm, as an arm's: tags of what is drawn begin with the arm's name."""

    @property
    def experiment(self) -> Any:
        """What it writes with."""
        return ArmWriter(self._whole.experiment, _name=self._name)


class ArmWriter(Proxy):
    """What a logger writes with."""

    def __getattr__(self, key: str) -> Any:
        method = getattr(self._whole, key)
        return partial(self._tagged, method) if key.startswith("add_") else method

    def _tagged(self, method: Any, tag: str, *given: Any, **named: Any) -> Any:
        return method(f"{self._name}/{tag}", *given, **named)


class ArmTrainer(Proxy):
    """The trainer of an arm: a directory, loggers, callbacks, figures and an end of its own, and for the rest the trainer of all."""

    def __init__(self, trainer: Trainer, arms: Any, name: str) -> None:
        super().__init__(trainer, _arms=arms, _name=name)

    @property
    def default_root_dir(self) -> str:
        """The arm's folder in the run's."""
        return str(Path(self._whole.default_root_dir) / "arms" / self._name)

    @property
    def loggers(self) -> list[Any]:
        """The arm's part of each."""
        return [logger.of(self._name) if hasattr(logger, "of") else ArmLogger(logger, _name=self._name) for logger in self._whole.loggers]

    @property
    def logger(self) -> Any:
        """The first of them."""
        return next(iter(self.loggers), None)

    @property
    def lightning_module(self) -> Any:
        """The arm."""
        return ArmModule(self._arms, self._name, self)

    @property
    def optimizers(self) -> list[Any]:
        """The arm's."""
        return [own.optimizer for own in self._arms.optimizers_by_arm()[self._name]]

    @property
    def should_stop(self) -> bool:
        """Whether the arm, or all of them, should."""
        return self._whole.should_stop or self._name in self._arms.stopped

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "should_stop" and value:
            self._arms.stop(self._name, "an observer asked for it")
        else:
            super().__setattr__(key, value)

    @property
    def callbacks(self) -> list[Callback]:
        """The arm's copies."""
        every: list[Any] = self._whole.callbacks
        return [own for each in every if isinstance(each, EachArm) for own in each.copies[self._name]]

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """The arm's figures."""
        start = f"{self._name}/"
        return {key.removeprefix(start): value for key, value in self._whole.callback_metrics.items() if key.startswith(start)}


def per_arm_views(trainer: Any, pl_module: Any) -> dict[str, tuple[Any, Any]]:
    """Trainer and module of each running arm by its name; of a module without arms, itself under no name."""
    running = getattr(pl_module, "running", None)
    if running is None:
        return {"": (trainer, pl_module)}
    own = {name: ArmTrainer(trainer, pl_module, name) for name in running}
    return {name: (trained, trained.lightning_module) for name, trained in own.items()}


def copy_observers_per_arm(callbacks: Sequence[Callback], names: Sequence[str]) -> list[Callback]:
    """The callbacks with all observers among them in one place, a copy for each arm."""
    for each in callbacks:
        if isinstance(each, EachArm) and list(each.copies) != list(names):
            raise InputError(f"the trainer's callbacks are of the arms {', '.join(each.copies)}: take a new trainer")
    observers = [callback for callback in callbacks if isinstance(callback, Observer)]
    if not observers:
        return list(callbacks)
    at = min(place for place, callback in enumerate(callbacks) if isinstance(callback, Observer))
    others = [[c for c in some if not isinstance(c, Observer)] for some in (callbacks[:at], callbacks[at:])]
    return [*others[0], EachArm(observers, names), *others[1]]


def _own(given: Any, name: str, module: Any) -> Any:
    """What of a hook's arguments is of an arm: its outputs, its hook's columns."""
    if isinstance(given, dict) and isinstance(given.get("output"), dict):
        own = given["output"][name]
        return {"output": own, **({"loss": own.loss} if isinstance(own, StepOutput) else {})}
    return given.select_hook(module.hook) if isinstance(given, Batch) else given


def _forwarded(hook: str) -> Callable[..., None]:
    def called(self: EachArm, trainer: Any, pl_module: Any, *given: Any, **named: Any) -> None:
        for name, side in per_arm_views(trainer, pl_module).items():
            if name in self.copies and (hook not in STEP_HOOKS or name == pl_module.current_arm):
                own = [_own(one, name, side[1]) for one in given]
                self.call(hook, pl_module, name, side, *own, **{key: _own(one, name, side[1]) for key, one in named.items()})

    called.__name__, called.__doc__ = hook, "To each arm's observers."
    return called


for _hook in HOOKS:
    setattr(EachArm, _hook, _forwarded(_hook))
