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
    threshold: Float[Tensor, ""]
    """The smallest value that any rank selects; infinity if no rank has a positive value."""
    is_complete: Bool[Tensor, ""]
    """Whether as many values are selected as were asked for."""


def topk_across_ranks(values: Float[Tensor, " value"], count: int, group: ProcessGroup) -> TopKMask:
    """The `count` largest of the positive values of all ranks. Ties go to the earlier rank, and on one rank to the earlier value.

    In each round the ranks sum a histogram over the next digit of the keys. The threshold lies in one bin of the histogram, and the next
    round counts only the values of that bin. No shape depends on the data, and the host does not wait for a GPU.

    >>> mask = topk_across_ranks(torch.tensor([1.0, 3.0, 0.0, 2.0, 2.0]), 2, ProcessGroup())
    >>> mask.keep.tolist(), mask.threshold.item(), mask.is_complete.item()
    ([False, True, False, True, False], 2.0, True)
    """
    values = values if values.dtype in KEY_TYPES else values.float()
    positive = values > 0
    keys = values.view(KEY_TYPES[values.dtype])
    undecided, prefix = positive, keys.new_zeros(1)
    n_positive = remaining = torch.full_like(prefix, count, dtype=torch.int64)
    n_bits = torch.finfo(values.dtype).bits - 1
    for shift in reversed(range(0, n_bits, DIGIT)):
        width = min(DIGIT, n_bits - shift)
        digits = (keys >> shift).bitwise_and(2**width - 1).long()
        # Integers: their sum does not depend on the order of the additions.
        histogram = remaining.new_zeros(2**width).scatter_add_(0, digits, undecided.long())
        group.all_reduce_sum_(histogram)
        at_least = histogram.flip(0).cumsum(0).flip(0)  # keys with this digit or a higher one
        n_positive = at_least[:1] if shift + width == n_bits else n_positive
        digit = (at_least >= remaining).sum(0, keepdim=True).sub_(1).clamp_(min=0)
        remaining = remaining - at_least[digit] + histogram[digit]
        prefix = prefix << width | digit.to(prefix.dtype)
        undecided = undecided & (digits == digit)
    # All undecided keys are equal to the threshold; the first `remaining` of them, over the ranks in order, are selected.
    n_tied = remaining.new_zeros(group.world_size)
    n_tied[group.rank] = undecided.sum()
    group.all_reduce_sum_(n_tied)
    tied_before = n_tied[: group.rank].sum()
    keep = positive & (keys > prefix) | undecided & (undecided.cumsum(0) <= remaining - tied_before)
    smallest = torch.where(positive, values, torch.inf)
    smallest = torch.cat([smallest, smallest.new_full((1,), torch.inf)]).amin().neg_()
    group.all_reduce_max_(smallest)
    takes_all = n_positive[0] <= count
    threshold = torch.where(takes_all, smallest.neg(), prefix.view(values.dtype)[0])
    return TopKMask(torch.where(takes_all, positive, keep), threshold, n_positive[0] >= count)
