"""Triton's kernels as passes of the GPU path: the functions of `torch_forms`, and those that have no form in torch."""

from jaxtyping import Float, Int
from torch import Tensor

from metasae_lightning.compute.gpu import row_kernels, select_kernels, sparse_kernels

__all__ = ["compact", "decomposability", "product", "product_and_sums", "reconstruction_error", "remove_radial", "sampled", "unit_rows"]

compact = select_kernels.compact
decomposability = row_kernels.decomposability
product_and_sums = sparse_kernels.product_and_sums
sampled = sparse_kernels.sampled
unit_rows = row_kernels.unit_rows


def product(
    values: Float[Tensor, " nnz"],
    columns: Int[Tensor, " nnz"],
    pointers: Int[Tensor, " pointer"],
    dense: Float[Tensor, "column d"],
    *,
    long_rows: bool = False,
) -> Float[Tensor, "row d"]:
    """`S dense`. `long_rows`: some rows may have many more nonzeros than most, so several programs share one."""
    if long_rows:
        return sparse_kernels.product_and_sums(values, columns, pointers, dense)[0]
    return sparse_kernels.product(values, columns, pointers, dense)


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
    difference, products, errors = sparse_kernels.reconstruction_error(values, columns, pointers, W_dec, b_dec, x)
    return difference, products, errors.sum()


def remove_radial(gradient: Float[Tensor, "row d"], W: Float[Tensor, "row d"]) -> None:
    """Remove from each row of the gradient its part along the row of W, in place."""
    row_kernels.without_radial_(gradient, W)
