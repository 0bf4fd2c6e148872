"""Computation on a few rows of a large matrix at a time, so that intermediate results stay in the processor's cache."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of a chunk: 2.5 MiB of float32.
CHUNK_ELEMENTS = 640 * 2**10
ValueAndSlope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ChunkPolicy:
    """How the sizes of chunks and blocks are chosen."""

    factor: float = 1.0
    """How many times smaller the model is, in each dimension, than the model that it stands for."""
    as_gpu: bool = False
    """Whether a CPU takes the code path of a GPU."""


# A context variable, so that a dry run changes chunk sizes for its own code only. Autograd threads see the default.
DEFAULT_POLICY = ChunkPolicy()
_POLICY: ContextVar[ChunkPolicy] = ContextVar("chunk_policy", default=DEFAULT_POLICY)


def scaled_size(size: int) -> int:
    """A number of elements; in a dry run divided by the run's `factor`^2 and rounded, at least 1."""
    return max(1, round(size / _POLICY.get().factor ** 2))


def is_blocked(tensor: Tensor) -> bool:
    """Whether computation on the tensor uses cache-sized blocks and reused buffers: on a CPU, except in a dry run of a GPU's code path."""
    return tensor.device.type == "cpu" and not _POLICY.get().as_gpu


@contextmanager
def dry_run_scale(factor: float, *, gpu: bool = False) -> Generator[None]:
    """Scale chunk sizes down by `factor`^2, so that a dry run on a model `factor` times smaller makes the same number of chunks.

    `gpu`: take the GPU code path on a CPU.
    """
    token = _POLICY.set(ChunkPolicy(factor, gpu))
    try:
        yield
    finally:
        _POLICY.reset(token)


def row_chunks(*matrices: Float[Tensor, "row _"]) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same rows of each matrix, one chunk of rows after the other, for reading or writing; on a GPU all rows at once.

    >>> [chunk.tolist() for (chunk,) in row_chunks(torch.ones(2, 1))]
    [[[1.0], [1.0]]]
    """
    if not is_blocked(matrices[0]):
        yield matrices
        return
    rows = max(1, scaled_size(CHUNK_ELEMENTS) // max(matrix.shape[1] for matrix in matrices))
    yield from zip(*(matrix.split(rows) for matrix in matrices), strict=True)


def mean_over_rows(
    value_and_slope: ValueAndSlope,
    W: Float[Tensor, "row d"],
    others: Float[Tensor, "selected e"],
    indices: Int[Tensor, " selected"] | None = None,
) -> Float[Tensor, ""]:
    """The mean over rows of `f(W_i, others_i)`.

    `value_and_slope(W, others)` returns the values of f and its gradients in W for a chunk of rows.

    `others` gets no gradient. `indices` limits the mean to some rows of W, each at most once; `others` has one row for each index. The
    mean over no rows is 0. With `indices`, the gradient of W is sparse if W is a leaf on a CPU that already has a gradient; otherwise it
    is dense. Backward can run only once.

    >>> W = torch.tensor([[1.0], [3.0]], requires_grad=True)
    >>> mean_over_rows(lambda rows, others: ((rows * others).sum(1), others), W, torch.tensor([[2.0], [4.0]])).backward()
    >>> W.grad.tolist()
    [[1.0], [2.0]]
    """
    return _MeanOverRows.apply(W, others, value_and_slope, indices)  # type: ignore[return-value]


def step_permutation(rows: int, *, step: int, seed: int = 0) -> Int[Tensor, " row"]:
    """A random permutation that depends on the step and the seed only: the same after a resume. It leaves the global random state alone."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + step))


class _MeanOverRows(torch.autograd.Function):
    """Computes values and gradient in one forward pass over chunks of rows."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, others: Tensor, value_and_slope: ValueAndSlope, indices: Tensor | None) -> Tensor:
        needs_gradient, selected = ctx.needs_input_grad[0], W if indices is None else W.index_select(0, indices)
        gradient = torch.empty_like(selected) if needs_gradient and is_blocked(W) else selected
        ctx.gradient, ctx.indices = gradient, indices
        ctx.save_for_backward(*([] if indices is None else [W]))
        with torch.autocast(W.device.type, enabled=False):
            if not is_blocked(W):
                values, slopes = value_and_slope(selected, others)
                ctx.gradient = slopes.div_(max(len(selected), 1))
                return values.mean() if len(values) else W.new_zeros(())
            total, count = W.new_zeros(()), max(len(selected), 1)
            for rows, other_rows, gradient_rows in row_chunks(selected, others, gradient):
                values, slopes = value_and_slope(rows, other_rows)
                if needs_gradient:
                    torch.div(slopes, count, out=gradient_rows)
                total += values.sum() / count
            return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # The gradient is scaled in place and handed on without a copy: backward runs once.
        gradient, ctx.gradient = ctx.gradient.mul_(gradients[0]), None
        if ctx.indices is not None:
            (W,) = ctx.saved_tensors
            if W.is_leaf and W.grad is not None and is_blocked(W):  # on a GPU the sum of a dense and a sparse gradient would wait
                gradient = torch.sparse_coo_tensor(ctx.indices[None], gradient, W.shape, check_invariants=False)
            else:
                gradient = torch.zeros_like(W).index_copy_(0, ctx.indices, gradient)
        return gradient, None, None, None
