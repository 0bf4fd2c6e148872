"""Kernels over the rows of a dense matrix, one program for each row: unit rows, gradients without their radial part, decomposability."""

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from metasae_lightning.compute.gpu.launch import launch, row_stride, warps, width_constants

SMALLEST_NORM = tl.constexpr(1e-12)
"""The divisor of a row whose norm is smaller, as in `torch.nn.functional.normalize`."""


@triton.jit
@no_type_check
def unit_rows_kernel(W, into, W_stride, into_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    """One row divided by its norm."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    square = 0.0
    for piece in tl.static_range(PIECES):
        column = piece * BLOCK + lane
        w = tl.load(W + row * W_stride + column, mask=column < WIDTH, other=0.0)
        square += tl.sum(w * w, axis=0)
    norm = tl.maximum(tl.sqrt(square), SMALLEST_NORM)
    for piece in tl.static_range(PIECES):
        column = piece * BLOCK + lane
        w = tl.load(W + row * W_stride + column, mask=column < WIDTH, other=0.0)
        tl.store(into + row * into_stride + column, w / norm, mask=column < WIDTH)


def unit_rows(W: Float[Tensor, "row d"], into: Float[Tensor, "row d"]) -> None:
    """Write `W_i / max(||W_i||, 1e-12)` to `into`, which may be W."""
    constants = width_constants(W.shape[1])
    launch(unit_rows_kernel, (len(W),), [W, into, row_stride(W), row_stride(into)], constants, warps(constants["BLOCK"]))


@triton.jit
@no_type_check
def remove_radial_kernel(gradient, W, gradient_stride, W_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    """One row of a gradient without its part along the row of W."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    square = 0.0
    along = 0.0
    for piece in tl.static_range(PIECES):
        column = piece * BLOCK + lane
        w = tl.load(W + row * W_stride + column, mask=column < WIDTH, other=0.0)
        g = tl.load(gradient + row * gradient_stride + column, mask=column < WIDTH, other=0.0)
        square += tl.sum(w * w, axis=0)
        along += tl.sum(g * w, axis=0)
    norm = tl.maximum(tl.sqrt(square), SMALLEST_NORM)
    radial = along / (norm * norm)
    for piece in tl.static_range(PIECES):
        column = piece * BLOCK + lane
        w = tl.load(W + row * W_stride + column, mask=column < WIDTH, other=0.0)
        g = tl.load(gradient + row * gradient_stride + column, mask=column < WIDTH, other=0.0)
        tl.store(gradient + row * gradient_stride + column, g - radial * w, mask=column < WIDTH)


def remove_radial(gradient: Float[Tensor, "row d"], W: Float[Tensor, "row d"]) -> None:
    """Subtract from each row of `gradient`, in place, its part along `u = W_i / max(||W_i||, 1e-12)`: `g - (g . u) u`."""
    constants = width_constants(W.shape[1])
    launch(remove_radial_kernel, (len(W),), [gradient, W, row_stride(gradient), row_stride(W)], constants, warps(constants["BLOCK"]))


@triton.jit
@no_type_check
def decomposability_kernel(
    W, reconstruction, p_into, slope, W_stride, r_stride, sigma_sq, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr
):
    """One row's decomposability and its gradient: `functional.decomposability_with_slope`."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    ww = 0.0
    wr = 0.0
    rr = 0.0
    for piece in tl.static_range(PIECES):
        column = piece * BLOCK + lane
        w = tl.load(W + row * W_stride + column, mask=column < WIDTH, other=0.0)
        r = tl.load(reconstruction + row * r_stride + column, mask=column < WIDTH, other=0.0)
        ww += tl.sum(w * w, axis=0)
        wr += tl.sum(w * r, axis=0)
        rr += tl.sum(r * r, axis=0)
    norm = tl.sqrt(ww)
    safe_norm = tl.maximum(norm, SMALLEST_NORM)
    unit = norm / safe_norm
    uu = unit * unit
    ur = wr / safe_norm
    p = tl.exp(-(uu + rr - 2 * ur) / sigma_sq)
    scale = -2 * p / (sigma_sq * safe_norm)
    row_scale = scale * (1 - uu + ur) / safe_norm
    for piece in tl.static_range(PIECES):
        column = piece * BLOCK + lane
        w = tl.load(W + row * W_stride + column, mask=column < WIDTH, other=0.0)
        r = tl.load(reconstruction + row * r_stride + column, mask=column < WIDTH, other=0.0)
        tl.store(slope + row * WIDTH + column, w * row_scale - r * scale, mask=column < WIDTH)
    tl.store(p_into + row, p)


def decomposability(
    W: Float[Tensor, "row d"], reconstruction: Float[Tensor, "row d"], sigma_sq: float
) -> tuple[Float[Tensor, " row"], Float[Tensor, "row d"]]:
    """`functional.decomposability_with_slope`: the decomposability `p_i` of each row of W, and the gradient of `p_i` in `W_i`."""
    constants = width_constants(W.shape[1])
    p, slope = W.new_empty(len(W)), W.new_empty(W.shape)
    arguments = [W, reconstruction, p, slope, row_stride(W), row_stride(reconstruction), float(sigma_sq)]
    launch(decomposability_kernel, (len(W),), arguments, constants, warps(constants["BLOCK"]))
    return p, slope
