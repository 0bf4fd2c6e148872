"""Encoding and decoding by the few latents that are kept, each with its own backward.

An SAE that keeps `k` of `d_sae` latents has `k / d_sae` of its matrix of activations to decode and to send gradients through; only the
encoder's product is dense.
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
    """The latents that are kept of a batch."""

    values: Float[Tensor, " nnz"]
    """Their activations, before any scale."""
    pattern: Pattern
    """Where they are."""
    extra_pre_acts: Float[Tensor, "row extra"]
    """Pre-activations of the latents that were asked for as extra latents, before any scale."""
    threshold: float | None
    """The smallest activation that is kept, where one cut is made through the whole batch."""


@dataclass
class TopKRule:
    """What is kept of a batch: so many latents of each row, or so many a row wherever they are; of positive activations alone."""

    k: float
    per_row: bool
    hint: float | None = None
    """The edge of the last batch, to begin the search at. It saves time and changes nothing."""
    incremental: IncrementalTopK | None = None
    """Where the rows are those of the last batch, moved a little: what is known of them."""
    parallelism: Parallelism = field(default_factory=Parallelism)
    """Through whose batches one cut is made, and who has other latents of the same rows."""


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
    """What is kept of `((x - origin) W_enc + b_enc) * scale`; `scale` has a say in what is kept, and takes no gradient.

    Under autocast the product with `W_enc` is made in its type, everything else in that of the weights. The gradient of `W_enc` is made
    in the memory `gradients`, and `x - origin` in `rows`, where they are given: then nothing that was made there may still be wanted.
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
    """`S W_dec` for the sparse matrix `S`, and the rows of `W_dec` that were asked for as extra latents.

    The gradient of `W_dec` is made in `gradients` where that is given: then nothing that was made there may still be wanted.

    >>> place = Pattern(torch.tensor([0, 1]), torch.tensor([1, 0]), (2, 2))
    >>> decode(torch.tensor([2.0, 3.0]), place, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))[0].tolist()
    [[0.0, 2.0], [3.0, 0.0]]
    """
    extra_latents = torch.empty(0, dtype=torch.long, device=W_dec.device) if extra_latents is None else extra_latents
    return _Decode.apply(values, W_dec, extra_latents, pattern, gradients)  # type: ignore[misc]


class _Encode(torch.autograd.Function):
    """See `encode`. What is kept is kept whatever a small change would do, so a gradient goes through the kept ones alone."""

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
        # Under a name of its own a parameter takes it without a copy.
        return inputs, weights.view(W_enc.shape), biases, origins, *[None] * 6


class _Decode(torch.autograd.Function):
    """See `decode`."""

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
    """See `squared_error`."""

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
