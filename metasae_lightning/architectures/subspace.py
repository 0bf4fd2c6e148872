"""The subspace-aware SAE (SASA, arXiv 2606.06333): groups of latents that are gated as one, each of which spans a subspace."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from sae_lens import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig, register_sae_class, register_sae_training_class
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata, TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from torch.nn.functional import normalize

from metasae_lightning.errors import InputError
from metasae_lightning.functional.subspaces import composition_norm, group_norms, nuclear_norm, top_groups


class TopGroups(nn.Module):
    """Keeps the activations of the `k` groups of each token with the largest norms, or of the `k * tokens` such groups of a batch.

    >>> TopGroups(1, 2, of_batch=False)(torch.tensor([[3.0, -4.0, 0.0, 2.0]])).tolist()
    [[3.0, -4.0, 0.0, 0.0]]
    """

    def __init__(self, k: float, group_size: int, *, of_batch: bool) -> None:
        super().__init__()
        self.k, self.group_size, self.of_batch = k, group_size, of_batch

    def forward(self, hidden_pre: Float[Tensor, "*token d_sae"]) -> Float[Tensor, "*token d_sae"]:
        """The pre-activations with those of other groups set to 0; negative ones are kept."""
        norms = group_norms(hidden_pre.detach().flatten(0, -2), self.group_size)
        mask = top_groups(norms, self.k, of_batch=self.of_batch).repeat_interleave(self.group_size, 1)
        return hidden_pre * mask.view_as(hidden_pre)


@dataclass
class SubspaceSAEConfig(SAEConfig):
    """Inference config of a subspace-aware SAE.

    Args:
        k: Number of active groups of a token.
        group_size: Number of latents of a group, r; `d_sae` is a multiple of it.
        batch_top: Whether a group is active where its norm exceeds its threshold. If not, each token has `k` active groups.
    """

    has_signed_codes: ClassVar[bool] = True

    k: float = 10
    group_size: int = 6
    batch_top: bool = False
    metadata: Any = field(default_factory=SAEMetadata)  # SAELens passes a dictionary first where it reads a config

    @classmethod
    def architecture(cls) -> str:
        """SAELens's name of the architecture."""
        return "subspace"


