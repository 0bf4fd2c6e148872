"""Schedules: who steps when, warm-up, and the learning rate's shape."""

import math
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from metasae_lightning.errors import InputError


def meta_steps_after(step: int, *, n_p: int, n_m: int, last: bool = False, applied: bool = True) -> int:
    """Meta steps owed after primary step number `step` (from 1); a last macro-step cut short still ends with its meta phase.

    After a batch whose step was not `applied`, `step` is the one before it, and what that was owed it has had unless it is cut short now.

    >>> [meta_steps_after(step, n_p=3, n_m=2, last=step == 5) for step in (1, 2, 3, 4, 5)]
    [0, 0, 2, 0, 2]
    >>> [meta_steps_after(step, n_p=3, n_m=2, last=last, applied=False) for step, last in ((3, False), (3, True), (4, False), (4, True))]
    [0, 0, 0, 2]
    """
    if not applied:
        return n_m if last and step % n_p else 0
    return n_m if last or step % n_p == 0 else 0


def meta_steps_in(steps: float, *, n_p: int, n_m: int) -> float:
    """Meta steps of a whole run of `steps` primary steps, which may have no end.

    >>> meta_steps_in(5, n_p=3, n_m=2)
    4
    """
    return steps if steps == float("inf") else -(-int(steps) // n_p) * n_m


def warm_up(step: int, steps: int) -> float:
    """Factor of a coefficient at a step (from 0): rises linearly from 0 to 1 over `steps`, as SAELens's coefficients do.

    >>> [warm_up(step, 4) for step in (0, 1, 4, 9)], warm_up(0, 0)
    ([0.0, 0.25, 1.0, 1.0], 1.0)
    """
    return 1.0 if step >= steps else step / steps


def to_steps(length: float, total: int) -> int:
    """A length in steps: itself, or that share of `total` where it is at most 1.

    >>> to_steps(0.25, 80), to_steps(1.0, 80), to_steps(10, 80)
    (20, 80, 10)
    """
    return round(length * total) if length <= 1 else round(length)


def learning_rate_factor(step: int, total: int, *, warmup: float, decay: float, shape: str, floor: float) -> float:
    """Factor of the learning rate at optimiser step `step` (from 0): linear warm-up, level, then decay to `floor`.

    >>> [learning_rate_factor(s, 10, warmup=2, decay=4, shape="linear", floor=0.0) for s in (0, 1, 5, 6, 8, 9)]
    [0.5, 1.0, 1.0, 1.0, 0.5, 0.25]
    """
    rising, falling = to_steps(warmup, total), to_steps(decay, total)
    if step < rising:
        return (step + 1) / rising
    into = step - (total - falling)
    if shape == "constant" or into <= 0:
        return 1.0
    done = min(into / falling, 1.0)
    left = 1 - done if shape == "linear" else (1 + math.cos(math.pi * done)) / 2
    return floor + (1 - floor) * left


class WarmupDecay(LRScheduler):
    """Learning rate with linear warm-up, a level part, and a linear or cosine decay; its length is bound when the run's is known.

    Example in YAML:
        primary_scheduler: {class_path: WarmupDecay, init_args: {warmup: 0.05, decay: 0.2, shape: linear}}
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup: float = 0.0,
        decay: float = 0.2,
        shape: Literal["constant", "linear", "cosine"] = "linear",
        floor: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        if min(warmup, decay, floor) < 0:
            raise InputError(f"WarmupDecay: warmup, decay and floor must not be negative, got {warmup}, {decay}, {floor}")
        self.shape: dict[str, float | str] = {"warmup": warmup, "decay": decay, "shape": shape, "floor": floor}
        self.total_steps = total_steps
        self._given = total_steps is not None
        super().__init__(optimizer)

    def bind(self, total_steps: int) -> None:
        """Tell the schedule how many optimiser steps the run has, unless it was given."""
        if self.total_steps is None:
            rising, falling = (to_steps(float(self.shape[name]), total_steps) for name in ("warmup", "decay"))
            if rising + falling > total_steps + 1 and self.shape["shape"] != "constant":  # two halves may each round up
                raise InputError(f"WarmupDecay: warmup and decay take {rising} and {falling} steps, and the run has {total_steps}")
            self.total_steps = total_steps
            for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = base * self._factor(self.last_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Without a length that was only bound: a resumed run may have a larger budget."""
        return {key: value for key, value in super().state_dict().items() if key != "total_steps" or self._given}

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each parameter group at this step."""
        return [base * self._factor(self.last_epoch) for base in self.base_lrs]

    def _factor(self, step: int) -> float:
        if self.total_steps is None:
            return 1.0
        return learning_rate_factor(step, self.total_steps, **self.shape)  # pyright: ignore[reportArgumentType]


def bind_schedule(schedule: Any, steps: float, name: str) -> LRScheduler:
    """A schedule that knows the length of the run, where it wants to."""
    if isinstance(schedule, ReduceLROnPlateau):
        raise InputError(f"{name}_scheduler: ReduceLROnPlateau waits for a figure, and schedules here are functions of the step alone")
    if isinstance(schedule, WarmupDecay):
        if steps == float("inf") and schedule.total_steps is None:
            raise InputError(f"{name}_scheduler needs the length of the run: give WarmupDecay total_steps, or data with a length")
        if steps != float("inf"):
            schedule.bind(int(steps))
    return schedule
