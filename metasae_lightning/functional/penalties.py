"""Formulas of penalties on decoder rows: decomposability and orthogonality."""

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning.functional.geometry import nearest_indices, unit_rows

Rows = Float[Tensor, "d_sae d_in"]


def decomposability(W_dec: Rows, reconstruction: Rows, sigma_sq: float) -> Float[Tensor, " d_sae"]:
    """How well a frozen critic reconstructs each decoder direction: `p_i = exp(-||W_i/||W_i|| - What_i||^2 / sigma_sq)`.

    `reconstruction` is the critic's reconstruction of `unit_rows(W_dec)` and gets no gradient. 1 is fully decomposable. If the critic does
    no worse than predicting zero, `p` is at least `exp(-1 / sigma_sq)`.

    >>> row = torch.tensor([[0.0, 2.0]])
    >>> decomposability(row, torch.tensor([[0.0, 1.0]]), sigma_sq=1.0)
    tensor([1.])
    >>> decomposability(row, torch.zeros(1, 2), sigma_sq=1.0)
    tensor([0.3679])
    """
    error = (unit_rows(W_dec) - reconstruction.detach()).square().sum(-1)
    return torch.exp(-error / sigma_sq)


def decomposability_with_slope(W_dec: Rows, reconstruction: Rows, sigma_sq: float) -> tuple[Float[Tensor, " d_sae"], Rows]:
    """`decomposability`, and the gradient of each `p_i` in `W_i`, from three dot products per row instead of one pass per operation.

    With `u = W_i / ||W_i||` and `r = What_i` the error is `u.u + r.r - 2 u.r`. Its gradient in `W_i` is its gradient in u, without the part
    along u, divided by the norm: `2 ((1 - u.u + u.r) u - r) / ||W_i||`.

    >>> decomposability_with_slope(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]]), sigma_sq=2.0)
    (tensor([0.3679]), tensor([[0.1839, 0.0000]]))
    """
    r = reconstruction.detach()
    norm = W_dec.norm(dim=-1)
    safe_norm = norm.clamp(min=1e-12)
    uu, ur = (norm / safe_norm).square(), torch.linalg.vecdot(W_dec, r) / safe_norm
    p = torch.exp(-(uu + torch.linalg.vecdot(r, r) - 2 * ur) / sigma_sq)
    scale = -2 * p / (sigma_sq * safe_norm)
    row_scale = scale * (1 - uu + ur) / safe_norm
    return p, (W_dec * row_scale[:, None]).addcmul_(r, -scale[:, None])


def block_decomposability(W_dec: Rows, reconstruction: Rows, sigma_sq: float, *, group_size: int) -> Float[Tensor, " group"]:
    """How well a frozen critic reconstructs each block of `group_size` rows: `p_g = exp(-mean_i ||W_i/||W_i|| - What_i||^2 / sigma_sq)`.

    The mean is over the rows of the block, so that `p_g` is the geometric mean of their `decomposability`.

    >>> block_decomposability(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 0.0]]), sigma_sq=0.5, group_size=2)
    tensor([0.3679])
    """
    error = (unit_rows(W_dec) - reconstruction.detach()).square().sum(-1)
    return torch.exp(-error.unflatten(0, (-1, group_size)).mean(-1) / sigma_sq)


def block_decomposability_with_slope(
    blocks: Float[Tensor, "group latent d_in"], reconstruction: Float[Tensor, "group latent d_in"], sigma_sq: float
) -> tuple[Float[Tensor, " group"], Float[Tensor, "group latent d_in"]]:
    """`block_decomposability`, and the gradient of each `p_g` in its block.

    >>> p, slope = block_decomposability_with_slope(torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[1.0, 0.0]]]), sigma_sq=2.0)
    >>> p, slope + 0.0
    (tensor([0.3679]), tensor([[[0.1839, 0.0000]]]))
    """
    r = reconstruction.detach()
    norm = blocks.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    u = blocks / norm
    p = torch.exp(-(u - r).square().sum(-1).mean(-1) / sigma_sq)
    # The gradient of half a row's error in u, without its part along u.
    radial_free = (u * r).sum(-1, keepdim=True) * u - r
    return p, radial_free * (p[:, None, None] * (-2 / (sigma_sq * blocks.shape[1]))) / norm


def orthogonality(W_dec: Rows, chunks: list[Tensor], scored: list[slice] | None = None) -> Float[Tensor, " d_sae"]:
    """Squared cosine of each row to its nearest other row in its chunk, `(max_{j != i in chunk} cos(W_i, W_j))^2` (arXiv 2509.22033).

    `chunks` partitions the row indices. `scored` gives the slice of each chunk to score; other rows, and a row alone in its chunk, get 0.

    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
    >>> orthogonality(rows, [torch.arange(3)])
    tensor([0.3600, 0.6400, 0.6400])
    """
    rows = unit_rows(W_dec)
    scores = W_dec.new_zeros(W_dec.shape[0])
    for chunk, part in zip(chunks, scored or [slice(None)] * len(chunks), strict=True):
        if len(chunk) > 1:
            chunk_rows = rows[chunk]
            # A row may be the neighbour of many rows; the backward pass of indexing would sum their gradients in any order of threads.
            neighbours = chunk_rows.index_select(0, nearest_indices(chunk_rows.detach(), part))
            cosines = torch.linalg.vecdot(chunk_rows[part], neighbours)
            scores = scores.index_put((chunk[part],), cosines.square().to(scores.dtype))
    return scores
