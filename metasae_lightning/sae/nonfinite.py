"""Steps that are left out because something in them is not finite."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from metasae_lightning.compute.process_group import Ranks
from metasae_lightning.compute.sharding import own


class Guard:
    """Decides of each step of one SAE, for all ranks, whether it may be taken, and counts those that may not.

    By then gradients are there and weights are as they were: all there is to undo is what the forward pass has moved.
    """

    def __init__(self) -> None:
        self.total = self.in_a_row = 0
        self.broken: str | None = None
        """What was not finite in the last step, where that was left out."""
        self._before: dict[str, Tensor] = {}

    def remember(self, moving: Mapping[str, Tensor]) -> None:
        """What a forward pass is about to move."""
        self._before = {name: value.clone() for name, value in moving.items()}

    @torch.no_grad()
    def refuses(self, made: Mapping[str, Tensor], moving: Mapping[str, Tensor], ranks: Ranks) -> bool:
        """Whether what any rank has made for a step is not finite; then what was moving is as it was."""
        broken = first_broken(made)
        refused = bool(ranks.most(broken is not None, next(iter(made.values()))))
        self.broken = broken or "a tensor on another rank" if refused else None
        self.total, self.in_a_row = self.total + refused, self.in_a_row + 1 if refused else 0
        for name, value in moving.items() if refused else ():
            value.copy_(self._before[name])
        return refused

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"total": self.total, "in_a_row": self.in_a_row}


def guarded(*learners: Any) -> dict[str, Guard]:
    """A guard for each of those that there are, by its role."""
    found: dict[str, Guard] = {}
    for learner in learners:
        if learner is not None:
            found[learner.role] = learner.guard = Guard()
    return found


def restore(guards: Mapping[str, Guard], states: Mapping[str, Mapping[str, int]]) -> None:
    """Go on counting; a checkpoint of a run without guards has left out none."""
    for role, guard in guards.items():
        state = states.get(role, {"total": 0, "in_a_row": 0})
        guard.total, guard.in_a_row = state["total"], state["in_a_row"]


def worst(guards: Iterable[Guard]) -> dict[str, Any]:
    """The most steps in a row that were left out up to now, and why the last of them; nothing where there are none."""
    most = max(guards, key=lambda guard: guard.in_a_row, default=None)
    return {"skipped": most.in_a_row, "broken": most.broken} if most is not None and most.in_a_row else {}


def figures(guards: Iterable[Guard]) -> dict[str, float]:
    """What is logged of them, where there are any."""
    totals = [guard.total for guard in guards]
    return {"train/skipped": float(sum(totals))} if totals else {}


def first_broken(named: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a NaN or an infinity in it, of what is divided in this rank's part.

    >>> first_broken({"a": torch.tensor([3e38, 3e38]), "b": torch.tensor([1.0, torch.nan])})
    'b'
    """
    floats = {name: own(value.detach()) for name, value in named.items() if value.is_floating_point()}
    # A sum is finite only if all it adds up is: one pass and one wait for the device. Where it overflows, a closer look tells.
    sums = [value.sum(dtype=torch.float32) for value in floats.values()]
    if torch.stack([total.to(sums[-1].device) for total in sums]).isfinite().all():
        return None
    return next((name for name, value in floats.items() if not value.isfinite().all()), None)
