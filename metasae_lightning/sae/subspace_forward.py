"""The forward pass of a subspace-aware SAE without the latents of inactive groups."""

from typing import Any, final

import torch
from torch import Tensor

from metasae_lightning import compute
from metasae_lightning.compute.process_group import Parallelism
from metasae_lightning.compute.topk_groups import GroupRule
from metasae_lightning.errors import InputError
from metasae_lightning.functional.subspaces import group_norms
from metasae_lightning.sae.forward_pass import BatchCut, ForwardPass, Keep, coefficients_at
from metasae_lightning.sae.forward_result import ForwardResult
from metasae_lightning.sae.pretrained import AnySAE
from metasae_lightning.sae.running_threshold import update_threshold
from metasae_lightning.step import Codes


@final
class SubspaceForward(ForwardPass):
    """The same function and the same gradients as `SubspaceTrainingSAE`, computed without the zeros.

    The product with the encoder is dense. Decoding and all gradients use the `k * group_size` activations of a token alone.
    """

    def __init__(self, sae: AnySAE) -> None:
        super().__init__(sae)
        self._gradients = compute.BufferPool()

    def join(self, parallelism: Parallelism, cut: BatchCut) -> None:
        """Rank the groups of all ranks' batches together, or of this rank's batch."""
        self.parallelism = parallelism if cut == "global" else parallelism.tensor_only

    def check_divisible(self) -> None:
        """Refuse: the search for groups needs all latents."""
        raise InputError("the latents of a subspace SAE cannot be divided among ranks: set trainer.strategy: ddp")

    def train(self, z: Tensor, *, dead: Tensor, step: int, fresh_gradients: bool) -> ForwardResult:
        """The squared error, the nuclear norm and the auxiliary loss; with `batch_top` the threshold is updated."""
        sae, cfg = self.sae, self.sae.cfg
        z, buffers = z.to(sae.W_dec.dtype), self._gradients if fresh_gradients else None
        encoded = self._encode(z, dead.repeat_interleave(cfg.group_size), buffers)
        error, difference, dead_rows = compute.squared_error(
            encoded.values, encoded.pattern, sae.W_dec, sae.b_dec, z, encoded.extra_latents, buffers
        )
        losses = {
            "mse_loss": error,
            "nuclear_loss": sae.nuclear_loss(coefficients_at(sae, step)["nuclear"]),
            "auxiliary_reconstruction_loss": sae.auxiliary_loss(encoded.extra_pre_acts, dead_rows, difference.neg()),
        }
        if cfg.batch_top and encoded.threshold is not None:
            update_threshold(sae, encoded.threshold, may_be_infinite=not self.parallelism.world.is_single)

        def differentiable() -> Tensor:
            return compute.decode(encoded.values, encoded.pattern, sae.W_dec)[0] + sae.b_dec

        def latent_codes() -> Codes:
            return Codes(encoded.pattern.rows, encoded.pattern.columns, encoded.values, encoded.pattern.shape)

        loss = sum(losses.values(), z.new_zeros(()))
        return ForwardResult(loss, losses, self._codes(encoded), lambda: z + difference, differentiable, latent_codes)

    @torch.no_grad()
    def read(self, z: Tensor, *, reuse_support: bool = False, reuse_output: bool = False, keep: Keep | None = None) -> tuple[Codes, Tensor]:
        """Codes of groups and reconstruction; groups are ranked at every call, so `reuse_support` makes no difference."""
        sae, z = self.sae, z.to(self.sae.W_dec.dtype)
        encoded = self._encode(z, None, None)
        codes, values = self._codes(encoded), encoded.values
        if keep is not None:
            values = values * keep(codes).repeat_interleave(sae.cfg.group_size)
        with torch.autocast(z.device.type, enabled=False):
            buffer = compute.SHARED.get("rebuilt", z.shape, values) if reuse_output else None
            return codes, encoded.pattern.product(values, sae.W_dec, buffer).add_(sae.b_dec)

    def _encode(self, z: Tensor, dead: Tensor | None, buffers: Any) -> compute.Encoded:
        """The activations of the active groups, and the pre-activations of the latents in the mask `dead` on every row."""
        sae, cfg = self.sae, self.sae.cfg
        rule = GroupRule(cfg.k, cfg.group_size, not cfg.batch_top, self.parallelism)
        origin = sae.b_dec if cfg.apply_b_dec_to_input else None
        return compute.encode(z, sae.encoder(), sae.b_enc, rule, origin=origin, extra=dead, gradients=buffers)

    def _codes(self, encoded: compute.Encoded) -> Codes:
        """The codes of groups: the latents of a group are neighbours among the nonzeros."""
        size, pattern = self.sae.cfg.group_size, encoded.pattern
        norms = group_norms(encoded.values.detach()[None], size)[0]
        return Codes(pattern.rows[::size], pattern.columns[::size] // size, norms, (pattern.shape[0], self.units.count))
