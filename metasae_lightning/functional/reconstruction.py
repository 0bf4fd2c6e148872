"""Formulas of a reconstruction: variance unexplained, agreement, and the median of activations."""

from jaxtyping import Float
from torch import Tensor

from metasae_lightning.compute.row_chunks import row_chunks

Activations = Float[Tensor, "batch d_in"]


def fvu(x: Activations, reconstruction: Activations, mean: Float[Tensor, " d_in"] | None = None) -> Float[Tensor, ""]:
    """Fraction of variance unexplained, `sum ||x - xhat||^2 / sum ||x - mean||^2`. The default mean is that of the batch.

    >>> import torch
    >>> x = torch.tensor([[0.0], [2.0]])
    >>> fvu(x, x).item(), fvu(x, torch.ones(2, 1)).item()
    (0.0, 1.0)
    """
    centre = x.mean(0) if mean is None else mean
    error, variance = x.new_zeros(()), x.new_zeros(())
    for x_rows, reconstructed_rows in row_chunks(x, reconstruction):
        error += (x_rows - reconstructed_rows).square().sum()
        variance += (x_rows - centre).square().sum()
    return error / variance


ReconstructionSums = tuple[Tensor, Tensor, Tensor, Tensor]
"""Tokens, sum of x, sum of ||x||^2, sum of ||x - xhat||^2, in float64."""


def reconstruction_sums(x: Activations, reconstruction: Activations) -> ReconstructionSums:
    """The sums of one batch, which add up over batches; `fvu_of_sums` computes the FVU from them."""
    x, error = x.double(), (x.double() - reconstruction.double()).square().sum()
    return x.new_full((), len(x)), x.sum(0), x.square().sum(), error


def fvu_of_sums(sums: ReconstructionSums) -> Float[Tensor, ""]:
    """The FVU of all batches in the sums, `error / (sum ||x||^2 - ||sum x||^2 / n)`.

    >>> import torch
    >>> fvu_of_sums(reconstruction_sums(torch.tensor([[0.0], [2.0]]), torch.ones(2, 1))).item()
    1.0
    """
    n, total, squares, error = sums
    return error / (squares - total.square().sum() / n)


def agreement_sums(x: Activations, reconstruction: Activations) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over tokens: cosine, `||xhat|| / ||x||`, `||xhat||^2`, `x . xhat`. The relative bias is the third over the fourth.

    >>> import torch
    >>> x = torch.tensor([[3.0, 4.0]])
    >>> [total.item() for total in agreement_sums(x, x / 2)]
    [1.0, 0.5, 6.25, 12.5]
    """
    x, reconstruction = x.double(), reconstruction.double()
    dot_product, norm, x_norm = (x * reconstruction).sum(-1), reconstruction.norm(dim=-1), x.norm(dim=-1)
    cosine = dot_product / (norm * x_norm).clamp(min=1e-300)
    return cosine.sum(), (norm / x_norm.clamp(min=1e-300)).sum(), norm.square().sum(), dot_product.sum()


def geometric_median(x: Activations, *, iterations: int = 100, tolerance: float = 1e-6) -> Float[Tensor, " d_in"]:
    """The point with the smallest sum of distances to the rows, by Weiszfeld's iteration; outliers move it less than the mean.

    >>> import torch
    >>> geometric_median(torch.tensor([[0.0], [0.0], [9.0]])).abs().item() < 1e-3
    True
    """
    points = x.double()
    median = points.mean(0)
    for _ in range(iterations):
        weights = 1 / (points - median).norm(dim=-1, keepdim=True).clamp(min=1e-9)
        last, median = median, (weights * points).sum(0) / weights.sum()
        if (median - last).norm() <= tolerance * median.norm().clamp(min=1e-12):
            break
    return median.to(x.dtype)
