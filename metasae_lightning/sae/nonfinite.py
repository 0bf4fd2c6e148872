"""Skipping optimiser steps whose loss or gradients are not finite."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metasae_lightning.compute.process_group import ProcessGroup
from metasae_lightning.compute.sharding import local


class NonFiniteGuard:
    """Decides, for all ranks alike, whether an SAE's optimiser step is skipped because of a NaN or infinity, and counts skipped steps.

    It decides after the backward pass and before the optimiser's step, so it restores only the buffers that the forward pass changed.
    """

    def __init__(self) -> None:
        self.total = 0
        """Number of skipped steps."""
        self.in_a_row = 0
        """Number of steps skipped since the last applied one."""
        self.bad_tensor: str | None = None
        """The first tensor that was not finite in the last step, if that was skipped."""
        self._state: dict[str, Tensor] = {}

    def remember(self, state: Mapping[str, Tensor]) -> None:
        """Copy the buffers that the coming forward pass may change."""
        self._state = {name: value.clone() for name, value in state.items()}

    @torch.no_grad()
    def skips(self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], ranks: ProcessGroup) -> bool:
        """Whether the step must be skipped, on all ranks, because one of the `tensors` is not finite on any rank.

        A skipped step is counted. The buffers in `state` then get back, in place, the values that `remember` copied.
        """
        bad_tensor = first_nonfinite(tensors)
        skipped = bool(ranks.max_scalar(bad_tensor is not None, next(iter(tensors.values()))))
        self.bad_tensor = bad_tensor or "a tensor on another rank" if skipped else None
        self.total, self.in_a_row = self.total + skipped, self.in_a_row + 1 if skipped else 0
        for name, value in state.items() if skipped else ():
            value.copy_(self._state[name])
        return skipped

    def state_dict(self) -> dict[str, int]:
        """`total` and `in_a_row`, for a checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row}


def attach_guards(*learners: Any) -> dict[str, NonFiniteGuard]:
    """Give each learner a guard; returns the guards by the learner's role. A learner may be None."""
    guards: dict[str, NonFiniteGuard] = {}
    for learner in learners:
        if learner is not None:
            guards[learner.role] = learner.guard = NonFiniteGuard()
    return guards


def restore_guards(guards: Mapping[str, NonFiniteGuard], states: Mapping[str, Mapping[str, int]]) -> None:
    """Load the guards' counts from a checkpoint's, by role; a guard whose role the checkpoint lacks starts at 0."""
    for role, guard in guards.items():
        state = states.get(role, {"total": 0, "in_a_row": 0})
        guard.total, guard.in_a_row = state["total"], state["in_a_row"]


def longest_skip(guards: Iterable[NonFiniteGuard]) -> dict[str, Any]:
    """StepOutput's `skipped` and `bad_tensor`, of the guard with the most skips in a row; empty if no SAE skipped its last step."""
    guard = max(guards, key=lambda guard: guard.in_a_row, default=None)
    return {"skipped": guard.in_a_row, "bad_tensor": guard.bad_tensor} if guard is not None and guard.in_a_row else {}


def skipped_steps(guards: Iterable[NonFiniteGuard]) -> dict[str, float]:
    """The logged number of skipped steps of all SAEs; empty without guards."""
    totals = [guard.total for guard in guards]
    return {"train/skipped": float(sum(totals))} if totals else {}


def step_tensors(role: str, learner: nn.Module, loss: Tensor, extra_loss: Tensor | None) -> dict[str, Tensor]:
    """A step's loss, the sum of its penalties, and its gradients, by name.

    The loss comes first, because a bad loss is the cause of bad gradients. Gradients come in the order of the parameters.
    """
    gradients = {name: parameter.grad for name, parameter in learner.named_parameters() if parameter.grad is not None}
    losses = {f"the {role} SAE's loss": loss, **({} if extra_loss is None else {"the penalties' sum": extra_loss})}
    return losses | {f"the gradient of {role}.{name}": gradient for name, gradient in gradients.items()}


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a NaN or infinity, or None; of a sharded tensor, this rank's shard is checked.

    >>> first_nonfinite({"a": torch.tensor([3e38, 3e38]), "b": torch.tensor([1.0, torch.nan])})
    'b'
    """
    local_tensors = {name: local(value.detach()) for name, value in tensors.items() if value.is_floating_point()}
    # A finite sum proves that all terms are finite, with one wait for the device. A sum may also overflow: then each tensor is checked.
    sums = [value.sum(dtype=torch.float32) for value in local_tensors.values()]
    if torch.stack([total.to(sums[-1].device) for total in sums]).isfinite().all():
        return None
    return next((name for name, value in local_tensors.items() if not value.isfinite().all()), None)
