"""Nearest neighbours among rows in chunks on a GPU: all chunks at once, in at most `PIECES` pieces, with sums in a fixed order."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from metasae_lightning.compute.process_group import ProcessGroup
from metasae_lightning.compute.sparse_matrix import Pattern

# Number of pieces into which a rank's rows of each chunk are divided. The same piece of all chunks is computed at once.
PIECES = 8


def sum_of_squared_cosines(
    units: Float[Tensor, "row d"], permuted: Int[Tensor, " row"], chunk_size: int, ranks: ProcessGroup
) -> Float[Tensor, ""]:
    """The sum over rows of the squared cosine to the nearest other row of the row's chunk; `units` have length 1.

    A chunk is `chunk_size` consecutive entries of `permuted`; the last chunk may be smaller. Each rank sums over some rows of each
    chunk.

    >>> units = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    >>> round(sum_of_squared_cosines(units, torch.arange(3), 3, ProcessGroup()).item(), 4)
    1.64
    """
    rows, nearest = _nearest_in_chunks(units.detach(), permuted, chunk_size, ranks)
    return _SumOfSquaredCosines.apply(units, rows, nearest)  # type: ignore[return-value]


@torch.no_grad()
def _nearest_in_chunks(units: Tensor, permuted: Tensor, chunk_size: int, ranks: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Indices of this rank's rows, and of the nearest other row in the same chunk. A row that is alone in its chunk is left out."""
    count = len(permuted)
    n_chunks = -(-count // chunk_size)
    padded = torch.cat([permuted, permuted[:1].expand(n_chunks * chunk_size - count)]).view(n_chunks, chunk_size)
    chunks, last_size = units[padded], count - (n_chunks - 1) * chunk_size
    share = ranks.even_slice(chunk_size)
    piece, nearest = -(-max(share.stop - share.start, 1) // PIECES), list[Tensor]()
    for begin in range(share.start, share.stop, piece):
        cosines = chunks[:, begin : min(begin + piece, share.stop)] @ chunks.transpose(1, 2)
        cosines.diagonal(begin, 1, 2).fill_(-torch.inf)
        if last_size < chunk_size:
            cosines[-1, :, last_size:] = -torch.inf
        nearest.append(cosines.argmax(2))
    if not nearest:
        return permuted[:0], permuted[:0]
    places = torch.cat(nearest, 1)
    rows, neighbours = padded[:, share].flatten(), padded.gather(1, places).flatten()
    # The padding is at the end. A last chunk of one row has no neighbours.
    n_rows = len(rows) - max(share.stop - max(last_size if last_size > 1 else 0, share.start), 0)
    return rows[:n_rows], neighbours[:n_rows]


class _SumOfSquaredCosines(torch.autograd.Function):
    """The sum of squared products of pairs of rows. A row may be the neighbour of many; their gradients are added in a fixed order."""

    @staticmethod
    def forward(ctx: Any, units: Tensor, rows: Tensor, nearest: Tensor) -> Tensor:
        a, b = units.index_select(0, rows), units.index_select(0, nearest)
        cosines = (a * b).sum(1)
        ctx.save_for_backward(a, b, cosines, rows, nearest)
        ctx.n_rows = len(units)
        return torch.dot(cosines, cosines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b, cosines, rows, nearest = ctx.saved_tensors
        weights = cosines * (2 * gradients[0])
        pairs = Pattern(torch.arange(len(rows), device=rows.device), nearest, (len(rows), ctx.n_rows))
        # Each row is listed once in `rows`.
        return pairs.transposed_product(weights, a).index_add_(0, rows, b * weights[:, None]), None, None
