"""Sparsity patterns, and products of sparse matrices with dense ones."""

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metasae_lightning.compute.row_chunks import is_blocked, scaled_size

# Numbers that are turned over at a time.
TRANSPOSED_ELEMENTS = 320 * 2**10

with warnings.catch_warnings():  # torch says once in a process that its CSR layout is young
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.long), torch.tensor([]), (1, 1))


@dataclass(frozen=True)
class Pattern:
    """Rows and columns of the nonzeros of a matrix, ordered by row."""

    rows: Int[Tensor, " nnz"]
    columns: Int[Tensor, " nnz"]
    shape: tuple[int, int]

    def product(
        self, values: Float[Tensor, " nnz"], dense: Float[Tensor, "column d"], into: Float[Tensor, "row d"] | None = None
    ) -> Float[Tensor, "row d"]:
        """`S dense`, written to `into` or to a new tensor."""
        into = dense.new_empty(self.shape[0], dense.shape[1]) if into is None else into
        return torch.addmm(into, _csr(self._pointers, self._columns32, values, self.shape), dense, beta=0, out=into)

    def transposed_product(
        self, values: Float[Tensor, " nnz"], dense: Float[Tensor, "row d"], into: Float[Tensor, "column d"] | None = None
    ) -> Float[Tensor, "column d"]:
        """`S^T dense`, written to `into` or to a new tensor."""
        order, pointers, rows = self._by_column
        into = dense.new_empty(self.shape[1], dense.shape[1]) if into is None else into
        return torch.addmm(into, _csr(pointers, rows, values[order], self.shape[::-1]), dense, beta=0, out=into)

    def left_product(
        self, dense: Float[Tensor, "row d"], values: Float[Tensor, " nnz"], into: Float[Tensor, "d column"] | None = None
    ) -> Float[Tensor, "d column"]:
        """`dense^T S`: some columns at a time, turned over while they are near."""
        if not is_blocked(dense):
            return self.transposed_product(values, dense).T.contiguous()
        order, pointers, rows = self._by_column
        into = dense.new_empty(dense.shape[1], self.shape[1]) if into is None else into
        columns = max(1, scaled_size(TRANSPOSED_ELEMENTS) // dense.shape[1])
        values, space = values[order], dense.new_empty(columns, dense.shape[1])
        for left in range(0, self.shape[1], columns):
            at = pointers[left : left + columns + 1]
            nonzeros, width = slice(int(at[0]), int(at[-1])), len(at) - 1
            few = _csr(at - at[0], rows[nonzeros], values[nonzeros], (width, len(dense)))
            into[:, left : left + width] = torch.addmm(space[:width], few, dense, beta=0, out=space[:width]).T
        return into

    def sampled(self, a: Float[Tensor, "row d"], b: Float[Tensor, "column d"]) -> Float[Tensor, " nnz"]:
        """The entries of `a b^T` at the nonzeros: the larger of the two is read once and in order, the smaller stays near."""
        if self.shape[0] > self.shape[1]:
            return _sampled(_csr(self._pointers, self._columns32, a.new_zeros(len(self.rows)), self.shape), a, b)
        order, pointers, rows = self._by_column
        ordered = _sampled(_csr(pointers, rows, a.new_zeros(len(rows)), self.shape[::-1]), b, a)
        return torch.empty_like(ordered).index_copy_(0, order, ordered)

    @cached_property
    def _pointers(self) -> Tensor:
        return _pointers(self.rows, self.shape[0])

    @cached_property
    def _columns32(self) -> Tensor:
        return self.columns.int()

    @cached_property
    def _by_column(self) -> tuple[Tensor, Tensor, Tensor]:
        columns, order = self.columns.sort(stable=True)
        return order, _pointers(columns, self.shape[1]), self.rows[order].int()


# Sparse products take indices of 32 bits; of others they would make these at every call.
def _pointers(ordered: Tensor, size: int) -> Tensor:
    return torch.searchsorted(ordered, torch.arange(size + 1, device=ordered.device), out_int32=True)


def _csr(pointers: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.sparse_csr_tensor(pointers, columns, values, shape, check_invariants=False)


def _sampled(zeros: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.sparse.sampled_addmm(zeros, a, b.T, beta=0.0).values()
