"""Sparsity patterns, and products of sparse matrices with dense ones."""

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metasae_lightning.compute.gpu.passes import passes_for
from metasae_lightning.compute.row_chunks import is_blocked, scaled_size

# Elements of `left_product` that are transposed at a time, while they are in the processor's cache.
TRANSPOSED_ELEMENTS = 320 * 2**10

with warnings.catch_warnings():  # torch warns once per process that its CSR layout is in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.long), torch.tensor([]), (1, 1))


@dataclass(frozen=True)
class Pattern:
    """Rows and columns of the nonzeros of a sparse matrix `S`, ordered by row. A method's `values` are the values of these nonzeros.

    On a CPU products are those of torch's CSR matrices. On a GPU they are passes of `compute.gpu`, which ignore a method's `into`.
    """

    rows: Int[Tensor, " nnz"]
    columns: Int[Tensor, " nnz"]
    shape: tuple[int, int]

    def product(
        self, values: Float[Tensor, " nnz"], dense: Float[Tensor, "column d"], into: Float[Tensor, "row d"] | None = None
    ) -> Float[Tensor, "row d"]:
        """`S dense`, written to `into` or to a new tensor."""
        if not is_blocked(dense):
            return passes_for(dense).product(values, self.columns, self._pointers, dense)
        into = dense.new_empty(self.shape[0], dense.shape[1]) if into is None else into
        return torch.addmm(into, _csr(self._pointers, self._columns32, values, self.shape), dense, beta=0, out=into)

    def transposed_product(
        self, values: Float[Tensor, " nnz"], dense: Float[Tensor, "row d"], into: Float[Tensor, "column d"] | None = None
    ) -> Float[Tensor, "column d"]:
        """`S^T dense`, written to `into` or to a new tensor."""
        order, pointers, rows = self._by_column
        if not is_blocked(dense):
            return passes_for(dense).product(values[order], rows, pointers, dense, long_rows=True)
        into = dense.new_empty(self.shape[1], dense.shape[1]) if into is None else into
        return torch.addmm(into, _csr(pointers, rows, values[order], self.shape[::-1]), dense, beta=0, out=into)

    def left_product(
        self, dense: Float[Tensor, "row d"], values: Float[Tensor, " nnz"], into: Float[Tensor, "d column"] | None = None
    ) -> Float[Tensor, "d column"]:
        """`dense^T S`, written to `into` or to a new tensor; on a GPU its columns are contiguous.

        On a CPU a chunk of columns is computed as rows of `S^T dense` and transposed while it is in the processor's cache.
        """
        if not is_blocked(dense):
            return self.transposed_product(values, dense).T
        order, pointers, rows = self._by_column
        into = dense.new_empty(dense.shape[1], self.shape[1]) if into is None else into
        columns = max(1, scaled_size(TRANSPOSED_ELEMENTS) // dense.shape[1])
        values, buffer = values[order], dense.new_empty(columns, dense.shape[1])
        for left in range(0, self.shape[1], columns):
            chunk_pointers = pointers[left : left + columns + 1]
            nonzeros, width = slice(int(chunk_pointers[0]), int(chunk_pointers[-1])), len(chunk_pointers) - 1
            chunk = _csr(chunk_pointers - chunk_pointers[0], rows[nonzeros], values[nonzeros], (width, len(dense)))
            into[:, left : left + width] = torch.addmm(buffer[:width], chunk, dense, beta=0, out=buffer[:width]).T
        return into

    def sampled(self, a: Float[Tensor, "row d"], b: Float[Tensor, "column d"]) -> Float[Tensor, " nnz"]:
        """The entries of `a b^T` at the nonzeros. On a CPU the larger factor is read once and in order; the smaller one stays in cache."""
        if not is_blocked(a):
            return passes_for(a).sampled(self.rows, self.columns, a, b)
        if self.shape[0] > self.shape[1]:
            return _sampled(_csr(self._pointers, self._columns32, a.new_zeros(len(self.rows)), self.shape), a, b)
        order, pointers, rows = self._by_column
        entries_by_column = _sampled(_csr(pointers, rows, a.new_zeros(len(rows)), self.shape[::-1]), b, a)
        return torch.empty_like(entries_by_column).index_copy_(0, order, entries_by_column)

    def column_gradients(
        self, values: Float[Tensor, " nnz"], dense: Float[Tensor, "row d"]
    ) -> tuple[Float[Tensor, "column d"], Float[Tensor, " column"]]:
        """On a GPU: `S^T dense` and the sum of each column of S, in one pass."""
        order, pointers, rows = self._by_column
        return passes_for(dense).product_and_sums(values[order], rows, pointers, dense)

    def reconstruction_error(
        self, values: Float[Tensor, " nnz"], W_dec: Float[Tensor, "column d"], b_dec: Float[Tensor, " d"], x: Float[Tensor, "row d"]
    ) -> tuple[Float[Tensor, "row d"], Float[Tensor, " nnz"], Float[Tensor, ""]]:
        """On a GPU: the difference `S W_dec + b_dec - x`, the entries of `difference W_dec^T` at the nonzeros, and the squared error."""
        return passes_for(x).reconstruction_error(values, self.rows, self.columns, self._pointers, W_dec, b_dec, x)

    @cached_property
    def _pointers(self) -> Tensor:
        return _pointers(self.rows, self.shape[0], small=is_blocked(self.rows))

    @cached_property
    def _columns32(self) -> Tensor:
        return self.columns.int()

    @cached_property
    def _by_column(self) -> tuple[Tensor, Tensor, Tensor]:
        """The order of the nonzeros by column, the pointers to each column in that order, and the rows in that order."""
        columns, order = self.columns.sort(stable=True)
        small, rows = is_blocked(columns), self.rows[order]
        return order, _pointers(columns, self.shape[1], small=small), rows.int() if small else rows


# Torch's CSR products use 32-bit indices; they would convert 64-bit indices at every call.
def _pointers(sorted_indices: Tensor, size: int, *, small: bool) -> Tensor:
    """CSR pointers: where each of the `size` rows begins among the sorted row indices of the nonzeros, and the end of the last row.

    `small`: as 32-bit integers.
    """
    return torch.ops.aten._convert_indices_from_coo_to_csr(sorted_indices, size, out_int32=small)


def _csr(pointers: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.sparse_csr_tensor(pointers, columns, values, shape, check_invariants=False)


def _sampled(zeros: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The entries of `a b^T` at the nonzeros of a CSR matrix whose values are 0."""
    return torch.sparse.sampled_addmm(zeros, a, b.T, beta=0.0).values()
