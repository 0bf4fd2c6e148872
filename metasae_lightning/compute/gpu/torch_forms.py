"""The passes of a step over a sparse matrix, by torch's own functions: for tensors that Triton's kernels do not take.

`S` is a sparse matrix in CSR form, ordered by row: `values` and `columns` of its nonzeros, and `pointers` to where each row begins.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

SUM = 0
"""Torch's number for the mode of an embedding bag that sums."""


def product(
    values: Float[Tensor, " nnz"],
    columns: Int[Tensor, " nnz"],
    pointers: Int[Tensor, " pointer"],
    dense: Float[Tensor, "column d"],
    *,
    long_rows: bool = False,
) -> Float[Tensor, "row d"]:
    """`S dense`. `long_rows`: some rows may have many more nonzeros than most; this form ignores it."""
    return torch.ops.aten._embedding_bag(dense, columns, pointers[:-1], False, SUM, False, values)[0]


def product_and_sums(
    values: Float[Tensor, " nnz"], columns: Int[Tensor, " nnz"], pointers: Int[Tensor, " pointer"], dense: Float[Tensor, "column d"]
) -> tuple[Float[Tensor, "row d"], Float[Tensor, " row"]]:
    """`S dense`, and the sum of each row of S: with `S^T`, the gradients of an encoder and of its bias."""
    return product(values, columns, pointers, dense), torch.segment_reduce(values, "sum", offsets=pointers, unsafe=True)


def sampled(
    rows: Int[Tensor, " nnz"], columns: Int[Tensor, " nnz"], a: Float[Tensor, "row d"], b: Float[Tensor, "column d"]
) -> Float[Tensor, " nnz"]:
    """The entries of `a b^T` at the nonzeros of S."""
    # The gradient of an embedding bag with respect to its weights. A nonzero's bag is its row; the argument for offsets is not read.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(a, b, columns, columns, rows, SUM)


def reconstruction_error(
    values: Float[Tensor, " nnz"],
    rows: Int[Tensor, " nnz"],
    columns: Int[Tensor, " nnz"],
    pointers: Int[Tensor, " pointer"],
    W_dec: Float[Tensor, "column d"],
    b_dec: Float[Tensor, " d"],
    x: Float[Tensor, "row d"],
) -> tuple[Float[Tensor, "row d"], Float[Tensor, " nnz"], Float[Tensor, ""]]:
    """The difference `S W_dec + b_dec - x`, its products with the decoder rows at the nonzeros, and the sum of its squares."""
    difference = product(values, columns, pointers, W_dec).add_(b_dec).sub_(x)
    return difference, sampled(rows, columns, difference, W_dec), torch.dot(difference.flatten(), difference.flatten())


def remove_radial(gradient: Float[Tensor, "row d"], W: Float[Tensor, "row d"]) -> None:
    """Remove from each row of the gradient its part along the row of W, in place."""
    unit = W / W.norm(dim=1, keepdim=True).clamp_(min=1e-12)
    gradient.addcmul_(unit, (gradient * unit).sum(1, keepdim=True), value=-1)


def decomposability(
    W: Float[Tensor, "row d"], reconstruction: Float[Tensor, "row d"], sigma_sq: float
) -> tuple[Float[Tensor, " row"], Float[Tensor, "row d"]]:
    """`p_i = exp(-||u_i - reconstruction_i||^2 / sigma_sq)` of the unit rows `u_i = W_i / ||W_i||`, and the gradient of each in `W_i`."""
    norm = W.norm(dim=1, keepdim=True).clamp_(min=1e-12)
    unit = W / norm
    difference = unit - reconstruction
    p = difference.square().sum(1, keepdim=True).mul_(-1 / sigma_sq).exp_()
    slope = difference.addcmul_(unit, (difference * unit).sum(1, keepdim=True), value=-1)
    return p[:, 0], slope.mul_((p / norm).mul_(-2 / sigma_sq))
