"""Formulas over the rows of a large matrix, each computed in the way that is fast on its device."""

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning.compute.gpu.passes import passes_for, triton_kernels
from metasae_lightning.compute.row_chunks import is_blocked, row_chunks


def write_unit_rows(W: Float[Tensor, "row d"], into: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """The rows of W divided by their norms, written to `into`, which may be W; without gradient.

    >>> write_unit_rows(torch.tensor([[3.0, 4.0]]), torch.empty(1, 2))
    tensor([[0.6000, 0.8000]])
    """
    source, target = W.detach(), into.detach()
    if (kernels := triton_kernels(target)) is not None:
        kernels.unit_rows(source, target)
        return into
    for rows, unit in row_chunks(source, target):
        torch.div(rows, rows.norm(dim=-1, keepdim=True).clamp(min=1e-12), out=unit)
    return into


def remove_radial(gradient: Float[Tensor, "row d"], W: Float[Tensor, "row d"]) -> None:
    """Remove from each row of the gradient its part along the row of W, in place: `g_i - (g_i . W_i) W_i / ||W_i||^2`.

    >>> gradient = torch.tensor([[1.0, 1.0]])
    >>> remove_radial(gradient, torch.tensor([[2.0, 0.0]]))
    >>> gradient
    tensor([[0., 1.]])
    """
    if not is_blocked(gradient):
        passes_for(gradient).remove_radial(gradient, W.detach())
        return
    for gradient_rows, rows in row_chunks(gradient, W.detach()):
        unit = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        gradient_rows.sub_((gradient_rows * unit).sum(-1, keepdim=True) * unit)


def centred_rows(x: Float[Tensor, "row d"]) -> tuple[Float[Tensor, "row d"], Float[Tensor, "row 1"], Float[Tensor, "row 1"]]:
    """Each row minus its mean, the means, and the standard deviations.

    >>> centred_rows(torch.tensor([[1.0, 3.0]]))[0].tolist()
    [[-1.0, 1.0]]
    """
    if not is_blocked(x):
        std, mean = torch.std_mean(x, -1, keepdim=True)
        return x - mean, mean, std
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    # On a CPU torch's `std` takes ten times as long.
    return centred, mean, torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / (x.shape[-1] - 1) ** 0.5
