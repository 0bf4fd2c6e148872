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
    """The smallest active value, with its scale, over all ranks; None if top-k runs per row or nothing is active."""


@dataclass
class TopKRule:
    """Which latents are active: with `per_row` the `k` largest positive of each row, else the `k * rows` largest of the batch."""

    k: float
    per_row: bool
    hint: float | None = None
    """The threshold of the last batch, where the search starts. It changes the time, not the result."""
    incremental: IncrementalTopK | None = None
    """Incremental search, for rows that move little from one batch to the next."""
    parallelism: Parallelism = field(default_factory=Parallelism)
    """Its `world`: the ranks whose batches share one threshold. Its `tensor_group`: the ranks with other latents of the same rows."""


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
    """The top-k latents of `((x - origin) W_enc + b_enc) * scale`, and the pre-activations of `extra_latents`, which must be sorted.

    `scale` affects the ranking and the threshold, not the returned activations, and gets no gradient. Under autocast the product with
    `W_enc` uses the lower precision, and everything else uses the precision of the weights. The pool `gradients` holds the gradient of
    `W_enc`, and the pool `rows` holds `x - origin`; earlier results of these names in the pools are overwritten.
    """
    extra_latents = torch.empty(0, dtype=torch.long, device=x.device) if extra_latents is None else extra_latents
    threshold: list[float | None] = []
    values, nonzero_rows, columns, extra_pre_acts = _Encode.apply(  # type: ignore[misc]
        x, W_enc, b_enc, origin, extra_latents, scale, rule, gradients, rows, threshold
    )
    return Encoded(values, Pattern(nonzero_rows, columns, (x.shape[0], W_enc.shape[1])), extra_pre_acts, threshold[0])


def decode(
    values: Float[Tensor, " nnz"],
    pattern: Pattern,
    W_dec: Float[Tensor, "d_sae d_in"],
    extra_latents: Int[Tensor, " extra"] | None = None,
    gradients: BufferPool | None = None,
) -> tuple[Float[Tensor, "row d_in"], Float[Tensor, "extra d_in"]]:
    """`S W_dec` for the sparse matrix `S` of activations, and the rows of `W_dec` of `extra_latents`.

    The pool `gradients` holds the gradient of `W_dec`; an earlier gradient of `W_dec` in the pool is overwritten.

    >>> pattern = Pattern(torch.tensor([0, 1]), torch.tensor([1, 0]), (2, 2))
    >>> decode(torch.tensor([2.0, 3.0]), pattern, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))[0].tolist()
    [[0.0, 2.0], [3.0, 0.0]]
    """
    extra_latents = torch.empty(0, dtype=torch.long, device=W_dec.device) if extra_latents is None else extra_latents
    return _Decode.apply(values, W_dec, extra_latents, pattern, gradients)  # type: ignore[misc]


class _Encode(torch.autograd.Function):
    """Top-k encoding, and the pre-activations of the extra latents.

    The selection has zero gradient: gradients flow through the active latents, and through the pre-activations of the extra latents.

    The forward pass appends the threshold, a float or None, to the list `threshold`.
    """

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
        gradient_buffers: BufferPool | None,
        row_buffers: BufferPool | None,
        threshold: list[float | None],
    ) -> tuple[Tensor, ...]:
        x = x if origin is None else torch.sub(x, origin, out=buffer_or_new(row_buffers, "x", x.shape, x))
        encoder = BlockwiseEncoder(x, W_enc, b_enc, scale, extra_latents, rule.parallelism)
        if rule.incremental is not None and not rule.per_row and rule.incremental.supports(encoder):
            selected = rule.incremental.top_k(encoder, int(rule.k * len(x)))
        else:
            selected = encoder.top_k(rule.k, per_row=rule.per_row, hint=rule.hint)
        threshold.append(selected.threshold)
        ctx.save_for_backward(x, W_enc, selected.rows, selected.columns, extra_latents)
        ctx.has_origin, ctx.gradient_buffers = origin is not None, gradient_buffers
        ctx.mark_non_differentiable(selected.rows, selected.columns)
        return selected.values, selected.rows, selected.columns, encoder.extra_pre_acts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W_enc, rows, columns, extra_latents = ctx.saved_tensors
        pattern = Pattern(rows, columns, (x.shape[0], W_enc.shape[1]))
        grad_values, grad_extra = gradients[0], gradients[3]
        with torch.autocast(x.device.type, enabled=False):
            grad_b_enc = grad_values.new_zeros(W_enc.shape[1]).index_add_(0, columns, grad_values)
            buffer = buffer_or_new(ctx.gradient_buffers, "W_enc", W_enc.shape, grad_values)
            grad_W_enc = pattern.left_product(x, grad_values, buffer)
            if len(extra_latents):
                grad_b_enc.index_add_(0, extra_latents, grad_extra.sum(0))
                grad_W_enc.index_add_(1, extra_latents, x.T @ grad_extra)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = pattern.product(grad_values, W_enc.T.contiguous()) + grad_extra @ W_enc[:, extra_latents].T
            grad_origin = -(W_enc @ grad_b_enc) if ctx.has_origin else None
        # A view is a new tensor object: autograd then stores it as the parameter's gradient without a copy.
        return grad_x, grad_W_enc.view(W_enc.shape), grad_b_enc, grad_origin, *[None] * 6


