"""The adaptive elastic net SAE (arXiv 2605.05341): a ReLU SAE with an adaptively weighted L1 norm and a squared L2 norm.

With `h = relu((x - b_dec) W_enc + b_enc)` and `xhat = h W_dec + b_dec`

    loss = mean_b ||x - xhat||^2  +  l1 * mean_b sum_i w_i |h_i|  +  l2 * mean_b sum_i h_i^2

with squared errors summed over dimensions, as in SAELens. The reference takes the mean over dimensions: its coefficients times `d_in` are
these. The weights `w_i` come from a running mean of each latent's activation (`functional.sparsity.adaptive_weights`) and are constants
for the gradient. The decoder rows have unit norm: `decoder_rows: unit`, the default here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import StandardSAEConfig, TrainingSAE, TrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput
from torch import Tensor, nn
from typing_extensions import override

from metasae_lightning.errors import InputError
from metasae_lightning.functional.sparsity import adaptive_weights

NAME = "adaptive_elastic_net"
# Buffers that training needs and inference does not have.
STATE = ("activation_ema", "step_sums", "step_rows", "last_step")


@dataclass
class AdaptiveElasticNetTrainingSAEConfig(TrainingSAEConfig):
    """The config of an adaptive elastic net SAE.

    Args:
        l1_coefficient: Factor of the weighted L1 norm; `d_in` times the reference's, whose squared error is a mean over dimensions.
        l2_coefficient: Factor of the squared L2 norm; `d_in` times the reference's.
        l1_warm_up_steps: Number of steps over which the L1 factor rises from 0.
        weight_warm_up_steps: Number of steps with all weights 1.
        weight_ramp_steps: Number of steps after that over which each weight moves linearly from 1 to its adaptive value.
        ema_decay: Decay of the running mean of each latent's activation for one step.
        weight_exponent: Exponent of the ratio of the reference to the running mean; 0 makes all weights 1.
        reference_fraction: Fraction of the largest running means whose mean is the reference.
        min_weight: Smallest weight.
        max_weight: Largest weight.
    """

    l1_coefficient: float = 1.0
    l2_coefficient: float = 0.1
    l1_warm_up_steps: int = 0
    weight_warm_up_steps: int = 0
    weight_ramp_steps: int = 2000
    ema_decay: float = 0.999
    weight_exponent: float = 0.5
    reference_fraction: float = 0.05
    min_weight: float = 0.01
    max_weight: float = 10.0
    decoder_init_norm: float | None = 1.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay must be at least 0 and below 1, got {self.ema_decay}")
        if not 0 < self.reference_fraction <= 1:
            raise InputError(f"reference_fraction must be above 0 and at most 1, got {self.reference_fraction}")
        if not 0 <= self.min_weight <= self.max_weight:
            raise InputError(f"min_weight must be between 0 and max_weight, got {self.min_weight} and {self.max_weight}")

    @override
    @classmethod
    def architecture(cls) -> str:
        return NAME

    @override
    def get_inference_config_class(self) -> type[StandardSAEConfig]:
        """SAELens's own config: the exported SAE is a `standard` one, since only the loss differs."""
        return StandardSAEConfig


class AdaptiveElasticNetTrainingSAE(TrainingSAE[AdaptiveElasticNetTrainingSAEConfig]):
    """An adaptive elastic net SAE in training.

    The weights of a step come from the steps before it, so they are the same in every part of its batch, on every rank. A training forward
    pass adds its activations to the sums of its step; the first one of the next step moves the running mean.
    """

    b_enc: nn.Parameter
    activation_ema: Tensor
    """Running mean of each latent's activation over the steps before `last_step`, from 1."""
    step_sums: Tensor
    """Sum of each latent's activations in step `last_step`. The mean over data ranks of this and of `step_rows` keeps their ratio right."""
    step_rows: Tensor
    """Number of rows in step `last_step`."""
    last_step: Tensor
    """Number of the step that the sums belong to; -1 before the first."""

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        factory: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        self.b_enc = nn.Parameter(torch.zeros(self.cfg.d_sae, **factory))
        self.register_buffer("activation_ema", torch.ones(self.cfg.d_sae, **factory))
        self.register_buffer("step_sums", torch.zeros(self.cfg.d_sae, **factory))
        self.register_buffer("step_rows", torch.zeros((), **factory))
        self.register_buffer("last_step", torch.full((), -1, dtype=torch.int64, device=self.device))

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """The two coefficients, of which the first is warmed up."""
        return {"l1": TrainCoefficientConfig(self.cfg.l1_coefficient, self.cfg.l1_warm_up_steps), "l2": self.cfg.l2_coefficient}

    @override
    def encode_with_hidden_pre(self, x: Float[Tensor, "row d_in"]) -> tuple[Float[Tensor, "row d_sae"], Float[Tensor, "row d_sae"]]:
        """Codes and pre-activations of a standard SAE."""
        hidden_pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        return self.hook_sae_acts_post(self.activation_fn(hidden_pre)), hidden_pre

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Float[Tensor, "row d_sae"],
        hidden_pre: Float[Tensor, "row d_sae"],
        sae_out: Float[Tensor, "row d_in"],
    ) -> dict[str, Tensor]:
        """The weighted L1 norm and the squared L2 norm of the codes, means over rows; the running mean is updated."""
        self._record(feature_acts.detach(), step_input.n_training_steps)
        weights = self.l1_weights(step_input.n_training_steps)
        return {
            "l1_loss": step_input.coefficients["l1"] * (feature_acts * weights).sum(-1).mean(),
            "l2_loss": step_input.coefficients["l2"] * feature_acts.square().sum(-1).mean(),
        }

    @torch.no_grad()
    def l1_weights(self, step: int) -> Float[Tensor, " d_sae"]:
        """The weight of each latent's L1 norm in a step: 1 until the warm-up ends, then linearly to the adaptive weight."""
        cfg, after = self.cfg, step - self.cfg.weight_warm_up_steps
        ramp = min(max(after / cfg.weight_ramp_steps, 0.0), 1.0) if cfg.weight_ramp_steps else float(after >= 0)
        weights = adaptive_weights(
            self.activation_ema,
            exponent=cfg.weight_exponent,
            reference_fraction=cfg.reference_fraction,
            min_weight=cfg.min_weight,
            max_weight=cfg.max_weight,
        )
        return 1 + (weights - 1) * ramp

    @torch.no_grad()
    def _record(self, acts: Float[Tensor, "row d_sae"], step: int) -> None:
        """Add activations to the sums of a step; if the step is new, the sums of the last one first move the running mean.

        The host reads nothing from the device, and every buffer is changed in place.
        """
        is_new, has_rows = self.last_step != step, self.step_rows > 0
        last_mean = self.step_sums / self.step_rows.clamp(min=1e-30)
        moved = self.activation_ema.lerp(last_mean, 1 - self.cfg.ema_decay)
        self.activation_ema.copy_(torch.where(is_new & has_rows, moved, self.activation_ema))
        self.step_sums.masked_fill_(is_new, 0).add_(acts.abs().sum(0, dtype=self.step_sums.dtype))
        self.step_rows.masked_fill_(is_new, 0).add_(len(acts))
        self.last_step.fill_(step)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Leave out the running mean and the sums of the last step."""
        super().process_state_dict_for_saving_inference(state_dict)
        for name in STATE:
            state_dict.pop(name, None)


if NAME not in SAE_TRAINING_CLASS_REGISTRY:  # a reloaded module registers once
    register_sae_training_class(NAME, AdaptiveElasticNetTrainingSAE, AdaptiveElasticNetTrainingSAEConfig)
