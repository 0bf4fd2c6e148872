"""Sparse encoding and decoding with hand-written backward passes.

An SAE with `k` active latents of `d_sae` decodes, and computes gradients for, a fraction `k / d_sae` of its activation matrix. Only the
product with the encoder is dense.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from metasae_lightning.compute.buffers import BufferPool, buffer_or_new
from metasae_lightning.compute.gpu.encoder import GpuEncoder
from metasae_lightning.compute.gpu.topk import CutFactor
from metasae_lightning.compute.process_group import SINGLE, Parallelism, ProcessGroup
from metasae_lightning.compute.row_chunks import is_blocked, row_chunks
from metasae_lightning.compute.sparse_matrix import Pattern
from metasae_lightning.compute.topk import BlockwiseEncoder, TopK
from metasae_lightning.compute.topk_groups import GroupEncoder, GroupRule
from metasae_lightning.compute.topk_incremental import IncrementalTopK


class Encoded(NamedTuple):
    """The active latents of a batch."""

    values: Float[Tensor, " nnz"]
    """Their activations, before any scale."""
    pattern: Pattern
    """Their rows and latents."""
    extra_latents: Int[Tensor, " extra"]
    """The latents of the mask `extra`, and padding after them where `n_extra` is not None."""
    extra_pre_acts: Float[Tensor, "row extra"]
    """Pre-activations of the extra latents on every row, before any scale."""
    threshold: float | Tensor | None
    """The smallest active value, with its scale, over all ranks; None if top-k runs per row or nothing is active.

    On a GPU it is a tensor, which the host need not wait for; with several ranks it is infinite where nothing is active.
    """
    n_extra: Float[Tensor, ""] | None = None
    """The number of extra latents before their padding; None where there is no padding."""


@dataclass
class TopKRule:
    """Which latents are active: with `per_row` the `k` largest positive of each row, else the `k * rows` largest of the batch."""

    k: float
    per_row: bool
    hint: float | Tensor | None = None
    """The threshold of the last batch, where the search starts. It changes the time, not the result."""
    cut_factor: CutFactor = field(default_factory=CutFactor)
    """On a GPU, where the search starts as a fraction of `hint`; the search updates it."""
    incremental: IncrementalTopK | None = None
    """Incremental search, for rows that move little from one batch to the next."""
    padded_extra: int | None = None
    """On a GPU, the number of extra latents of the last batch with their padding; None leaves the padding out."""
    parallelism: Parallelism = field(default_factory=Parallelism)
    """Its `world`: the ranks whose batches share one threshold. Its `tensor_group`: the ranks with other latents of the same rows."""


def encode(
    x: Float[Tensor, "row d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    rule: TopKRule | GroupRule,
    *,
    origin: Float[Tensor, " d_in"] | None = None,
    scale: Float[Tensor, " d_sae"] | None = None,
    extra: Bool[Tensor, " d_sae"] | None = None,
    gradients: BufferPool | None = None,
    rows: BufferPool | None = None,
) -> Encoded:
    """The top-k latents of `((x - origin) W_enc + b_enc) * scale`, and the pre-activations of the latents in the mask `extra`.

    With a `GroupRule` they are the latents of the top-k groups, whose activations are signed, and there is no `scale`.
    `scale` affects the ranking and the threshold, not the returned activations, and gets no gradient. Under autocast the product with
    `W_enc` uses the lower precision, and everything else uses the precision of the weights. The pool `gradients` holds the gradient of
    `W_enc`, and the pool `rows` holds `x - origin`; earlier results of these names in the pools are overwritten.
    """
    found: list[tuple[Pattern, Tensor, float | Tensor | None, Tensor | None]] = []
    values, extra_pre_acts = _Encode.apply(x, W_enc, b_enc, origin, extra, scale, rule, gradients, rows, found)  # type: ignore[misc]
    pattern, extra_latents, threshold, n_extra = found[0]
    return Encoded(values, pattern, extra_latents, extra_pre_acts, threshold, n_extra)


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

    The forward pass appends the pattern, the extra latents, the threshold and the number of extra latents to the list `found`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        origin: Tensor | None,
        extra: Tensor | None,
        scale: Tensor | None,
        rule: TopKRule | GroupRule,
        gradient_buffers: BufferPool | None,
        row_buffers: BufferPool | None,
        found: list[tuple[Pattern, Tensor, float | Tensor | None, Tensor | None]],
    ) -> tuple[Tensor, Tensor]:
        x = x if origin is None else torch.sub(x, origin, out=buffer_or_new(row_buffers, "x", x.shape, x))
        encoder, selected = _select(x, W_enc, b_enc, scale, extra, rule)
        ctx.pattern = Pattern(selected.rows, selected.columns, (len(x), W_enc.shape[1]))
        n_extra = encoder.n_extra if isinstance(encoder, GpuEncoder) else None
        found.append((ctx.pattern, encoder.extra_latents, selected.threshold, n_extra))
        ctx.save_for_backward(x, W_enc, encoder.extra_latents)
        ctx.has_origin, ctx.gradient_buffers = origin is not None, gradient_buffers
        ctx.set_materialize_grads(False)
        return selected.values, encoder.extra_pre_acts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W_enc, extra_latents = ctx.saved_tensors
        pattern, grad_extra = ctx.pattern, gradients[1]
        grad_values = x.new_zeros(len(pattern.rows)) if gradients[0] is None else gradients[0]
        with torch.autocast(x.device.type, enabled=False):
            if is_blocked(x):
                grad_b_enc = grad_values.new_zeros(W_enc.shape[1]).index_add_(0, pattern.columns, grad_values)
                buffer = buffer_or_new(ctx.gradient_buffers, "W_enc", W_enc.shape, grad_values)
                grad_W_enc = pattern.left_product(x, grad_values, buffer)
            else:
                transposed, grad_b_enc = pattern.column_gradients(grad_values, x)
                grad_W_enc = transposed.T
            if grad_extra is not None:
                grad_b_enc.index_add_(0, extra_latents, grad_extra.sum(0))
                grad_W_enc.index_add_(1, extra_latents, x.T @ grad_extra)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = pattern.product(grad_values, W_enc.T.contiguous())
                grad_x = grad_x if grad_extra is None else grad_x + grad_extra @ W_enc[:, extra_latents].T
            grad_origin = torch.addmv(W_enc.new_empty(len(W_enc)), W_enc, grad_b_enc, beta=0, alpha=-1) if ctx.has_origin else None
        # A view is a new tensor object: autograd then stores it as the parameter's gradient without a copy.
        return grad_x, grad_W_enc.view(W_enc.shape), grad_b_enc, grad_origin, *[None] * 6


def _select(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None, extra: Tensor | None, rule: TopKRule | GroupRule
) -> tuple[BlockwiseEncoder | GpuEncoder | GroupEncoder, TopK]:
    """The encoder of the batch's device or of groups, which has the extra latents, and the active latents."""
    if isinstance(rule, GroupRule):
        group_encoder = GroupEncoder(
            x, W_enc, b_enc, torch.empty(0, dtype=torch.long, device=x.device) if extra is None else extra.nonzero().flatten()
        )
        return group_encoder, group_encoder.top_k(rule)
    if not is_blocked(x):
        gpu_encoder = GpuEncoder(x, W_enc, b_enc, scale, extra, rule.parallelism, padded_extra=rule.padded_extra)
        hint = rule.hint if isinstance(rule.hint, Tensor) and rule.hint.device == x.device else None
        return gpu_encoder, gpu_encoder.top_k(rule.k, per_row=rule.per_row, hint=hint, cut_factor=rule.cut_factor)
    encoder = BlockwiseEncoder(x, W_enc, b_enc, scale, extra, rule.parallelism)
    if rule.incremental is not None and not rule.per_row and rule.incremental.supports(encoder):
        return encoder, rule.incremental.top_k(encoder, int(rule.k * len(x)))
    return encoder, encoder.top_k(rule.k, per_row=rule.per_row, hint=None if rule.hint is None else float(rule.hint))


