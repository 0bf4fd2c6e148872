"""The sparsemax attention SAE (arXiv 2604.14925): a token attends to learned concepts, which sparsemax selects.

The formulas are those of its public code. With concepts C, keys `K = C W_k` and values `V = C W_v`, without biases:

    s = x K^T / ||x||                      scores; latents that fired on more than `max_rate` of recent tokens are masked
    a = s where sparsemax(s) > 0, else 0   the raw scores on sparsemax's support
    x_hat = ||x|| a V

The codes are `a ||x||`, so that the decoder is linear: `W_dec = V`. They may be negative: sparsemax's threshold is below 0 where the
positive scores sum to less than 1, and small negative scores are then on the support.
"""

from abc import abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from sae_lens import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig, register_sae_class, register_sae_training_class
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata, TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from torch import Tensor, nn

from metasae_lightning.errors import InputError
from metasae_lightning.functional.sparsity import sparsemax_support

ARCHITECTURE = "sparsemax"
# Smallest norm that a token is divided by.
LEAST_NORM = 1e-12


@dataclass
class SparsemaxSAEConfig(SAEConfig):
    """Inference config of the sparsemax attention SAE."""

    has_signed_codes: ClassVar[bool] = True

    metadata: Any = field(default_factory=SAEMetadata)  # SAELens first gives a dict, when it loads a folder

    @classmethod
    def architecture(cls) -> str:
        """The name in SAELens's registry."""
        return ARCHITECTURE


@dataclass
class SparsemaxTrainingSAEConfig(TrainingSAEConfig):
    """Training config of the sparsemax attention SAE. It has no setting of L0, and `decoder_init_norm` has no effect.

    Args:
        loss_coefficient: Weight of the error, `||x_hat - x||^2 / ||x||` averaged over tokens, which is SAELens's convention: `d_in` times
            the average over tokens and coordinates in the public code.
        max_rate: Latents that fired on a larger share of recent tokens are masked; 1 masks none.
        rate_decay: Share of the running firing rates that a step, or each of its micro-batches, keeps. The public value is not known to us;
            this one is ours.
        scale_scores: Whether scores are divided by the square root of `d_in`. The public code does not.
    """

    has_signed_codes: ClassVar[bool] = True

    loss_coefficient: float = 10.0
    max_rate: float = 0.1
    rate_decay: float = 0.99
    scale_scores: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize_activations == "covariance_whitening":
            raise InputError("normalize_activations: a sparsemax SAE divides each token by its norm, which covariance_whitening changes")
        if not (0 < self.max_rate <= 1 and 0 <= self.rate_decay < 1):
            raise InputError(f"max_rate must be in (0, 1] and rate_decay in [0, 1), got {self.max_rate} and {self.rate_decay}")

    @classmethod
    def architecture(cls) -> str:
        """The name in SAELens's registry."""
        return ARCHITECTURE


