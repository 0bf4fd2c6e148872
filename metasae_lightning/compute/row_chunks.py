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
# By how much everything is smaller just now, in each direction, and whether it is tried as a GPU would do it.
_factor, _gpu = 1.0, False
OfRows = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def some(size: int) -> int:
    """So many numbers at a time; fewer in a `trial`."""
    return max(1, round(size / _factor**2))


def cached(tensor: Tensor) -> bool:
    """Whether work is cut to what a processor's cache holds, and rooms are kept: on a CPU, unless it stands for a GPU in a `trial`."""
    return tensor.device.type == "cpu" and not _gpu


@contextmanager
def trial(factor: float, *, gpu: bool = False) -> Generator[None]:
    """Pieces as they are to a matrix so many times as long and as wide: who tries a step on a small model measures those of a large one.

    With `gpu` the step goes the way that it goes on one.
    """
    global _factor, _gpu
    before = _factor, _gpu
    _factor, _gpu = factor, gpu
    try:
        yield
    finally:
        _factor, _gpu = before


def pieces(*matrices: Float[Tensor, "row _"]) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, some at a time, to be read or written to.

    >>> [piece.tolist() for (piece,) in pieces(torch.ones(2, 1))]
    [[[1.0], [1.0]]]
    """
    rows = max(1, some(PIECE) // max(matrix.shape[1] for matrix in matrices))
    yield from zip(*(matrix.split(rows) for matrix in matrices), strict=True)


def mean_over_rows(
    of_rows: OfRows, W: Float[Tensor, "row d"], beside: Float[Tensor, "some e"], chosen: Int[Tensor, " some"] | None = None
) -> Float[Tensor, ""]:
    """The mean of `of_rows(W_i, beside_i)`, which gives a number a row and its gradient in that; nothing goes through `beside`.

    With `chosen` it is over those rows, each named once, which `beside` is of: what the others' gradient is is not written out where a
    gradient is there to be added to. Over none it is 0.

    >>> W = torch.tensor([[1.0], [3.0]], requires_grad=True)
    >>> mean_over_rows(lambda rows, beside: ((rows * beside).sum(1), beside), W, torch.tensor([[2.0], [4.0]])).backward()
    >>> W.grad.tolist()
    [[1.0], [2.0]]
    """
    return _MeanOverRows.apply(W, beside, of_rows, chosen)  # type: ignore[return-value]


def order(rows: int, *, step: int, seed: int = 0) -> Int[Tensor, " row"]:
    """The numbers of so many rows in an order of the step's own: new at each step, the same after a resume; no random stream moves."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + step))


class _MeanOverRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, beside: Tensor, of_rows: OfRows, chosen: Tensor | None) -> Tensor:
        wanted, given = ctx.needs_input_grad[0], W if chosen is None else W.index_select(0, chosen)
        gradient = torch.empty_like(given) if wanted else given
        ctx.gradient, ctx.chosen = gradient, chosen
        ctx.save_for_backward(*([] if chosen is None else [W]))
        total, count = W.new_zeros(()), max(len(given), 1)
        for rows, others, into in pieces(given, beside, gradient):
            values, slope = of_rows(rows, others)
            if wanted:
                torch.div(slope, count, out=into)
            total += values.sum() / count
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient, ctx.gradient = ctx.gradient.mul_(gradients[0]), None  # handed on, not copied: there is no second time
        if ctx.chosen is not None:
            (W,) = ctx.saved_tensors
            if W.is_leaf and W.grad is not None:
                gradient = torch.sparse_coo_tensor(ctx.chosen[None], gradient, W.shape, check_invariants=False)
            else:
                gradient = torch.zeros_like(W).index_copy_(0, ctx.chosen, gradient)
        return gradient, None, None, None
