"""Some rows of a large matrix at a time: what is made of them on the way stays in a processor's cache."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers of a piece of a matrix: 2.5 MB of float32.
PIECE = 640 * 2**10
# By how much everything is smaller just now, in each direction.
_factor = 1.0
OfRows = Callable[[Tensor, Tensor], Tensor]


def some(size: int) -> int:
    """So many numbers at a time; fewer in a `trial`."""
    return max(1, round(size / _factor**2))


@contextmanager
def trial(factor: float) -> Generator[None]:
    """Pieces as they are to a matrix so many times as long and as wide: who tries a step on a small model measures those of a large one."""
    global _factor
    _factor, before = factor, _factor
    try:
        yield
    finally:
        _factor = before


def pieces(*matrices: Float[Tensor, "row _"]) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, some at a time, to be read or written to.

    >>> [piece.tolist() for (piece,) in pieces(torch.ones(2, 1))]
    [[[1.0], [1.0]]]
    """
    rows = max(1, some(PIECE) // max(matrix.shape[1] for matrix in matrices))
    yield from zip(*(matrix.split(rows) for matrix in matrices), strict=True)


def mean_over_rows(of_rows: OfRows, W: Float[Tensor, "row d"], beside: Float[Tensor, "row e"]) -> Float[Tensor, ""]:
    """The mean of `of_rows(W_i, beside_i)`, which gives a number a row; its gradient in `W` is made on the way.

    >>> W = torch.tensor([[1.0], [3.0]], requires_grad=True)
    >>> mean_over_rows(lambda rows, beside: (rows * beside).sum(1), W, torch.tensor([[2.0], [4.0]])).backward()
    >>> W.grad.tolist()
    [[1.0], [2.0]]
    """
    return _MeanOverRows.apply(W, beside, of_rows)  # type: ignore[return-value]


def order(rows: int, *, step: int, seed: int = 0) -> Int[Tensor, " row"]:
    """The numbers of so many rows in an order of the step's own: new at each step, the same after a resume; no random stream moves."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + step))


class _MeanOverRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, beside: Tensor, of_rows: OfRows) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(W) if wanted else W
        ctx.gradient = gradient
        total = W.new_zeros(())
        for rows, others, into in pieces(W, beside, gradient):
            rows = rows.detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                value = of_rows(rows, others).sum() / len(W)
            if wanted:
                into.copy_(torch.autograd.grad(value, rows)[0])
            total += value.detach()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient, ctx.gradient = ctx.gradient, None  # handed on, not copied: there is no second time
        return gradient.mul_(gradients[0]), None, None
