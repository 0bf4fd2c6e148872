"""The forward pass of a training SAE: by SAELens's own code, or for the top-k family by kernels that skip zeros."""

from functools import partial
from typing import Any, final

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor

from metasae_lightning import compute
from metasae_lightning.architectures.subspace import SubspaceTrainingSAE
from metasae_lightning.compute.gpu.encoder import LEAST_PADDED
from metasae_lightning.compute.process_group import Parallelism
from metasae_lightning.compute.sharding import all_reduce_sum, local, replicated, shard_offset
from metasae_lightning.errors import InputError
from metasae_lightning.sae.auxiliary_loss import auxiliary_loss, squared_error
from metasae_lightning.sae.forward_pass import BatchCut, ForwardPass, Keep, Kernels, coefficients_at
from metasae_lightning.sae.forward_result import ForwardResult
from metasae_lightning.sae.pretrained import AnySAE
from metasae_lightning.sae.running_threshold import update_threshold
from metasae_lightning.sae.subspace_forward import SubspaceForward
from metasae_lightning.step import Codes

# Exactly these classes: a subclass may compute something else, which the sparse kernels would not reproduce.
TOP_K_CLASSES = (TopKTrainingSAE, BatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE)

# The dimension of the latents in each parameter that can be sharded.
LATENTS = {"W_enc": 1, "b_enc": 0, "W_dec": 0}


def forward_pass_for(sae: AnySAE, kernels: Kernels, *, n_fixed_rows: int = 0) -> ForwardPass:
    """The sparse kernels for the top-k family and subspace SAEs where `kernels` is `sparse`, otherwise the SAE's own forward pass.

    `n_fixed_rows`: number of rows of a batch that holds the same, slowly moving rows at every call (decoder rows); 0 for new rows.
    """
    if kernels == "sparse" and type(sae) is SubspaceTrainingSAE:
        return SubspaceForward(sae)
    if kernels == "dense" or type(sae) not in TOP_K_CLASSES:
        return DenseForward(sae)
    return SparseForward(sae, compute.IncrementalTopK(n_fixed_rows) if n_fixed_rows else None)


@final
class DenseForward(ForwardPass):
    """SAELens's own forward pass."""

    def join(self, parallelism: Parallelism, cut: BatchCut) -> None:
        """Refuse a top-k over the batches of several ranks, which SAELens cannot compute."""
        ranks_batch = isinstance(self.sae, BatchTopKTrainingSAE) or getattr(self.sae.cfg, "batch_top", False)
        if ranks_batch and cut == "global" and not parallelism.world.is_single:
            raise InputError(
                f"SAELens's own {type(self.sae).__name__} ranks each process's batch separately: set kernels: sparse where it is one of "
                f"{', '.join(cls.__name__ for cls in TOP_K_CLASSES)}, or batch_cut: local"
            )

    def check_divisible(self) -> None:
        """Refuse: SAELens's code needs all latents."""
        raise InputError(
            f"latents are divided by the sparse kernels alone, got kernels: dense or a {type(self.sae).__name__}: set kernels: sparse, "
            f"and one of {', '.join(cls.__name__ for cls in TOP_K_CLASSES)}, or trainer.strategy: ddp"
        )

    def train(self, z: Tensor, *, dead: Tensor, step: int, fresh_gradients: bool) -> ForwardResult:
        """SAELens's training forward pass, its coefficients warmed up as SAELens's trainer does; `fresh_gradients` makes no difference."""
        coefficients = coefficients_at(self.sae, step)
        out = self.sae.training_forward_pass(
            TrainStepInput(sae_in=z, coefficients=coefficients, dead_neuron_mask=dead, n_training_steps=step, is_logging_step=False)
        )
        return ForwardResult(
            *(out.loss, out.losses, self._codes(out.feature_acts), lambda: out.sae_out.detach(), lambda: out.sae_out),
            latent_codes=lambda: Codes.from_dense(out.feature_acts, with_graph=True),
            error_weights=self.sae.error_weights(z) if hasattr(self.sae, "error_weights") else None,
        )

    def read(self, z: Tensor, *, reuse_support: bool = False, reuse_output: bool = False, keep: Keep | None = None) -> tuple[Codes, Tensor]:
        """SAELens's encoder and decoder, computed anew at each call; the first two options make no difference."""
        acts = self.sae.encode(z)
        codes = self._codes(acts)
        return codes, self.sae.decode(acts if keep is None else self.units.select(acts, codes, keep(codes)))

    def _codes(self, acts: Tensor) -> Codes:
        """The codes of the SAE's units."""
        return Codes.from_dense(self.units.activations(acts))


