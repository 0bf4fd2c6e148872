"""The kernel that collects the pre-activations above a cut, as keys that rank by value and then by place."""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from metasae_lightning.compute.gpu.launch import launch

BLOCK_ROWS, BLOCK_COLUMNS, WARPS = 16, 512, 16
"""Rows and columns that a program reads, and its warps: 16 values a thread, so that two programs fit on a multiprocessor of an H100."""


@triton.jit(do_not_specialize=["n_rows", "n", "room", "first_row"])
@no_type_check
def compact_kernel(
    products, bias, scale, cut, keys, count, n_rows, n, room, first_row,
    SCALED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One block of ROWS x COLUMNS: count the entries above the cut, reserve that many keys, write them."""
    blocks_across = tl.cdiv(n, COLUMNS)
    first = tl.program_id(0) // blocks_across * ROWS
    first_column = tl.program_id(0) % blocks_across * COLUMNS
    column = tl.arange(0, COLUMNS)
    # Within a block 32 bits are enough; 64 are used once, for its first entry.
    offset = tl.arange(0, ROWS)[:, None] * n + column[None, :]
    entries = products + first.to(tl.int64) * n + first_column
    if EVEN:
        value = tl.load(entries + offset) + tl.load(bias + first_column + column)[None, :]
    else:
        inside = first_column + column < n
        # NaN outside the matrix: it is above no cut, whatever the bias and the scale.
        value = tl.load(entries + offset, mask=(first + tl.arange(0, ROWS) < n_rows)[:, None] & inside[None, :], other=float("nan"))
        value += tl.load(bias + first_column + column, mask=inside, other=0.0)[None, :]
    if SCALED:
        value *= tl.load(scale + first_column + column, mask=first_column + column < n, other=0.0)[None, :]
    lowest = tl.load(cut)
    # A cut that is NaN stays NaN, and no entry is above it.
    above = value > tl.where(lowest < 0.0, 0.0, lowest)
    ones = above.to(tl.int32)
    in_column = tl.sum(ones, axis=0)
    total = tl.sum(in_column, axis=0)
    if total > 0:
        start = tl.atomic_add(count, total, sem="relaxed")
        before_column = start + tl.cumsum(in_column, axis=0) - in_column
        slot = (before_column[None, :] + tl.cumsum(ones, axis=0) - 1).to(tl.uint32)
        # A place is below 2^32, so 32 bits hold that of the block's first entry.
        rank = (0xFFFFFFFF - ((first.to(tl.int64) + first_row) * n + first_column)).to(tl.uint32) - offset.to(tl.uint32)
        key = (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | rank.to(tl.int64)
        tl.store(keys + slot, key, mask=above & (slot < room))


def compact(
    products: Float[Tensor, "batch n"],
    bias: Float[Tensor, " n"],
    scale: Float[Tensor, " n"] | None,
    cut: Float[Tensor, ""],
    keys: Int[Tensor, " room"],
    count: Int[Tensor, " 1"],
    first_row: int,
) -> None:
    """Append a key to `keys` for each entry of `(products + bias) * scale` above `cut` and above 0, and add their number to `count`.

    The order of the keys differs from run to run. Their set does not, unless more entries are above the cut than keys fit: the others are
    dropped, and counted as well. With the bits of the value as an integer, `key = bits * 2^32 + (2^32 - 1 - place)` and
    `place = (first_row + row) * n + column`, so that keys are unique and rank by value, equal values by place. Every place is below 2^32.
    A count of 2^31 or more reads as negative.
    """
    n_rows, n = products.shape
    assert products.dtype == torch.float32 and keys.dtype == torch.int64
    assert products.is_contiguous() and bias.is_contiguous() and (scale is None or scale.is_contiguous())
    assert keys.is_contiguous() and (first_row + n_rows) * n <= 1 << 32
    arguments: list[Any] = [products, bias, bias if scale is None else scale, cut, keys, count, n_rows, n, len(keys), first_row]
    blocks = -(-n_rows // BLOCK_ROWS) * -(-n // BLOCK_COLUMNS)
    even = n_rows % BLOCK_ROWS == 0 and n % BLOCK_COLUMNS == 0
    constants = {"SCALED": scale is not None, "EVEN": even, "ROWS": BLOCK_ROWS, "COLUMNS": BLOCK_COLUMNS}
    launch(compact_kernel, (blocks,), arguments, constants, WARPS)