class _Attention(SAE[Any]):
    """The encoder and the folds that the training SAE and the inference SAE share."""

    is_scale_free: ClassVar[bool] = True
    """Whether a factor of all activations is also that of the codes and of the reconstruction, so that it changes no weight."""

    @abstractmethod
    def scores(self, directions: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """The scores of tokens that are divided by their norms, before the mask."""

    @property
    @abstractmethod
    def masked(self) -> Bool[Tensor, " d_sae"]:
        """Mask of the latents that may not fire."""

    def attend(self, x: Tensor) -> tuple[Float[Tensor, "batch d_sae"], Float[Tensor, "batch d_sae"]]:
        """The codes of activations, and their scores."""
        x = self.process_sae_in(x)
        norms = x.norm(dim=-1, keepdim=True)
        scores = self.scores(x / norms.clamp(min=LEAST_NORM)).masked_fill(self.masked, -torch.inf)
        scores = self.hook_sae_acts_pre(scores)
        return self.hook_sae_acts_post(scores.where(sparsemax_support(scores), 0.0) * norms), scores

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Change no weight: scores do not depend on a token's norm, and the codes are proportional to it."""
        self.cfg.normalize_activations = "none"

    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        """Refuse a whitening: it changes the norms of tokens, which the scores are divided by."""
        raise InputError("normalize_activations: a sparsemax SAE divides each token by its norm, which covariance_whitening changes")

    def fold_W_dec_norm(self) -> None:
        """Refuse decoder rows of length 1: scaled scores would have another support."""
        raise InputError("a sparsemax SAE cannot have its decoder rows scaled to length 1: its scores would have another support")


class SparsemaxSAE(_Attention):
    """The sparsemax attention SAE for inference: `W_enc` holds the keys and `W_dec` the values; `is_masked` is the mask of training."""

    b_enc: None = None
    is_masked: Tensor

    def initialize_weights(self) -> None:
        """Set the weights as SAELens does, with no latent masked."""
        super().initialize_weights()
        self.register_buffer("is_masked", torch.zeros(self.cfg.d_sae, dtype=torch.bool, device=self.device))

    def scores(self, directions: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """The products with the keys."""
        return directions @ self.W_enc

    @property
    def masked(self) -> Bool[Tensor, " d_sae"]:
        """Mask of the latents that fired too often in training."""
        return self.is_masked.bool()  # SAELens loads every tensor in the SAE's dtype

    def encode(self, x: Tensor) -> Float[Tensor, "batch d_sae"]:
        """The codes of activations."""
        return self.attend(x)[0]

    def decode(self, feature_acts: Tensor) -> Tensor:
        """The reconstruction from codes."""
        rebuilt = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(rebuilt), self.d_head)


class SparsemaxTrainingSAE(_Attention, TrainingSAE[SparsemaxTrainingSAEConfig]):
    """The sparsemax attention SAE in training.

    Products are ordered so that a step multiplies no `d_sae x d_in` matrix by a `d_in x d_in` one, unless a penalty reads `W_dec`.
    """

    C: nn.Parameter
    W_k: nn.Parameter
    W_v: nn.Parameter
    b_dec: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    firing_rate: Tensor

    def __init__(self, cfg: SparsemaxTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.mse_loss_fn = partial(relative_square_error, coefficient=cfg.loss_coefficient)

    def initialize_weights(self) -> None:
        """Draw the concepts, `W_k` and `W_v` by Kaiming's rule; `b_dec` is no parameter and stays zero."""
        d_in, d_sae = self.cfg.d_in, self.cfg.d_sae
        for name, rows in (("C", d_sae), ("W_k", d_in), ("W_v", d_in)):
            weight = torch.empty(rows, d_in, dtype=self.dtype, device=self.device)
            setattr(self, name, nn.Parameter(nn.init.kaiming_uniform_(weight)))
        self.register_buffer("b_dec", torch.zeros(d_in, dtype=self.dtype, device=self.device), persistent=False)
        self.register_buffer("firing_rate", torch.zeros(d_sae, dtype=self.dtype, device=self.device))

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The values `C W_v`, computed at each access, in full precision; their gradient flows to `C` and `W_v`."""
        # Autocast does not support the meta device, which memory plans use.
        with nullcontext() if self.C.is_meta else torch.autocast(self.C.device.type, enabled=False):
            return self.C @ self.W_v

    @property
    def score_scale(self) -> float:
        """The factor of the scores."""
        return self.cfg.d_in**-0.5 if self.cfg.scale_scores else 1.0

    @property
    def masked(self) -> Bool[Tensor, " d_sae"]:
        """Mask of the latents that fired on more than `max_rate` of recent tokens."""
        return self.firing_rate > self.cfg.max_rate

    def scores(self, directions: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """The products with the keys, `(directions W_k^T) C^T`."""
        return self.score_scale * (directions @ self.W_k.T) @ self.C.T

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of activations, and their scores."""
        return self.attend(x)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """The reconstruction from codes, `(feature_acts C) W_v`."""
        rebuilt = self.hook_sae_recons(feature_acts @ self.C @ self.W_v)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(rebuilt), self.d_head)

    def error_weights(self, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row 1"]:
        """The weight of each row's squared error in the loss."""
        return self.cfg.loss_coefficient / x.norm(dim=-1, keepdim=True).clamp(min=LEAST_NORM)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """SAELens's training forward pass; then the running firing rates move towards this batch's."""
        out = super().training_forward_pass(step_input)
        if len(step_input.sae_in):
            fired = (out.feature_acts.detach() != 0).to(self.firing_rate.dtype).mean(0)
            self.firing_rate.lerp_(fired, 1 - self.cfg.rate_decay)
        return out

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """No other loss."""
        return {}

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """No coefficient."""
        return {}

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Replace concepts and maps by keys (times the scale of scores) and values, and firing rates by the mask."""
        C, W_k, W_v = (state_dict.pop(name) for name in ("C", "W_k", "W_v"))
        del state_dict["firing_rate"]
        state_dict |= {"W_enc": (self.score_scale * C @ W_k).T.contiguous(), "W_dec": C @ W_v}
        state_dict |= {"b_dec": self.b_dec.clone(), "is_masked": self.masked}

    def own_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Concepts and maps that give the keys and values of an inference SAE; its mask becomes firing rates of 1 and 0.

        The concepts are the values, and `W_v` is the identity. `W_k` solves `score_scale C W_k = W_enc^T`, which an SAE of this
        architecture satisfies.
        """
        self.firing_rate.copy_(weights["is_masked"])
        W_k = torch.linalg.lstsq(weights["W_dec"].double(), weights["W_enc"].T.double() / self.score_scale).solution
        return {"C": weights["W_dec"], "W_v": torch.eye(self.cfg.d_in), "W_k": W_k}


def relative_square_error(preds: Tensor, target: Tensor, *, coefficient: float) -> Tensor:
    """Squared errors of a token's coordinates over the token's norm, times a coefficient."""
    return coefficient * (preds - target).square() / target.norm(dim=-1, keepdim=True).clamp(min=LEAST_NORM)


if ARCHITECTURE not in SAE_CLASS_REGISTRY:
    register_sae_class(ARCHITECTURE, SparsemaxSAE, SparsemaxSAEConfig)
    register_sae_training_class(ARCHITECTURE, SparsemaxTrainingSAE, SparsemaxTrainingSAEConfig)
