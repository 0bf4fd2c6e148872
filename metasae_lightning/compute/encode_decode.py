"""Sparse encoding and decoding with hand-written backward passes.

An SAE with `k` active latents of `d_sae` decodes, and computes gradients for, a fraction `k / d_sae` of its activation matrix. Only the
product with the encoder is dense.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from metasae_lightning.compute.buffers import BufferPool, buffer_or_new
from metasae_lightning.compute.process_group import SINGLE, Parallelism, ProcessGroup
from metasae_lightning.compute.row_chunks import row_chunks
from metasae_lightning.compute.sparse_matrix import Pattern
from metasae_lightning.compute.topk import BlockwiseEncoder
from metasae_lightning.compute.topk_incremental import IncrementalTopK


class Encoded(NamedTuple):
    """The active latents of a batch."""

    values: Float[Tensor, " nnz"]
    """Their activations, before any scale."""
    pattern: Pattern
    """Their rows and latents."""
    extra_pre_acts: Float[Tensor, "row extra"]
    """Pre-activations of `extra_latents` on every row, before any scale."""
    threshold: float | None
    """The smallest active value of the batch; None if top-k runs per row."""


@dataclass
class TopKRule:
    """Which latents of a batch are active: the `k` largest positive of each row, or the `k * rows` largest positive of the batch."""

    k: float
    per_row: bool
    hint: float | None = None
    """The threshold of the last batch, where the search starts. It changes the time, not the result."""
    incremental: IncrementalTopK | None = None
    """Incremental search, for rows that move little from one batch to the next."""
    parallelism: Parallelism = field(default_factory=Parallelism)
    """The ranks whose batches share one threshold, and the ranks with other latents of the same rows."""


def encode(
    x: Float[Tensor, "row d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    rule: TopKRule,
    *,
    origin: Float[Tensor, " d_in"] | None = None,
    scale: Float[Tensor, " d_sae"] | None = None,
    extra_latents: Int[Tensor, " extra"] | None = None,
    gradients: BufferPool | None = None,
    rows: BufferPool | None = None,
) -> Encoded:
    """The top-k latents of `((x - origin) W_enc + b_enc) * scale`. `scale` affects the ranking only, and gets no gradient.

    Under autocast the product with `W_enc` uses the lower precision, everything else that of the weights. The buffers `gradients` take
    the gradient of `W_enc`, the buffers `rows` take `x - origin`: earlier results in these buffers are overwritten.
    """
    extra_latents = torch.empty(0, dtype=torch.long, device=x.device) if extra_latents is None else extra_latents
    found: list[Any] = []
    kept = _Encode.apply(x, W_enc, b_enc, origin, extra_latents, scale, rule, gradients, rows, found)  # type: ignore[misc]
    return Encoded(kept[0], Pattern(kept[1], kept[2], (x.shape[0], W_enc.shape[1])), kept[3], found[0])


def decode(
    values: Float[Tensor, " nnz"],
    pattern: Pattern,
    W_dec: Float[Tensor, "d_sae d_in"],
    extra_latents: Int[Tensor, " extra"] | None = None,
    gradients: BufferPool | None = None,
) -> tuple[Float[Tensor, "row d_in"], Float[Tensor, "extra d_in"]]:
    """`S W_dec` for the sparse matrix `S` of activations, and the rows of `W_dec` of the extra latents.

    The buffers `gradients` take the gradient of `W_dec`: an earlier result in them is overwritten.

    >>> place = Pattern(torch.tensor([0, 1]), torch.tensor([1, 0]), (2, 2))
    >>> decode(torch.tensor([2.0, 3.0]), place, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))[0].tolist()
    [[0.0, 2.0], [3.0, 0.0]]
    """
    extra_latents = torch.empty(0, dtype=torch.long, device=W_dec.device) if extra_latents is None else extra_latents
    return _Decode.apply(values, W_dec, extra_latents, pattern, gradients)  # type: ignore[misc]


class _Encode(torch.autograd.Function):
    """Top-k encoding. The selection has zero gradient, so gradients flow through the active latents only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        origin: Tensor | None,
        extra_latents: Tensor,
        scale: Tensor | None,
        rule: TopKRule,
        memory: BufferPool | None,
        row_memory: BufferPool | None,
        found: list[Any],
    ) -> tuple[Tensor, ...]:
        x = x if origin is None else torch.sub(x, origin, out=buffer_or_new(row_memory, "x", x.shape, x))
        encoder = BlockwiseEncoder(x, W_enc, b_enc, scale, extra_latents, rule.parallelism)
        if rule.incremental is not None and not rule.per_row and rule.incremental.supports(encoder):
            kept = rule.incremental.keep(encoder, int(rule.k * len(x)))
        else:
            kept = encoder.keep(rule.k, per_row=rule.per_row, hint=rule.hint)
        found.append(kept.threshold)
        ctx.save_for_backward(x, W_enc, kept.rows, kept.columns, extra_latents)
        ctx.centred, ctx.memory = origin is not None, memory
        ctx.mark_non_differentiable(kept.rows, kept.columns)
        return kept.values, kept.rows, kept.columns, encoder.extra_pre_acts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W_enc, rows, columns, extra_latents = ctx.saved_tensors
        pattern = Pattern(rows, columns, (x.shape[0], W_enc.shape[1]))
        at, beside = gradients[0], gradients[3]
        with torch.autocast(x.device.type, enabled=False):
            biases = at.new_zeros(W_enc.shape[1]).index_add_(0, columns, at)
            weights = pattern.left_product(x, at, buffer_or_new(ctx.memory, "W_enc", W_enc.shape, at))
            if len(extra_latents):
                biases.index_add_(0, extra_latents, beside.sum(0))
                weights.index_add_(1, extra_latents, x.T @ beside)
            inputs = None
            if ctx.needs_input_grad[0]:
                inputs = pattern.product(at, W_enc.T.contiguous()) + beside @ W_enc[:, extra_latents].T
            origins = -(W_enc @ biases) if ctx.centred else None
        # A view is a new tensor object: autograd then stores it as the parameter's gradient without a copy.
        return inputs, weights.view(W_enc.shape), biases, origins, *[None] * 6


