"""Formulas of the directions of decoder rows: unit rows, nearest rows, spectrum."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

Rows = Float[Tensor, "d_sae d_in"]


def unit_rows(W_dec: Rows) -> Rows:
    """Decoder rows as directions, `W_i / ||W_i||`, with gradient.

    >>> unit_rows(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """
    return normalize(W_dec, dim=-1)


def nearest_cosines(W_dec: Rows, *, rows: int = 1024) -> Float[Tensor, " d_sae"]:
    """The largest cosine of each row with another row, computed for `rows` rows at a time.

    >>> nearest_cosines(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]))
    tensor([0.6000, 0.8000, 0.8000])
    """
    directions = unit_rows(W_dec)
    return torch.linalg.vecdot(directions, directions[nearest_indices(directions, chunk_rows=rows)])


def nearest_indices(rows: Rows, part: slice = slice(None), *, chunk_rows: int = 1024) -> Int[Tensor, " part"]:
    """For each row in the slice `part`, the index of the other row with the largest dot product; `chunk_rows` rows at a time."""
    indices = torch.arange(len(rows), device=rows.device)
    chunks = indices[part].split(chunk_rows)
    return torch.cat([(rows[i] @ rows.T).masked_fill_(i[:, None] == indices, -torch.inf).argmax(1) for i in chunks])


def spectrum(W_dec: Rows, *, rows: int = 4096) -> Float[Tensor, " d_in"]:
    """Singular values of the decoder's directions, largest first, scaled so that their squares sum to 1; float64.

    They are the square roots of the eigenvalues of the directions' d_in x d_in Gram matrix, to which `rows` rows at a time are added.

    >>> values = spectrum(torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.0, -1.0], [0.0, 2.0]]))
    >>> [round(value, 6) for value in values.square().tolist()]
    [0.75, 0.25]
    """
    gram = torch.zeros(W_dec.shape[1], W_dec.shape[1], dtype=torch.float64, device=W_dec.device)
    for chunk in W_dec.split(rows):
        directions = unit_rows(chunk.double())
        gram += directions.T @ directions
    squares = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    return (squares / squares.sum()).sqrt()


def stable_ranks(W_dec: Rows, *, group_size: int) -> Float[Tensor, " group"]:
    """The stable rank `sum s^2 / max s^2` of each group of rows, from its singular values s; float64.

    It lies between 1, for rows of one direction, and the number of rows, for orthogonal rows of one length. A group of zeros has rank 0.

    >>> stable_ranks(torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]]), group_size=2).tolist()
    [1.25, 1.0]
    """
    blocks = W_dec.double().unflatten(0, (-1, group_size))
    squares = torch.linalg.eigvalsh(blocks @ blocks.mT).clamp(min=0)
    return squares.sum(-1) / squares[..., -1].clamp(min=1e-300)