class _Decode(torch.autograd.Function):
    """Product of a sparse activation matrix with the decoder."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, W_dec: Tensor, extra_latents: Tensor, pattern: Pattern, gradient_buffers: BufferPool | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(values, W_dec, extra_latents)
        ctx.pattern, ctx.gradient_buffers = pattern, gradient_buffers
        ctx.set_materialize_grads(False)
        with torch.autocast(W_dec.device.type, enabled=False):
            return pattern.product(values, W_dec), _rows_of(W_dec, extra_latents)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, W_dec, extra_latents = ctx.saved_tensors
        grad_product = W_dec.new_zeros(ctx.pattern.shape[0], W_dec.shape[1]) if gradients[0] is None else gradients[0].contiguous()
        grad_extra_rows = gradients[1]
        grad_values = grad_W_dec = None
        with torch.autocast(W_dec.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_values = ctx.pattern.sampled(grad_product, W_dec)
            if ctx.needs_input_grad[1]:
                buffer = buffer_or_new(ctx.gradient_buffers, "W_dec", W_dec.shape, values)
                grad_W_dec = ctx.pattern.transposed_product(values, grad_product, buffer)
                grad_W_dec = _add_rows(grad_W_dec, extra_latents, grad_extra_rows).view(W_dec.shape)
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
        sampled = None
        with torch.autocast(W_dec.device.type, enabled=False):
            if not is_blocked(x) and tensor_group.is_single:
                difference, sampled, total = pattern.reconstruction_error(values, W_dec, b_dec, x)
            else:
                difference = pattern.product(values, W_dec, buffer_or_new(row_buffers, "difference", x.shape, values))
                tensor_group.all_reduce_sum_(difference)
                total = values.new_zeros(())
                for difference_rows, x_rows in row_chunks(difference, x):
                    flat = difference_rows.add_(b_dec).sub_(x_rows).flatten()
                    total += flat.dot(flat)
        ctx.save_for_backward(values, W_dec, difference, extra_latents, sampled)
        ctx.pattern, ctx.gradient_buffers = pattern, gradient_buffers
        ctx.mark_non_differentiable(difference)
        ctx.set_materialize_grads(False)
        return total / max(len(x), 1), difference, _rows_of(W_dec, extra_latents)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, W_dec, difference, extra_latents, sampled = ctx.saved_tensors
        grad_total = values.new_zeros(()) if gradients[0] is None else gradients[0]
        scale = grad_total * (2 / max(len(difference), 1))
        with torch.autocast(W_dec.device.type, enabled=False):
            sampled = ctx.pattern.sampled(difference, W_dec) if sampled is None else sampled
            grad_values, scaled_values = torch.ops.aten._foreach_mul.Tensor([sampled, values], scale)
            buffer = buffer_or_new(ctx.gradient_buffers, "W_dec", W_dec.shape, values)
            grad_W_dec = ctx.pattern.transposed_product(scaled_values, difference, buffer)
            grad_W_dec = _add_rows(grad_W_dec, extra_latents, gradients[2])
            grad_b_dec = difference.sum(0) * scale
            grad_x = difference * -scale if ctx.needs_input_grad[3] else None
        return grad_values, grad_W_dec.view(W_dec.shape), grad_b_dec, grad_x, *[None] * 5


def _rows_of(matrix: Tensor, indices: Tensor) -> Tensor:
    """The rows of these indices."""
    return matrix.index_select(0, indices) if len(indices) else matrix.new_empty(0, matrix.shape[1])


def _add_rows(matrix: Tensor, indices: Tensor, rows: Tensor | None) -> Tensor:
    """The matrix with `rows` added, in place, to its rows of these indices; None adds nothing."""
    return matrix if rows is None else matrix.index_add_(0, indices, rows)