class _Decode(torch.autograd.Function):
    """Product of a sparse activation matrix with the decoder."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, W_dec: Tensor, extra_latents: Tensor, pattern: Pattern, memory: BufferPool | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(values, W_dec, extra_latents)
        ctx.pattern, ctx.memory = pattern, memory
        with torch.autocast(W_dec.device.type, enabled=False):
            return pattern.product(values, W_dec), W_dec[extra_latents]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, W_dec, extra_latents = ctx.saved_tensors
        rebuilt, beside = gradients[0].contiguous(), gradients[1]
        at = weights = None
        with torch.autocast(W_dec.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                at = ctx.pattern.sampled(rebuilt, W_dec)
            if ctx.needs_input_grad[1]:
                into = buffer_or_new(ctx.memory, "W_dec", W_dec.shape, values)
                weights = ctx.pattern.transposed_product(values, rebuilt, into).index_add_(0, extra_latents, beside).view(W_dec.shape)
        return at, weights, None, None, None


def squared_error(
    values: Float[Tensor, " nnz"],
    pattern: Pattern,
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    x: Float[Tensor, "row d_in"],
    extra_latents: Int[Tensor, " extra"] | None = None,
    gradients: BufferPool | None = None,
    rows: BufferPool | None = None,
    beside: ProcessGroup = SINGLE,
) -> tuple[Float[Tensor, ""], Float[Tensor, "row d_in"], Float[Tensor, "extra d_in"]]:
    """The mean over rows of `||S W_dec + b_dec - x||^2`, of none 0, that difference without a gradient, and rows of `W_dec`.

    Where other ranks have other latents `beside`, `S W_dec` is the sum of what all make.

    The difference is the one matrix of the batch's size that is made, in the memory `rows` if that is given, and what the gradients are
    made from; that of `W_dec` in the memory `gradients`. Nothing that was made there may still be wanted.
    """
    extra_latents = torch.empty(0, dtype=torch.long, device=W_dec.device) if extra_latents is None else extra_latents
    return _SquaredError.apply(values, W_dec, b_dec, x, extra_latents, pattern, gradients, rows, beside)  # type: ignore[misc]


class _SquaredError(torch.autograd.Function):
    """Sparse decoding and squared error in one function, with one matrix of the batch's size."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        x: Tensor,
        extra_latents: Tensor,
        pattern: Pattern,
        memory: BufferPool | None,
        row_memory: BufferPool | None,
        beside: ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(W_dec.device.type, enabled=False):
            difference = pattern.product(values, W_dec, buffer_or_new(row_memory, "difference", x.shape, values))
            beside.all_reduce_sum_(difference)
            total = values.new_zeros(())
            for some, rows in row_chunks(difference, x):
                flat = some.add_(b_dec).sub_(rows).flatten()
                total += flat.dot(flat)
        ctx.save_for_backward(values, W_dec, difference, extra_latents)
        ctx.pattern, ctx.memory = pattern, memory
        ctx.mark_non_differentiable(difference)
        return total / max(len(x), 1), difference, W_dec[extra_latents]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, W_dec, difference, extra_latents = ctx.saved_tensors
        scale, beside = 2 * gradients[0] / max(len(difference), 1), gradients[2]
        with torch.autocast(W_dec.device.type, enabled=False):
            at = ctx.pattern.sampled(difference, W_dec) * scale
            into = buffer_or_new(ctx.memory, "W_dec", W_dec.shape, values)
            weights = ctx.pattern.transposed_product(values * scale, difference, into).index_add_(0, extra_latents, beside)
            origins = difference.sum(0) * scale
            inputs = difference * -scale if ctx.needs_input_grad[3] else None
        return at, weights.view(W_dec.shape), origins, inputs, *[None] * 5
