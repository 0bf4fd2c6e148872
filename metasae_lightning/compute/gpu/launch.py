"""How a Triton kernel is started: its grid, its arguments and the constants that it is compiled for."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LARGEST_BLOCK = 4096
"""Columns that one program holds in registers; a wider row is divided into pieces of this width."""
TILE_ROWS = 4
"""Rows of a matrix that a program loads together, so that enough loads are in flight."""


def width_constants(width: int) -> dict[str, int]:
    """The constants of a kernel over rows of `width` columns: the width of a piece, a power of two, and the number of pieces.

    >>> width_constants(1280)
    {'WIDTH': 1280, 'BLOCK': 2048, 'PIECES': 1}
    >>> width_constants(8192)
    {'WIDTH': 8192, 'BLOCK': 4096, 'PIECES': 2}
    """
    block = min(1 << max(width - 1, 1).bit_length(), LARGEST_BLOCK)
    return {"WIDTH": width, "BLOCK": block, "PIECES": -(-width // block)}


def warps(block: int) -> int:
    """Warps of a program, so that a thread holds at most 8 columns of each row.

    >>> warps(2048)
    8
    """
    return max(1, block // 256)


def launch(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Tensor | float], constants: Mapping[str, int], n_warps: int) -> None:
    """Start a kernel on the device of its first argument, a tensor. Every kernel of the package is started here."""
    first = arguments[0]
    assert isinstance(first, Tensor)
    # A kernel starts on the current device, whatever device its tensors are on.
    with torch.cuda.device_of(first):
        # The default of `enable_fp_fusion` changes in Triton 3.10.
        kernel[grid](*arguments, **constants, num_warps=n_warps, enable_fp_fusion=True)


def row_stride(matrix: Tensor) -> int:
    """The distance between rows of a matrix whose rows are contiguous, as every kernel reads them."""
    assert matrix.stride(1) == 1 or matrix.shape[1] == 1
    return matrix.stride(0)