class _Decode(torch.autograd.Function):
    """Product of a sparse activation matrix with the decoder."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, W_dec: Tensor, extra_latents: Tensor, pattern: Pattern, gradient_buffers: BufferPool | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(values, W_dec, extra_latents)
        ctx.pattern, ctx.gradient_buffers = pattern, gradient_buffers
        with torch.autocast(W_dec.device.type, enabled=False):
            return pattern.product(values, W_dec), W_dec[extra_latents]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, W_dec, extra_latents = ctx.saved_tensors
        grad_product, grad_extra_rows = gradients[0].contiguous(), gradients[1]
        grad_values = grad_W_dec = None
        with torch.autocast(W_dec.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_values = ctx.pattern.sampled(grad_product, W_dec)
            if ctx.needs_input_grad[1]:
                buffer = buffer_or_new(ctx.gradient_buffers, "W_dec", W_dec.shape, values)
                grad_W_dec = ctx.pattern.transposed_product(values, grad_product, buffer).index_add_(0, extra_latents, grad_extra_rows)
                grad_W_dec = grad_W_dec.view(W_dec.shape)
        return grad_values, grad_W_dec, None, None, None


def squared_error(
    values: Float[Tensor, " nnz"],
    pattern: Pattern,
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    x: Float[Tensor, "row d_in"],
    extra_latents: Int[Tensor, " extra"] | None = None,
    gradients: BufferPool | None = None,
    rows: BufferPool | None = None,
    tensor_group: ProcessGroup = SINGLE,
) -> tuple[Float[Tensor, ""], Float[Tensor, "row d_in"], Float[Tensor, "extra d_in"]]:
    """The squared error, the difference `S W_dec + b_dec - x` without a gradient, and the rows of `W_dec` of `extra_latents`.

    `S` is the sparse matrix of activations. The error is the mean over rows of the difference's squared norm; for no rows it is 0. The
    ranks of `tensor_group` have other latents of the same rows, and `S W_dec` is summed over these ranks.

    The difference is the only matrix of the batch's size that is computed, and the gradients are computed from it. The pool `rows` holds
    the difference, and the pool `gradients` holds the gradient of `W_dec`; earlier results of these names in the pools are overwritten.
    """
    extra_latents = torch.empty(0, dtype=torch.long, device=W_dec.device) if extra_latents is None else extra_latents
    return _SquaredError.apply(values, W_dec, b_dec, x, extra_latents, pattern, gradients, rows, tensor_group)  # type: ignore[misc]


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
        gradient_buffers: BufferPool | None,
        row_buffers: BufferPool | None,
        tensor_group: ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(W_dec.device.type, enabled=False):
            difference = pattern.product(values, W_dec, buffer_or_new(row_buffers, "difference", x.shape, values))
            tensor_group.all_reduce_sum_(difference)
            total = values.new_zeros(())
            for difference_rows, x_rows in row_chunks(difference, x):
                flat = difference_rows.add_(b_dec).sub_(x_rows).flatten()
                total += flat.dot(flat)
        ctx.save_for_backward(values, W_dec, difference, extra_latents)
        ctx.pattern, ctx.gradient_buffers = pattern, gradient_buffers
        ctx.mark_non_differentiable(difference)
        return total / max(len(x), 1), difference, W_dec[extra_latents]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, W_dec, difference, extra_latents = ctx.saved_tensors
        scale, grad_extra_rows = 2 * gradients[0] / max(len(difference), 1), gradients[2]
        with torch.autocast(W_dec.device.type, enabled=False):
            grad_values = ctx.pattern.sampled(difference, W_dec) * scale
            buffer = buffer_or_new(ctx.gradient_buffers, "W_dec", W_dec.shape, values)
            grad_W_dec = ctx.pattern.transposed_product(values * scale, difference, buffer).index_add_(0, extra_latents, grad_extra_rows)
            grad_b_dec = difference.sum(0) * scale
            grad_x = difference * -scale if ctx.needs_input_grad[3] else None
        return grad_values, grad_W_dec.view(W_dec.shape), grad_b_dec, grad_x, *[None] * 5