class SubspaceSAE(SAE[SubspaceSAEConfig]):
    """Inference SAE with groups: `u = (x - b_dec) W_enc + b_enc`, of which the active groups are decoded."""

    b_enc: nn.Parameter
    threshold: Tensor
    """The norm of each group above which it is active; with `batch_top` only."""

    def initialize_weights(self) -> None:
        """SAELens's weights, the encoder's bias, and the thresholds of groups."""
        super().initialize_weights()
        cfg = self.cfg
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, dtype=self.dtype, device=self.device))
        if cfg.batch_top:
            self.threshold = nn.Parameter(torch.zeros(cfg.d_sae // cfg.group_size, dtype=self.dtype, device=self.device))

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        """The rule without thresholds: the `k` groups of largest norm."""
        return TopGroups(self.cfg.k, self.cfg.group_size, of_batch=False)

    def threshold_scores(self, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row group"]:
        """The norms that are compared with the thresholds."""
        return group_norms(self.process_sae_in(x) @ self.W_enc + self.b_enc, self.cfg.group_size)

    def encode(self, x: Tensor) -> Tensor:
        """Signed activations of the latents; those of inactive groups are 0."""
        hidden_pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        if not self.cfg.batch_top:
            return self.hook_sae_acts_post(self.activation_fn(hidden_pre))
        is_active = group_norms(hidden_pre.flatten(0, -2), self.cfg.group_size) > self.threshold
        mask = is_active.repeat_interleave(self.cfg.group_size, 1).view_as(hidden_pre)
        return self.hook_sae_acts_post(hidden_pre * mask)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """The reconstruction."""
        reconstruction = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(reconstruction), self.d_head)


@dataclass
class SubspaceTrainingSAEConfig(TrainingSAEConfig):
    """Training config of a subspace-aware SAE (SASA, arXiv 2606.06333): K = d_sae / group_size groups of group_size latents.

    Args:
        k: Number of active groups of a token, s; with `batch_top` their mean over a batch, which may be a fraction.
        group_size: Number of latents of a group, r; `d_sae` is a multiple of it.
        batch_top: Whether the groups of a whole batch are ranked together, and inference has a threshold. If not, each token has `k`.
        k_aux: Most latents of dead groups that reconstruct the residual of a token.
        aux_loss_coefficient: Weight of that reconstruction's squared error.
        nuclear_coefficient: Weight of the mean nuclear norm of groups; the squared error is summed over d_in.
        nuclear_target: `decoder`: the nuclear norm of each group's decoder rows; `composition`: that of its encoder times its decoder.
        nuclear_warm_up_steps: Steps over which the weight of the nuclear norm rises from 0.
        unit_encoder: Whether columns of `W_enc` are divided by their lengths in the forward pass.
        topk_threshold_lr: Rate of the running threshold that `batch_top` has.
    """

    has_signed_codes: ClassVar[bool] = True

    k: float = 10
    group_size: int = 6
    batch_top: bool = False
    k_aux: int = 512
    aux_loss_coefficient: float = 1.0
    nuclear_coefficient: float = 1.0
    nuclear_target: Literal["decoder", "composition"] = "decoder"
    nuclear_warm_up_steps: int = 0
    unit_encoder: bool = True
    topk_threshold_lr: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 1 or self.d_sae % self.group_size:
            raise InputError(f"d_sae must be a multiple of group_size, got {self.d_sae} and {self.group_size}")
        n_groups = self.d_sae // self.group_size
        if not 0 < self.k <= n_groups or not (self.batch_top or float(self.k).is_integer()):
            demand = f"k counts active groups: a whole number from 1 to d_sae / group_size = {n_groups}, a fraction only with batch_top"
            raise InputError(f"{demand}, got {self.k}")
        if min(self.k_aux, self.aux_loss_coefficient, self.nuclear_coefficient) < 0:
            coefficients = f"{self.k_aux}, {self.aux_loss_coefficient} and {self.nuclear_coefficient}"
            raise InputError(f"k_aux, aux_loss_coefficient and nuclear_coefficient must not be negative, got {coefficients}")

    @classmethod
    def architecture(cls) -> str:
        """SAELens's name of the architecture."""
        return "subspace"


class SubspaceTrainingSAE(TrainingSAE[SubspaceTrainingSAEConfig]):
    """Training SAE with groups.

    The loss is the squared error, plus the nuclear norm of groups times its coefficient, plus the error with which latents of dead groups
    reconstruct the residual. Unit decoder rows are the trainer's `decoder_rows: unit`, and the layer norm of activations is its normaliser,
    so all terms of the loss are in normalised space.
    """

    b_enc: nn.Parameter
    topk_threshold: Tensor
    """Running mean of the smallest active norm of a batch; with `batch_top` only."""

    def __init__(self, cfg: SubspaceTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        if cfg.batch_top:
            self.register_buffer("topk_threshold", torch.zeros((), dtype=torch.float64, device=self.W_dec.device))

    def initialize_weights(self) -> None:
        """SAELens's weights, in which the encoder is the decoder's transpose, and the encoder's bias."""
        super().initialize_weights()
        self.b_enc = nn.Parameter(torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device))

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        """The `k` groups of largest norm of a token, or of a batch."""
        return TopGroups(self.cfg.k, self.cfg.group_size, of_batch=self.cfg.batch_top)

    def encoder(self) -> Float[Tensor, "d_in d_sae"]:
        """The encoder that the forward pass uses: `W_enc`, with unit columns where the config says so."""
        return normalize(self.W_enc, dim=0) if self.cfg.unit_encoder else self.W_enc

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Signed activations of the active groups, and all pre-activations."""
        hidden_pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.encoder() + self.b_enc)
        return self.hook_sae_acts_post(self.activation_fn(hidden_pre)), hidden_pre

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """The weight of the nuclear norm."""
        return {"nuclear": TrainCoefficientConfig(self.cfg.nuclear_coefficient, self.cfg.nuclear_warm_up_steps)}

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """The nuclear norm and the auxiliary error, each with its weight."""
        auxiliary = sae_out.new_zeros(())
        if (dead := step_input.dead_neuron_mask) is not None:
            latents = self.latents_of(dead)
            residual = (step_input.sae_in - sae_out).detach()
            auxiliary = self.auxiliary_loss(hidden_pre[:, latents], self.W_dec[latents], residual)
        return {"nuclear_loss": self.nuclear_loss(step_input.coefficients["nuclear"]), "auxiliary_reconstruction_loss": auxiliary}

    def latents_of(self, groups: Tensor) -> Int[Tensor, " latent"]:
        """Indices of the latents of the groups in a mask."""
        return groups.repeat_interleave(self.cfg.group_size).nonzero().flatten()

    def nuclear_loss(self, coefficient: float) -> Float[Tensor, ""]:
        """The mean nuclear norm of groups, times its coefficient."""
        if coefficient == 0:
            return self.W_dec.new_zeros(())
        # Squares of singular values need full precision.
        with torch.autocast(self.W_dec.device.type, enabled=False):
            decoders = self.W_dec.unflatten(0, (-1, self.cfg.group_size))
            if self.cfg.nuclear_target == "decoder":
                return coefficient * nuclear_norm(decoders)
            return coefficient * composition_norm(self.encoder().T.unflatten(0, (-1, self.cfg.group_size)), decoders)

    def auxiliary_loss(
        self, pre_acts: Float[Tensor, "row dead"], dead_rows: Float[Tensor, "dead d_in"], residual: Float[Tensor, "row d_in"]
    ) -> Float[Tensor, ""]:
        """The squared error with which the largest pre-activations of dead latents reconstruct the residual, times its coefficient.

        There are `k = min(k_aux, dead latents, d_in // 2)` of them on each row. The published scale `min(dead latents / k, 1)` is 1 for
        every k. Pre-activations are signed, as in the published code. That the largest signed ones are taken is our reading.
        """
        k = min(self.cfg.k_aux, len(dead_rows), self.cfg.d_in // 2)
        if k == 0:
            return residual.new_zeros(())
        if k < len(dead_rows):
            chosen = pre_acts.detach().topk(k, sorted=False).indices
            pre_acts = pre_acts * torch.zeros_like(pre_acts).scatter(1, chosen, 1.0)
        return self.cfg.aux_loss_coefficient * (pre_acts @ dead_rows - residual).square().sum(-1).mean()

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """SAELens's training forward pass, after which the running threshold moves towards the batch's smallest active norm."""
        output = super().training_forward_pass(step_input)
        if self.cfg.batch_top:
            norms = group_norms(output.feature_acts.detach(), self.cfg.group_size)
            if (active := norms[norms > 0]).numel():
                self.topk_threshold.lerp_(active.min().to(self.topk_threshold), self.cfg.topk_threshold_lr)
        return output

    @torch.no_grad()
    def _store_unit_encoder(self) -> None:
        """Make `W_enc` the encoder that the forward pass uses, before it is scaled or written."""
        self.W_enc.data = self.encoder().detach()
        self.cfg.unit_encoder = False

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Fold a factor of the activations into the weights; columns of the encoder no longer have length 1 then."""
        self._store_unit_encoder()
        super().fold_activation_norm_scaling_factor(scaling_factor)

    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        """Fold a whitening of the activations into the weights; columns of the encoder no longer have length 1 then."""
        self._store_unit_encoder()
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """The encoder as the forward pass uses it, and the running threshold as a threshold of each group."""
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict["W_enc"] = self.encoder().detach().contiguous()
        if self.cfg.batch_top:
            threshold = state_dict.pop("topk_threshold").item()
            state_dict["threshold"] = torch.full_like(self.b_enc[:: self.cfg.group_size], threshold)


if SubspaceTrainingSAEConfig.architecture() not in SAE_TRAINING_CLASS_REGISTRY:
    register_sae_class("subspace", SubspaceSAE, SubspaceSAEConfig)
    register_sae_training_class("subspace", SubspaceTrainingSAE, SubspaceTrainingSAEConfig)
