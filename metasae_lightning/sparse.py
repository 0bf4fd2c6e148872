"""Exact work on the few latents that fire, where the dense way would touch them all."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

# Of so many values one is looked at to guess where the cut will be.
STRIDE = 31


def largest(values: Float[Tensor, " value"], count: int) -> Int[Tensor, " kept"]:
    """Indices of the `count` largest values, in any order; of positive ones alone where fewer are positive. No value is negative.

    A thirty-first of the values guesses a cut somewhat too low, and only what lies above it is ranked. A guess that was too high
    is noticed, and everything is ranked then: the result is that of `topk` in either case, but for the choice among equals.

    >>> sorted(largest(torch.tensor([0.0, 3.0, 1.0, 0.0, 2.0]), 2).tolist()), largest(torch.zeros(3), 2).tolist()
    ([1, 4], [])
    """
    if values.device.type != "cpu":  # a GPU ranks everything sooner than it could wait for a guess
        return values.topk(count).indices
    few = values[::STRIDE]
    wanted = min(len(few), int(1.3 * count / STRIDE) + 32)
    above = (values > few.topk(wanted).values[-1]).nonzero().flatten()
    if len(above) < count:
        above = values.nonzero().flatten()
    return above if len(above) <= count else above[values[above].topk(count, sorted=False).indices]


class BatchTopK(nn.Module):
    """The `k * batch` largest activations of a batch, whichever rows they are of: SAELens's rule, without ranking everything."""

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre_activations: Tensor) -> Tensor:
        """Those activations where they are, and zeros."""
        acts = pre_activations.relu().flatten()
        kept = largest(acts.detach(), int(self.k * pre_activations.shape[:-1].numel()))
        return torch.zeros_like(acts).scatter(0, kept, acts[kept]).view(pre_activations.shape)
