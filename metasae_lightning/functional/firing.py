"""Formulas of firings: shares above a point, thresholds with equal errors, precision and recall."""

import torch
from jaxtyping import Float
from torch import Tensor

Counts = Float[Tensor, "*shape"]


def share_above(values: Float[Tensor, " value"], points: Float[Tensor, " point"]) -> Float[Tensor, " point"]:
    """The fraction of the values above each point.

    >>> share_above(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 3.0])).tolist()
    [1.0, 0.25, 0.0]
    """
    not_above = torch.searchsorted(values.sort().values, points, right=True)
    return 1 - not_above.to(points.dtype) / len(values)


def equal_error_bin(hits: Float[Tensor, "latent bin"], others: Float[Tensor, "latent bin"]) -> Float[Tensor, " latent"]:
    """For each latent, the index of the bin edge where the fraction of `hits` below is nearest to that of `others` at or above it.

    >>> equal_error_bin(torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[9.0, 1.0, 0.0]]))
    tensor([1.])
    """
    miss_rate = hits.cumsum(1) / hits.sum(1, keepdim=True).clamp(min=1)
    false_rate = 1 - others.cumsum(1) / others.sum(1, keepdim=True).clamp(min=1)
    # Edge b has bins 0 to b - 1 below it; edge 0 misses no hit.
    miss_rate = torch.cat([torch.zeros_like(miss_rate[:, :1]), miss_rate[:, :-1]], 1)
    false_rate = torch.cat([torch.ones_like(false_rate[:, :1]), false_rate[:, :-1]], 1)
    return (miss_rate - false_rate).abs().argmin(1).to(hits.dtype)


def detection(both: Counts, fired: Counts, true: Counts) -> tuple[Counts, Counts, Counts]:
    """Precision `both / fired`, recall `both / true` and F1 `2 both / (fired + true)` of a detector, from counts; 0 for 0 / 0.

    >>> fired, true = torch.tensor([4.0, 0.0]), torch.tensor([2.0, 3.0])
    >>> [score.tolist() for score in detection(torch.tensor([1.0, 0.0]), fired, true)]
    [[0.25, 0.0], [0.5, 0.0], [0.3333333432674408, 0.0]]
    """
    return both / fired.clamp(min=1), both / true.clamp(min=1), 2 * both / (fired + true).clamp(min=1)