@final
class SparseForward(ForwardPass):
    """The same function and the same gradients as SAELens's top-k, batch top-k and matryoshka SAEs, computed without the zeros.

    With `rescale_acts_by_decoder_norm`, SAELens multiplies activations by the decoder rows' norms before the top-k and divides by them
    before decoding: here the norms take part in the ranking and in the returned codes only.
    """

    def __init__(self, sae: AnySAE, incremental_topk: compute.IncrementalTopK | None = None) -> None:
        super().__init__(sae)
        self.incremental_topk = incremental_topk
        # The smallest activation that the last top-k kept, where the next search begins.
        self.last_cut: float | Tensor | None = None
        self.cut_factor = compute.CutFactor()
        self.padded_dead = 0
        """On a GPU, the number of dead latents of the last training batch with their padding."""
        self.has_static_shapes = True
        """Whether the shapes of the last batch did not depend on the number of dead latents, apart from their padding."""
        self._gradients = compute.BufferPool()
        # Fixed rows are overwritten in place. The rows of a new batch are not: the previous ones may still be in use.
        self._rows = compute.BufferPool() if incremental_topk is not None else None
        self._level_ends: Tensor | None = None
        self._rows_of_support = 0

    def join(self, parallelism: Parallelism, cut: BatchCut) -> None:
        """Rank the activations of all ranks' batches together, or of this rank's batch; latents may be sharded in both cases."""
        self.parallelism = parallelism if cut == "global" else parallelism.tensor_only

    def check_divisible(self) -> None:
        """Raise nothing: this forward pass works on a shard of the latents, because kernels look up at each call which latents it has."""

    def train(self, z: Tensor, *, dead: Tensor, step: int, fresh_gradients: bool) -> ForwardResult:
        """The architecture's mean squared errors and its auxiliary loss on the dead latents; a threshold is updated as SAELens does."""
        W_dec, b_dec = local(self.sae.W_dec), local(self.sae.b_dec)
        z, ranks = z.to(W_dec.dtype), self.parallelism.tensor_group
        encoded = self._encode(z, dead[self._first :][: len(W_dec)], fresh_gradients)
        dead_latents = encoded.extra_latents
        any_dead = len(dead_latents) > 0 if ranks.is_single else bool(dead.any())
        buffers = self._gradients if fresh_gradients else None
        if len(self._widths) == 1:
            row_buffers = self._rows if fresh_gradients else None
            error, difference, dead_rows = compute.squared_error(
                encoded.values, encoded.pattern, W_dec, b_dec, z, dead_latents, buffers, row_buffers, ranks
            )
            losses, residuals = {"mse_loss": error}, [difference.neg()] if any_dead else []
        else:
            reconstructions, dead_rows = self._decode_levels(encoded, dead_latents, W_dec, b_dec, buffers)
            losses, residuals = {"mse_loss": squared_error(reconstructions[-1], z)}, list(z - reconstructions.detach())
            difference = reconstructions[-1].detach() - z
            inner = zip(self._widths[:-1], reconstructions, strict=False)
            losses |= {f"inner_mse_loss_{width}": squared_error(reconstruction, z) for width, reconstruction in inner}
        first, *inner_losses = losses.values()
        loss = sum(inner_losses, start=first)
        losses["auxiliary_reconstruction_loss"] = z.new_zeros(())
        if any_dead:
            widths = self._auxiliary_widths
            auxiliary = self.sae.cfg.aux_loss_coefficient * auxiliary_loss(
                residuals[-len(widths) :], encoded, dead_rows, widths=widths, first_latent=self._first, norms=self._norms, ranks=ranks
            )
            losses["auxiliary_reconstruction_loss"], loss = auxiliary, loss + auxiliary
        codes = self._codes(encoded)
        if isinstance(self.sae, BatchTopKTrainingSAE) and encoded.threshold is not None:
            update_threshold(self.sae, encoded.threshold, may_be_infinite=not self.parallelism.world.is_single)

        def differentiable() -> Tensor:
            return compute.decode(encoded.values, encoded.pattern, W_dec)[0] + b_dec

        latent_codes = partial(self._codes, encoded, with_graph=True)
        return ForwardResult(loss, losses, codes, lambda: z + difference, differentiable, latent_codes)

    @torch.no_grad()
    def read(self, z: Tensor, *, reuse_support: bool = False, reuse_output: bool = False, keep: Keep | None = None) -> tuple[Codes, Tensor]:
        """Codes and reconstruction by top-k.

        With `reuse_support`, the latents that were active in the previous such call are active again; top-k chooses them if there was no
        such call, or its batch was larger. With `reuse_output`, the reconstruction lies in a buffer that all SAEs of the process share,
        and is valid until the next such call of any of them.
        """
        z, support = z.to(self.sae.W_dec.dtype), self.cached_support if reuse_support else None
        if support is not None and len(z) < (self._rows_of_support or int(support[0].amax()) + 1):
            support = None  # cached for a larger batch, hence for other rows
        encoded = self._encode(z, None, fresh_gradients=True) if support is None else self._encode_support(z, *support)
        if reuse_support:
            self.cached_support, self._rows_of_support = (encoded.pattern.rows, encoded.pattern.columns), len(z)
        with torch.autocast(z.device.type, enabled=False):
            buffer = compute.SHARED.get("rebuilt", z.shape, encoded.values) if reuse_output else None
            codes = self._codes(encoded)
            values = encoded.values if keep is None else encoded.values * keep(codes)
            reconstruction = encoded.pattern.product(values, local(self.sae.W_dec), buffer)
            self.parallelism.tensor_group.all_reduce_sum_(reconstruction)
            return codes, reconstruction.add_(local(self.sae.b_dec))

    def _encode(self, z: Tensor, dead: Tensor | None, fresh_gradients: bool) -> compute.Encoded:
        """The top-k activations, and the pre-activations of the latents in the mask `dead` on every row."""
        sae = self.sae
        rule = compute.TopKRule(
            sae.cfg.k, self.is_per_row, self.last_cut, self.cut_factor, self.incremental_topk, parallelism=self.parallelism
        )
        # Padding is left out where the host needs the dead latents' number: of each level, or of each rank.
        if dead is not None and len(self._auxiliary_widths) == 1 and self.parallelism.tensor_group.is_single:
            rule.padded_extra = self.padded_dead
        origin = replicated(local(sae.b_dec), self.parallelism.tensor_group) if sae.cfg.apply_b_dec_to_input else None
        buffers: dict[str, Any] = {"gradients": self._gradients, "rows": self._rows} if fresh_gradients else {}
        encoded = compute.encode(z, local(sae.W_enc), local(sae.b_enc), rule, origin=origin, scale=self._norms, extra=dead, **buffers)
        self.last_cut = encoded.threshold
        if rule.padded_extra is not None:  # the smallest padding suits a batch without dead latents too
            self.padded_dead = len(encoded.extra_latents) or min(self.padded_dead, LEAST_PADDED)
        if dead is not None:
            self.has_static_shapes = rule.padded_extra is not None or not len(encoded.extra_latents)
        return encoded

    def _encode_support(self, z: Tensor, rows: Tensor, columns: Tensor) -> compute.Encoded:
        """The activations of given rows and latents alone, without top-k."""
        sae, columns = self.sae, columns.to(z.device)
        pattern = compute.Pattern(rows.to(z.device), columns, (len(z), sae.cfg.d_sae))
        z = z - sae.b_dec if sae.cfg.apply_b_dec_to_input else z
        values = pattern.sampled(z, sae.W_enc.T.contiguous()) + sae.b_enc[columns]
        return compute.Encoded(values.relu(), pattern, columns[:0], z.new_empty(len(z), 0), None)

    def _decode_levels(
        self, encoded: compute.Encoded, dead_latents: Tensor, W_dec: Tensor, b_dec: Tensor, buffers: compute.BufferPool | None
    ) -> tuple[Tensor, Tensor]:
        """The reconstruction by the latents below each matryoshka width (the last by all latents), and the dead latents' decoder rows."""
        if self._level_ends is None or self._level_ends.device != W_dec.device:
            self._level_ends = torch.tensor(self._widths, device=W_dec.device) - self._first
        pattern, order = _split_by_level(encoded.pattern, self._level_ends)
        reconstructions, dead_rows = compute.decode(encoded.values[order], pattern, W_dec, dead_latents, buffers)
        reconstructions = all_reduce_sum(reconstructions, self.parallelism.tensor_group)
        return reconstructions.view(len(self._widths), -1, reconstructions.shape[1]).cumsum(0) + b_dec, dead_rows

    @property
    def is_per_row(self) -> bool:
        """Whether each row has k active latents, and not the batch `k` per row on average."""
        return not isinstance(self.sae, BatchTopKTrainingSAE)

    @property
    def _norms(self) -> Tensor | None:
        """The norms of the decoder rows, where the architecture ranks activations times norms."""
        return local(self.sae.W_dec).detach().norm(dim=-1) if self.sae.cfg.rescale_acts_by_decoder_norm else None

    @property
    def _first(self) -> int:
        """Index of the first latent of this rank's shard."""
        return shard_offset(self.sae.W_dec, self.parallelism.tensor_group)

    @property
    def _widths(self) -> list[int]:
        """The matryoshka widths; for other architectures the number of latents alone."""
        return getattr(self.sae.cfg, "matryoshka_widths", [self.sae.cfg.d_sae])

    @property
    def _auxiliary_widths(self) -> list[int]:
        """The widths whose dead latents have an auxiliary loss each."""
        return self._widths if getattr(self.sae.cfg, "use_matryoshka_aux_loss", False) else self._widths[-1:]

    def _codes(self, encoded: compute.Encoded, *, with_graph: bool = False) -> Codes:
        """The activations as SAELens reports them: times the decoder rows' norms, where the architecture multiplies by them."""
        values, norms = encoded.values.detach(), self._norms
        if with_graph:
            values, norms = encoded.values, None if norms is None else local(self.sae.W_dec).norm(dim=-1)
        scaled = values if norms is None else values * norms[encoded.pattern.columns]
        return Codes(encoded.pattern.rows, encoded.pattern.columns, scaled, encoded.pattern.shape)


def _split_by_level(pattern: compute.Pattern, widths: Tensor) -> tuple[compute.Pattern, Tensor]:
    """A pattern of `levels x rows` rows, level by level, and the nonzeros' new order.

    A level's rows hold the nonzeros of its own latents: those from the last level's width up to its own.
    """
    level = torch.bucketize(pattern.columns, widths, right=True)
    rows, order = (level * pattern.shape[0] + pattern.rows).sort(stable=True)
    return compute.Pattern(rows, pattern.columns[order], (len(widths) * pattern.shape[0], pattern.shape[1])), order
