"""The signed gated SAE: SA-GSAE with Bi-Jump-ReLU (arXiv 2605.28149). A latent fires with either sign, and each sign has a gate.

The paper's equations were not available to us: these are our reconstruction from its abstract, not verified against the paper. With
`z = (x - b_dec) W_enc`, and of two open gates the wider,

    h = ReLU(z + b_gate+) - ReLU(b_gate- - z)                                 the gates' code
    f = [h > 0] ReLU(exp(r+) z + b_mag+) - [h < 0] ReLU(b_mag- - exp(r-) z)   the signed codes
    loss = ||x - f W_dec - b_dec||^2 + l1 sum|h| + ||x - h sg[W_dec] - sg[b_dec]||^2

where sg stops the gradient. The thresholds are `-b_gate+` and `-b_gate-`. By default the two signs have the same `r` and biases. The
dead-latent resets of thresholds that the abstract mentions are not part of this reconstruction.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from sae_lens import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig, register_sae_class, register_sae_training_class
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata, TrainCoefficientConfig, TrainStepInput
from torch import Tensor, nn

from metasae_lightning.errors import InputError
from metasae_lightning.functional.sparsity import bi_jump_relu, signed_gate

ARCHITECTURE = "signed_gated"
# Each parameter of the positive sign, and that of the negative sign.
NEGATIVE = {"b_gate": "b_gate_negative", "b_mag": "b_mag_negative", "r_mag": "r_mag_negative"}


@dataclass
class SignedGatedSAEConfig(SAEConfig):
    """Inference config of the signed gated SAE. Both signs have parameters, equal ones if they were tied in training."""

    has_signed_codes: ClassVar[bool] = True

    metadata: Any = field(default_factory=SAEMetadata)  # SAELens first gives a dict, when it loads a folder

    @classmethod
    def architecture(cls) -> str:
        """The name in SAELens's registry."""
        return ARCHITECTURE


@dataclass
class SignedGatedTrainingSAEConfig(TrainingSAEConfig):
    """Training config of the signed gated SAE, our reconstruction of SA-GSAE.

    The penalty does not include the norms of decoder rows: keep the rows unit (`decoder_rows: unit`).

    Args:
        l1_coefficient: Weight of the L1 norm of the gates' code, `sum|h|` averaged over tokens.
        l1_warm_up_steps: Steps over which that weight rises from 0.
        tie_polarities: Whether both signs have the same thresholds, biases and scale.
        initial_threshold: Threshold of each gate at the start; small, so that few latents are dead at first.
    """

    has_signed_codes: ClassVar[bool] = True

    l1_coefficient: float = 1.0
    l1_warm_up_steps: int = 0
    tie_polarities: bool = True
    initial_threshold: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize_activations == "covariance_whitening" and self.tie_polarities and not self.apply_b_dec_to_input:
            raise InputError(
                "tie_polarities: covariance_whitening shifts the two signs apart where the encoder does not subtract b_dec: set "
                "apply_b_dec_to_input: true or tie_polarities: false"
            )

    @classmethod
    def architecture(cls) -> str:
        """The name in SAELens's registry."""
        return ARCHITECTURE


