"""Formulas over the rows of a large matrix, with results in existing memory: in chunks on a CPU, all rows at once on a GPU."""

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
