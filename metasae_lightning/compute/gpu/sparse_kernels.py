"""Kernels over a sparse matrix `S` in CSR form: products with a dense matrix, entries of a product at the nonzeros, a batch's error.

`values` and `columns` are those of the nonzeros of S, ordered by row, and `pointers` says where each row begins.
"""

from typing import Any, no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from metasae_lightning.compute.gpu.launch import TILE_ROWS, launch, row_stride, warps, width_constants

SEGMENT = 128
"""Nonzeros of a row that one program of `product_and_sums` adds; several programs add a longer row."""


@triton.jit
@no_type_check
def row_sums(values, columns, begin, end, dense, stride, at, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The sum over `begin <= j < end` of `values[j] * dense[columns[j], at]`, and the sum of `values[j]` in ROWS parts."""
    lane = tl.arange(0, ROWS)
    inside = (at < WIDTH)[None, :]
    total = tl.zeros([BLOCK], tl.float32)
    total_values = tl.zeros([ROWS], tl.float32)
    taken = begin + lane < end
    column = tl.load(columns + begin + lane, mask=taken, other=0).to(tl.int64)
    value = tl.load(values + begin + lane, mask=taken, other=0.0)
    for j in range(begin, end, ROWS):
        tile = tl.load(dense + column[:, None] * stride + at[None, :], mask=taken[:, None] & inside, other=0.0)
        weight = value
        # The next rows' columns and values are loaded while these rows are.
        following = j + ROWS + lane
        taken = following < end
        column = tl.load(columns + following, mask=taken, other=0).to(tl.int64)
        value = tl.load(values + following, mask=taken, other=0.0)
        total += tl.sum(tile * weight[:, None], axis=0)
        total_values += weight
    return total, total_values


@triton.jit
@no_type_check
def owner(ends, segment, n_rows):
    """The first row whose entry of `ends` is above `segment`; `n_rows` where there is none."""
    low = tl.zeros([], tl.int32)
    high = low + n_rows
    while low < high:
        middle = (low + high) // 2
        above = tl.load(ends + middle) > segment
        high = tl.where(above, middle, high)
        low = tl.where(above, low, middle + 1)
    return low


@triton.jit
@no_type_check
def first_of(ends, row):
    """The first further segment of a row: the entry of `ends` before it."""
    return tl.load(ends + row - 1, mask=row > 0, other=0)


@triton.jit(do_not_specialize=["n_rows"])
@no_type_check
def product_kernel(
    values, columns, pointers, ends, dense, into, sums, stride, n_rows,
    SPLIT: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """A piece of one row of `S dense`. With SPLIT, a piece of one segment: first each row's first segment, then the further segments."""
    program = tl.program_id(0)
    row = program
    offset = tl.zeros([], tl.int32)
    if (SPLIT > 0) & (program >= n_rows):
        row = owner(ends, program - n_rows, n_rows)
        offset = (program - n_rows - first_of(ends, row) + 1).to(tl.int32) * SPLIT
    if row < n_rows:
        begin = tl.load(pointers + row) + offset
        end = tl.load(pointers + row + 1)
        if SPLIT > 0:
            end = tl.minimum(end, begin + SPLIT)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total, total_values = row_sums(values, columns, begin, end, dense, stride, at, WIDTH, BLOCK, ROWS)
        tl.store(into + program.to(tl.int64) * WIDTH + at, total, mask=at < WIDTH)
        if SUMS and tl.program_id(1) == 0:
            tl.store(sums + program, tl.sum(total_values, axis=0))


@triton.jit(do_not_specialize=["n_rows"])
@no_type_check
def join_segments_kernel(ends, into, sums, n_rows, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    """A piece of one row: the sum of its segments in their order. The program of the row's first further segment adds them."""
    program = tl.program_id(0)
    row = owner(ends, program, n_rows)
    if (row < n_rows) & (first_of(ends, row) == program):
        lane = tl.arange(0, ROWS)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < WIDTH
        target = into + row.to(tl.int64) * WIDTH + at
        total = tl.load(target, mask=inside, other=0.0)
        total_values = tl.where(lane == 0, tl.load(sums + row), 0.0)
        end = tl.load(ends + row)
        for segment in range(program, end, ROWS):
            further = n_rows + segment + lane
            taken = segment + lane < end
            tile = into + further.to(tl.int64)[:, None] * WIDTH + at[None, :]
            total += tl.sum(tl.load(tile, mask=taken[:, None] & inside[None, :], other=0.0), axis=0)
            total_values += tl.load(sums + further, mask=taken, other=0.0)
        tl.store(target, total, mask=inside)
        if tl.program_id(1) == 0:
            tl.store(sums + row, tl.sum(total_values, axis=0))


def product(
    values: Float[Tensor, " nnz"],
    columns: Int[Tensor, " nnz"],
    pointers: Int[Tensor, " pointer"],
    dense: Float[Tensor, "column d"],
    *,
    long_rows: bool = False,
) -> Float[Tensor, "row d"]:
    """`S dense`, with one program for each row. `long_rows`: some rows may be much longer than most, so several programs share one."""
    if long_rows:
        return product_and_sums(values, columns, pointers, dense)[0]
    n_rows, constants = len(pointers) - 1, width_constants(dense.shape[1])
    into = dense.new_empty(n_rows, dense.shape[1])
    arguments: list[Any] = [values, columns, pointers, pointers, dense, into, into, row_stride(dense), n_rows]
    whole_rows = {"SPLIT": 0, "SUMS": False, "ROWS": TILE_ROWS}
    launch(product_kernel, (n_rows, constants["PIECES"]), arguments, whole_rows | constants, warps(constants["BLOCK"]))
    return into


def product_and_sums(
    values: Float[Tensor, " nnz"], columns: Int[Tensor, " nnz"], pointers: Int[Tensor, " pointer"], dense: Float[Tensor, "column d"]
) -> tuple[Float[Tensor, "row d"], Float[Tensor, " row"]]:
    """`S dense`, and the sum of each row of S, for rows of any length: a long row is summed by segments, then these in their order.

    The row's own program adds its first segment. The further segments of all rows, `nnz / SEGMENT` at most, are numbered from row to
    row; their sums are written behind the rows of the result, in the same storage.
    """
    n_rows, constants = len(pointers) - 1, width_constants(dense.shape[1])
    further, n_warps = len(values) // SEGMENT, warps(constants["BLOCK"])
    into, sums = dense.new_empty(n_rows + further, dense.shape[1]), dense.new_empty(n_rows + further)
    ends = pointers
    if further:
        # Rounding toward zero leaves an empty row, of length -1 here, without a further segment.
        ends = (pointers.diff() - 1).div(SEGMENT, rounding_mode="trunc").cumsum(0, dtype=pointers.dtype)
    arguments: list[Any] = [values, columns, pointers, ends, dense, into, sums, row_stride(dense), n_rows]
    split = {"SPLIT": SEGMENT, "SUMS": True, "ROWS": TILE_ROWS}
    launch(product_kernel, (n_rows + further, constants["PIECES"]), arguments, split | constants, n_warps)
    if further:
        joined = {"ROWS": TILE_ROWS} | constants
        launch(join_segments_kernel, (further, constants["PIECES"]), [ends, into, sums, n_rows], joined, n_warps)
    return into[:n_rows], sums[:n_rows]


@triton.jit
@no_type_check
def sampled_kernel(
    rows, columns, a, b, into, a_stride, b_stride, nnz,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The products of ROWS pairs of rows."""
    j = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    taken = j < nnz
    a_row = tl.load(rows + j, mask=taken, other=0).to(tl.int64)
    b_row = tl.load(columns + j, mask=taken, other=0).to(tl.int64)
    total = tl.zeros([ROWS], tl.float32)
    for piece in tl.static_range(PIECES):
        at = piece * BLOCK + tl.arange(0, BLOCK)
        mask = taken[:, None] & (at < WIDTH)[None, :]
        a_tile = tl.load(a + a_row[:, None] * a_stride + at[None, :], mask=mask, other=0.0)
        b_tile = tl.load(b + b_row[:, None] * b_stride + at[None, :], mask=mask, other=0.0)
        total += tl.sum(a_tile * b_tile, axis=1)
    tl.store(into + j, total, mask=taken)


def sampled(
    rows: Int[Tensor, " nnz"], columns: Int[Tensor, " nnz"], a: Float[Tensor, "row d"], b: Float[Tensor, "column d"]
) -> Float[Tensor, " nnz"]:
    """The entries of `a b^T` at the nonzeros of S."""
    constants, into = {"ROWS": TILE_ROWS} | width_constants(a.shape[1]), a.new_empty(len(rows))
    arguments: list[Any] = [rows, columns, a, b, into, row_stride(a), row_stride(b), len(rows)]
    launch(sampled_kernel, (-(-len(rows) // TILE_ROWS),), arguments, constants, warps(constants["BLOCK"]))
    return into


@triton.jit
@no_type_check
def reconstruction_error_kernel(
    values, columns, pointers, W_dec, b_dec, x, difference, sampled_into, errors, W_stride, x_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One row: its difference from x, then the products of that difference with the decoder rows of its nonzeros."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(pointers + row)
    end = tl.load(pointers + row + 1)
    lane = tl.arange(0, ROWS)
    error = 0.0
    for piece in tl.static_range(PIECES):
        at = piece * BLOCK + tl.arange(0, BLOCK)
        inside = at < WIDTH
        decoded, _ = row_sums(values, columns, begin, end, W_dec, W_stride, at, WIDTH, BLOCK, ROWS)
        decoded += tl.load(b_dec + at, mask=inside, other=0.0)
        decoded -= tl.load(x + row * x_stride + at, mask=inside, other=0.0)
        tl.store(difference + row * WIDTH + at, decoded, mask=inside)
        error += tl.sum(decoded * decoded, axis=0)
        for j in range(begin, end, ROWS):
            taken = j + lane < end
            column = tl.load(columns + j + lane, mask=taken, other=0).to(tl.int64)
            tile = tl.load(W_dec + column[:, None] * W_stride + at[None, :], mask=taken[:, None] & inside[None, :], other=0.0)
            dot = tl.sum(tile * decoded[None, :], axis=1)
            if piece > 0:
                dot += tl.load(sampled_into + j + lane, mask=taken, other=0.0)
            tl.store(sampled_into + j + lane, dot, mask=taken)
        if piece + 1 < PIECES:
            # The next piece adds to what other threads of the program have stored.
            tl.debug_barrier()
    tl.store(errors + row, error)


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
    constants = {"ROWS": TILE_ROWS} | width_constants(x.shape[1])
    difference, products, errors = x.new_empty(x.shape), values.new_empty(len(values)), x.new_empty(len(x))
    arguments: list[Any] = [values, columns, pointers, W_dec, b_dec, x, difference, products, errors, row_stride(W_dec), row_stride(x)]
    launch(reconstruction_error_kernel, (len(x),), arguments, constants, warps(constants["BLOCK"]))
    return difference, products, errors.sum()
