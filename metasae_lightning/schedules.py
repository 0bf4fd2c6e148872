"""Schedules: when primary and meta SAE take steps, warm-up of penalties, and learning rates."""

import math
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from metasae_lightning.errors import InputError


def meta_steps_after(step: int, *, n_p: int, n_m: int, last: bool = False, applied: bool = True) -> int:
    """Number of meta steps to take after primary step number `step` (from 1): `n_m` at the end of each macro-step, otherwise 0.

    The `last` step of a run ends its macro-step early, with a full meta phase. After a skipped primary step (`applied` is false), `step` is
    the number of the last applied step. If a meta phase followed that step, it is not repeated.

    >>> [meta_steps_after(step, n_p=3, n_m=2, last=step == 5) for step in (1, 2, 3, 4, 5)]
    [0, 0, 2, 0, 2]
    >>> [meta_steps_after(step, n_p=3, n_m=2, last=last, applied=False) for step, last in ((3, False), (3, True), (4, False), (4, True))]
    [0, 0, 0, 2]
    """
    if not applied:
        return n_m if last and step % n_p else 0
    return n_m if last or step % n_p == 0 else 0


def meta_steps_in(steps: float, *, n_p: int, n_m: int) -> float:
    """Number of meta steps in a run of `steps` primary steps; infinite for an infinite run.

    >>> meta_steps_in(5, n_p=3, n_m=2)
    4
    """
    return steps if steps == float("inf") else -(-int(steps) // n_p) * n_m


def warm_up(step: int, steps: int) -> float:
    """Factor of a coefficient at step `step` (from 0). It rises linearly from 0 to 1 over `steps`, as SAELens's coefficients do.

    >>> [warm_up(step, 4) for step in (0, 1, 4, 9)], warm_up(0, 0)
    ([0.0, 0.25, 1.0, 1.0], 1.0)
    """
    return 1.0 if step >= steps else step / steps


def to_steps(length: float, total: int) -> int:
    """Convert a length to steps: a number above 1 is a number of steps, a number up to 1 is a fraction of `total`.

    >>> to_steps(0.25, 80), to_steps(1.0, 80), to_steps(10, 80)
    (20, 80, 10)
    """
    return round(length * total) if length <= 1 else round(length)


def learning_rate_factor(step: int, total: int, *, warmup: float, decay: float, shape: str, floor: float) -> float:
    """Factor of the learning rate at optimiser step `step` (from 0): linear warm-up, constant part, then decay to `floor`.

    `warmup` and `decay` are lengths as in `to_steps`, with the run's `total` steps. `shape` is that of the decay: `linear`, `cosine`, or
    `constant` for no decay.

    >>> [learning_rate_factor(s, 10, warmup=2, decay=4, shape="linear", floor=0.0) for s in (0, 1, 5, 6, 8, 9)]
    [0.5, 1.0, 1.0, 1.0, 0.5, 0.25]
    """
    warmup_steps, decay_steps = to_steps(warmup, total), to_steps(decay, total)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decay_step = step - (total - decay_steps)
    if shape == "constant" or decay_step <= 0:
        return 1.0
    progress = min(decay_step / decay_steps, 1.0)
    factor = 1 - progress if shape == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return floor + (1 - floor) * factor


class WarmupDecay(LRScheduler):
    """Learning rate with linear warm-up, a constant part, and linear or cosine decay, over the length of the run.

    Example in YAML:
        primary_scheduler: {class_path: WarmupDecay, init_args: {warmup: 0.05, decay: 0.2, shape: linear}}

    Args:
        optimizer: The SAE's optimiser.
        warmup: Length of the warm-up: a fraction of the run up to 1, a number of steps above 1.
        decay: Length of the decay at the end of the run, in the same units.
        shape: Shape of the decay; `constant` does not decay.
        floor: Learning rate at the end of the decay, as a fraction of the full learning rate.
        total_steps: Length of the run in optimiser steps; by default `bind` sets it, and until then the learning rate is constant.
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
        # True where the user gave `total_steps`. The name of this attribute is a key in checkpoints.
        self._given = total_steps is not None
        super().__init__(optimizer)

    def bind(self, total_steps: int) -> None:
        """Set the length of the run in optimiser steps, unless the user gave `total_steps`.

        Warm-up and decay that are together longer than the run are an `InputError`.
        """
        if self.total_steps is None:
            warmup_steps, decay_steps = (to_steps(float(self.shape[name]), total_steps) for name in ("warmup", "decay"))
            if warmup_steps + decay_steps > total_steps + 1 and self.shape["shape"] != "constant":  # each may be rounded up
                raise InputError(
                    f"WarmupDecay: warmup and decay take {warmup_steps} and {decay_steps} steps, and the run has {total_steps}"
                )
            self.total_steps = total_steps
            for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = base * self._factor(self.last_epoch)

    def state_dict(self) -> dict[str, Any]:
        """State for checkpoints. A length set by `bind` is left out: a resumed run may be longer."""
        return {key: value for key, value in super().state_dict().items() if key != "total_steps" or self._given}

    def get_lr(self) -> list[float | Tensor]:
        """Learning rate of each parameter group at this step."""
        return [base * self._factor(self.last_epoch) for base in self.base_lrs]

    def _factor(self, step: int) -> float:
        if self.total_steps is None:
            return 1.0
        return learning_rate_factor(step, self.total_steps, **self.shape)  # pyright: ignore[reportArgumentType]


def bind_schedule(schedule: Any, steps: float, name: str) -> LRScheduler:
    """Check a user's learning rate schedule, give a `WarmupDecay` the length of the run in optimiser steps, and return the schedule.

    `ReduceLROnPlateau`, and a `WarmupDecay` without `total_steps` in an infinite run, are an `InputError`, which names the SAE by `name`.
    """
    if isinstance(schedule, ReduceLROnPlateau):
        raise InputError(f"{name}_scheduler: ReduceLROnPlateau waits for a metric, and schedules here are functions of the step alone")
    if isinstance(schedule, WarmupDecay):
        if steps == float("inf") and schedule.total_steps is None:
            raise InputError(f"{name}_scheduler needs the length of the run: give WarmupDecay total_steps, or data with a length")
        if steps != float("inf"):
            schedule.bind(int(steps))
    return schedule
