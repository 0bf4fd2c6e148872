"""Callbacks that look at one SAE, and how several arms are shown to them, each as if it were alone."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from metasae_lightning.errors import InputError
from metasae_lightning.step import Batch

# What Lightning calls a callback by.
HOOKS = sorted(name for name in vars(Callback) if name.startswith("on_") or name in ("setup", "teardown"))


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
        self.copies = {name: [copy.deepcopy(observer) for observer in observers] for name in names}

    def state_dict(self) -> dict[str, Any]:
        """What the copies keep."""
        return {name: {own.state_key: own.state_dict() for own in copies} for name, copies in self.copies.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See above."""
        for name, copies in self.copies.items():
            for own in copies:
                own.load_state_dict(state_dict.get(name, {}).get(own.state_key, {}))


class StandIn:
    """Something with a few attributes of its own, and for the rest what it stands in for; it passes for one of that kind."""

    def __init__(self, whole: Any) -> None:
        self._whole = whole

    def __getattr__(self, key: str) -> Any:
        return getattr(self._whole, key)

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What annotations and isinstance see."""
        return type(self._whole)


class Seen(StandIn):
    """An arm as a callback sees a module: its figures are logged under its name."""

    def __init__(self, arms: Any, name: str) -> None:
        super().__init__(arms.arms[name])
        self._arms, self._name = arms, name

    def log_dict(self, figures: dict[str, Any], **how: Any) -> None:
        """Log under the arm's name."""
        self._arms.log_dict({f"{self._name}/{key}": value for key, value in figures.items()}, **how)

    def log(self, name: str, value: Any, **how: Any) -> None:
        """Log under the arm's name."""
        self._arms.log(f"{self._name}/{name}", value, **how)


class Trained(StandIn):
    """The trainer of an arm: a directory, loggers, callbacks and figures of its own, and for the rest the trainer of all."""

    def __init__(self, trainer: Trainer, name: str) -> None:
        super().__init__(trainer)
        self._name = name

    @property
    def default_root_dir(self) -> str:
        """The arm's folder in the run's."""
        return str(Path(self._whole.default_root_dir) / "arms" / self._name)

    @property
    def loggers(self) -> list[Any]:
        """Those that have a part for each arm."""
        return [logger.of(self._name) for logger in self._whole.loggers if hasattr(logger, "of")]

    @property
    def callbacks(self) -> list[Callback]:
        """The arm's copies."""
        every: list[Any] = self._whole.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        return [own for each in every if isinstance(each, EachArm) for own in each.copies[self._name]]

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """The arm's figures."""
        start = f"{self._name}/"
        return {key.removeprefix(start): value for key, value in self._whole.callback_metrics.items() if key.startswith(start)}


def sides(trainer: Any, pl_module: Any) -> dict[str, tuple[Any, Any]]:
    """Trainer and module of each running arm by its name; of a module without arms, itself under no name."""
    running = getattr(pl_module, "running", None)
    if running is None:
        return {"": (trainer, pl_module)}
    return {name: (Trained(trainer, name), Seen(pl_module, name)) for name in running}


def per_arm(callbacks: Sequence[Callback], names: Sequence[str]) -> list[Callback]:
    """The callbacks with all observers among them in one place, a copy for each arm."""
    observers = [callback for callback in callbacks if isinstance(callback, Observer)]
    if not observers:
        return list(callbacks)
    at = min(place for place, callback in enumerate(callbacks) if isinstance(callback, Observer))
    others = [[c for c in some if not isinstance(c, Observer)] for some in (callbacks[:at], callbacks[at:])]
    return [*others[0], EachArm(observers, names), *others[1]]


def _own(given: Any, name: str, module: Any) -> Any:
    """What of a hook's arguments is of an arm: its outputs, its hook's columns, its weights in a checkpoint."""
    if isinstance(given, dict) and isinstance(given.get("output"), dict):
        return {"output": given["output"][name]}
    if isinstance(given, dict) and "state_dict" in given:
        return {**given, "state_dict": module.state_dict()}
    return given.at(module.hook) if isinstance(given, Batch) else given


def _forwarded(hook: str) -> Callable[..., None]:
    def called(self: EachArm, trainer: Any, pl_module: Any, *given: Any, **named: Any) -> None:
        for name, (own_trainer, module) in sides(trainer, pl_module).items():
            try:
                for observer in self.copies[name]:
                    own = [_own(one, name, module) for one in given]
                    getattr(observer, hook)(own_trainer, module, *own, **{key: _own(one, name, module) for key, one in named.items()})
            except NotFinite as error:
                pl_module.stop(name, str(error))

    called.__name__, called.__doc__ = hook, "To each arm's observers."
    return called


for _hook in HOOKS:
    setattr(EachArm, _hook, _forwarded(_hook))