class _SignedGate(SAE[Any]):
    """The gates and folds that the training SAE and the inference SAE share. A tied SAE has no parameters of the negative sign."""

    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    def initialize_weights(self) -> None:
        """Set the weights as SAELens does, biases and `r_mag` to zero, and the gates to the initial threshold."""
        super().initialize_weights()
        for name, negative in NEGATIVE.items():
            start = -getattr(self.cfg, "initial_threshold", 0.0) if name == "b_gate" else 0.0
            for own in (name,) if getattr(self.cfg, "tie_polarities", False) else (name, negative):
                setattr(self, own, nn.Parameter(torch.full((self.cfg.d_sae,), start, dtype=self.dtype, device=self.device)))

    def negative(self, name: str) -> Tensor:
        """The negative sign's parameter; the positive sign's where they are tied."""
        return getattr(self, NEGATIVE[name] if hasattr(self, NEGATIVE[name]) else name)

    def signed_codes(self, x: Tensor) -> tuple[Float[Tensor, "batch d_sae"], Float[Tensor, "batch d_sae"]]:
        """The signed codes of activations, and the gates' code."""
        z = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc)
        gate = signed_gate(z, self.b_gate, self.negative("b_gate"))
        scales = {"r_positive": self.r_mag, "r_negative": self.negative("r_mag")}
        codes = bi_jump_relu(z, gate, **scales, b_positive=self.b_mag, b_negative=self.negative("b_mag"))
        return self.hook_sae_acts_post(codes), gate

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Scale decoder rows to length 1, and gates and magnitudes by the old lengths."""
        norms = self.fold_and_get_W_dec_norm()
        for name in ("b_gate", "b_mag"):
            for own in {name, NEGATIVE[name]} & dict(self.named_parameters()).keys():
                getattr(self, own).data.mul_(norms)

    @torch.no_grad()
    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        """Fold a whitening of the activations into the weights, as SAELens does for its SAEs."""
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)
        if not self.cfg.apply_b_dec_to_input:
            shift = mean.to(self.W_enc) @ self.W_enc
            self.b_gate.data.sub_(shift)
            self.b_mag.data.sub_(shift * self.r_mag.exp())
            self.negative("b_gate").data.add_(shift)
            self.negative("b_mag").data.add_(shift * self.negative("r_mag").exp())


class SignedGatedSAE(_SignedGate):
    """The signed gated SAE for inference."""

    b_enc: None = None

    def encode(self, x: Tensor) -> Float[Tensor, "batch d_sae"]:
        """The signed codes of activations."""
        return self.signed_codes(x)[0]

    def decode(self, feature_acts: Tensor) -> Tensor:
        """The reconstruction from signed codes."""
        rebuilt = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(rebuilt), self.d_head)


class SignedGatedTrainingSAE(_SignedGate, TrainingSAE[SignedGatedTrainingSAEConfig]):
    """The signed gated SAE in training. Its loss is in SAELens's convention: squares are summed over `d_in` and averaged over tokens."""

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The signed codes of activations, and the gates' code in place of the pre-activations."""
        return self.signed_codes(x)

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """The penalty on the gates' code, and the squared error of the reconstruction from it by a frozen decoder."""
        rebuilt = hidden_pre @ self.W_dec.detach() + self.b_dec.detach()
        return {
            "l1_loss": step_input.coefficients["l1"] * hidden_pre.abs().sum(-1).mean(),
            "auxiliary_reconstruction_loss": (rebuilt - step_input.sae_in).square().sum(-1).mean(),
        }

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """The weight of the penalty, with its warm-up."""
        return {"l1": TrainCoefficientConfig(self.cfg.l1_coefficient, self.cfg.l1_warm_up_steps)}

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Give the negative sign tensors of its own."""
        super().process_state_dict_for_saving_inference(state_dict)
        for name, negative in NEGATIVE.items():
            state_dict.setdefault(negative, state_dict[name].clone())

    def own_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of an inference SAE without those of the negative sign, where the signs are tied."""
        if not self.cfg.tie_polarities:
            return weights
        for name, negative in NEGATIVE.items():
            if not torch.allclose(weights[name], weights[negative], rtol=1e-5, atol=1e-6):
                raise InputError(f"tie_polarities: the SAE to start from has different {name} for the two signs: set tie_polarities: false")
        return {name: tensor for name, tensor in weights.items() if name not in NEGATIVE.values()}


if ARCHITECTURE not in SAE_CLASS_REGISTRY:
    register_sae_class(ARCHITECTURE, SignedGatedSAE, SignedGatedSAEConfig)
    register_sae_training_class(ARCHITECTURE, SignedGatedTrainingSAE, SignedGatedTrainingSAEConfig)
