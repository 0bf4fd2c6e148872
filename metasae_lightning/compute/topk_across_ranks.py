"""Top-k over the values of all ranks by radix selection: ranks exchange counts, not values."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metasae_lightning.compute.process_group import ProcessGroup

# A positive float's bits are ordered as it is. So many of them are looked at in a round, from the first that matter on.
DIGIT = 12
KEYS = {torch.float32: torch.int32, torch.float64: torch.int64}


class TopKMask(NamedTuple):
    """This rank's part of a top-k over all ranks."""

    keep: Bool[Tensor, " value"]
    """Whether each of this rank's values is selected."""
    threshold: float | None
    """The smallest that any rank keeps; none where there is no number at all."""
    is_complete: bool
    """Whether there were as many as were asked for."""


def topk_across_ranks(values: Float[Tensor, " value"], count: int, group: ProcessGroup) -> TopKMask:
    """The `count` largest of the positive numbers of all ranks; of equals those of earlier ranks, and of a rank's own the first.

    Each round tells how many numbers begin with each string of bits, and goes on with the one that the cut goes through.

    >>> topk_across_ranks(torch.tensor([1.0, 3.0, 0.0, 2.0, 2.0]), 2, ProcessGroup())
    TopKMask(keep=tensor([False,  True, False,  True, False]), threshold=2.0, is_complete=True)
    """
    values = values if values.dtype in KEYS else values.float()
    positive = values > 0
    keys = values.view(KEYS[values.dtype])
    bits, left, prefix = torch.finfo(values.dtype).bits - 1, count, None
    inside = keys[positive]
    for last in reversed(range(0, bits, DIGIT)):
        width = min(DIGIT, bits - last)
        digits = (inside >> last).bitwise_and(2**width - 1)
        numbers = torch.bincount(digits, minlength=2**width)
        group.all_reduce_sum_(numbers)
        least = numbers.flip(0).cumsum(0).flip(0)  # how many begin so, or higher
        if prefix is None and int(least[0]) <= count:
            threshold = group.max_scalar(-values[positive].min().item() if len(inside) else -torch.inf, values)
            return TopKMask(positive, None if threshold == -torch.inf else -threshold, int(least[0]) == count)
        digit = int((least >= left).sum()) - 1
        left -= int(least[digit] - numbers[digit])
        prefix = (prefix or 0) << width | digit
        inside = inside[digits == digit]
    threshold = keys.new_tensor(prefix)
    keep = positive & (keys > threshold)
    # All that are left are equal.
    own = min(max(left - sum(group.gather_int(len(inside), values)[: group.rank]), 0), len(inside))
    keep[(keys == threshold).nonzero().flatten()[:own]] = True
    return TopKMask(keep, threshold.view(values.dtype).item(), True)
