"""The passes of a step over a sparse matrix, by torch's own functions: for a GPU without Triton, and as the kernels' formulas.

`S` is a sparse matrix in CSR form, ordered by row: `values` and `columns` of its nonzeros, and `pointers`, where each row begins.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

SUM = 0
"""Torch's number for the mode of an embedding bag that sums."""


def product(
    values: Float[Tensor, " nnz"], columns: Int[Tensor, " nnz"], pointers: Int[Tensor, " pointer"], dense: Float[Tensor, "column d"]
) -> Float[Tensor, "row d"]:
    """`S dense`."""
    return torch.ops.aten._embedding_bag(dense, columns, pointers[:-1], False, SUM, False, values)[0]


def product_and_sums(
    values: Float[Tensor, " nnz"], columns: Int[Tensor, " nnz"], pointers: Int[Tensor, " pointer"], dense: Float[Tensor, "column d"]
) -> tuple[Float[Tensor, "row d"], Float[Tensor, " row"]]:
    """`S dense`, and the sum of each row of S: with `S^T`, the gradients of an encoder and of its bias."""
    ones = dense.new_ones(len(dense), 1)
    return product(values, columns, pointers, dense), product(values, columns, pointers, ones)[:, 0]


def sampled(
    rows: Int[Tensor, " nnz"], columns: Int[Tensor, " nnz"], a: Float[Tensor, "row d"], b: Float[Tensor, "column d"]
) -> Float[Tensor, " nnz"]:
    """The entries of `a b^T` at the nonzeros of S."""
    # The backward pass of an embedding bag in its weights: the bag of each nonzero is its row, and the offsets are not read.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(a, b, columns, columns, rows, SUM)


def reconstruction_error(
    values: Float[Tensor, " nnz"],
    rows: Int[Tensor, " nnz"],
    columns: Int[Tensor, " nnz"],
    pointers: Int[Tensor, " pointer"],
    W_dec: Float[Tensor, "column d"],
    b_dec: Float[Tensor, " d"],
    x: Float[Tensor, "row d"],
) -> tuple[Float[Tensor, "row d"], Float[Tensor, " nnz"], Float[Tensor, " row"]]:
    """The difference `S W_dec + b_dec - x`, its products with the decoder rows at the nonzeros, and its squared norm for each row."""
    difference = product(values, columns, pointers, W_dec).add_(b_dec).sub_(x)
    return difference, sampled(rows, columns, difference, W_dec), torch.linalg.vecdot(difference, difference)
