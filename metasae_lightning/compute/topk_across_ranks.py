"""Top-k over the values of all ranks by radix selection: ranks exchange counts, not values."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metasae_lightning.compute.process_group import ProcessGroup

# Bits of a digit; each round of the selection fixes one digit of the threshold, from the highest on. The bit patterns of positive floats,
# read as integers (the keys), are ordered as the floats are.
DIGIT = 12
KEY_TYPES = {torch.float32: torch.int32, torch.float64: torch.int64}


class TopKMask(NamedTuple):
    """Result of a top-k over all ranks: which of this rank's values are selected, the threshold, and whether enough were found."""

    keep: Bool[Tensor, " value"]
    """Whether each of this rank's values is selected."""
    threshold: float | None
    """The smallest value that any rank selects; None if no rank has a positive value."""
    is_complete: bool
    """Whether as many values are selected as were asked for."""


def topk_across_ranks(values: Float[Tensor, " value"], count: int, group: ProcessGroup) -> TopKMask:
    """The `count` largest of the positive values of all ranks. Ties go to the earlier rank, and on one rank to the earlier value.

    In each round the ranks sum a histogram over the next digit of the keys. The threshold lies in one bin of the histogram, and the next
    round looks only at the values of that bin.

    >>> topk_across_ranks(torch.tensor([1.0, 3.0, 0.0, 2.0, 2.0]), 2, ProcessGroup())
    TopKMask(keep=tensor([False,  True, False,  True, False]), threshold=2.0, is_complete=True)
    """
    values = values if values.dtype in KEY_TYPES else values.float()
    positive = values > 0
    keys = values.view(KEY_TYPES[values.dtype])
    n_bits, remaining, prefix = torch.finfo(values.dtype).bits - 1, count, None
    undecided = keys[positive]
    for shift in reversed(range(0, n_bits, DIGIT)):
        width = min(DIGIT, n_bits - shift)
        digits = (undecided >> shift).bitwise_and(2**width - 1)
        histogram = torch.bincount(digits, minlength=2**width)
        group.all_reduce_sum_(histogram)
        at_least = histogram.flip(0).cumsum(0).flip(0)  # keys with this digit or a higher one
        if prefix is None and int(at_least[0]) <= count:
            threshold = group.max_scalar(-values[positive].min().item() if len(undecided) else -torch.inf, values)
            return TopKMask(positive, None if threshold == -torch.inf else -threshold, int(at_least[0]) == count)
        digit = int((at_least >= remaining).sum()) - 1
        remaining -= int(at_least[digit] - histogram[digit])
        prefix = (prefix or 0) << width | digit
        undecided = undecided[digits == digit]
    threshold = keys.new_tensor(prefix)
    keep = positive & (keys > threshold)
    # All undecided keys are equal to the threshold; the first `remaining` of them, over the ranks in order, are selected.
    count_here = min(max(remaining - sum(group.gather_int(len(undecided), values)[: group.rank]), 0), len(undecided))
    keep[(keys == threshold).nonzero().flatten()[:count_here]] = True
    return TopKMask(keep, threshold.view(values.dtype).item(), True)
