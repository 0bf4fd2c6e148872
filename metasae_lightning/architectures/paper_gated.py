"""The gated SAE with the loss of its paper (arXiv 2404.16014). SAELens's gated SAE differs from it in two terms of the loss.

With `pi = (x - b_dec) W_gate + b_gate` the codes are `f = 1[pi > 0] * relu((x - b_dec) W_mag + b_mag)`, `W_mag = exp(r_mag) W_gate`, and

    loss = ||x - (f W_dec + b_dec)||^2  +  l1 * sum(relu(pi))  +  ||x - (relu(pi) sg[W_dec] + sg[b_dec])||^2

with squared errors summed over dimensions, means over the batch and `sg` the stop-gradient. SAELens lets the third term train the decoder
and weights the second by the norms of the decoder rows. The paper's decoder rows have unit norm: `decoder_rows: unit`, the default here.
"""

from dataclasses import dataclass

from jaxtyping import Float
from sae_lens import GatedSAEConfig, GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor
from typing_extensions import override

NAME = "paper_gated"


@dataclass
class PaperGatedTrainingSAEConfig(GatedTrainingSAEConfig):
    """The config of a gated SAE with the paper's loss; it has the same settings as SAELens's `GatedTrainingSAEConfig`.

    The initial decoder rows are random unit vectors, the encoder is their transpose, and biases and `r_mag` are 0. This initialisation is
    our reconstruction: it was not checked against the paper.
    """

    decoder_init_norm: float | None = 1.0

    @override
    @classmethod
    def architecture(cls) -> str:
        return NAME

    @override
    def get_inference_config_class(self) -> type[GatedSAEConfig]:
        """SAELens's own config: the exported SAE is a `gated` one, since only the loss differs."""
        return GatedSAEConfig


class PaperGatedTrainingSAE(GatedTrainingSAE):
    """A gated SAE in training, with the paper's loss."""

    @override
    def encode_with_hidden_pre(self, x: Float[Tensor, "row d_in"]) -> tuple[Float[Tensor, "row d_sae"], Float[Tensor, "row d_sae"]]:
        """Codes, and the gate's pre-activations `pi`; one product with the encoder gives both paths."""
        product = self.process_sae_in(x) @ self.W_enc
        pi = product + self.b_gate
        magnitude = self.activation_fn(self.hook_sae_acts_pre(product * self.r_mag.exp() + self.b_mag))
        return self.hook_sae_acts_post((pi > 0).to(magnitude.dtype) * magnitude), pi

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Float[Tensor, "row d_sae"],
        hidden_pre: Float[Tensor, "row d_sae"],
        sae_out: Float[Tensor, "row d_in"],
    ) -> dict[str, Tensor]:
        """The L1 norm of the gate's activations, and their squared error through a decoder that gets no gradient from it.

        The decoder bias gets gradient from both terms as part of `pi`, as the paper's formula says, but not as part of the reconstruction.
        """
        gate = hidden_pre.relu()
        error = gate @ self.W_dec.detach() + self.b_dec.detach() - step_input.sae_in
        return {
            "l1_loss": step_input.coefficients["l1"] * gate.sum(-1).mean(),
            "auxiliary_reconstruction_loss": error.square().sum(-1).mean(),
        }


if NAME not in SAE_TRAINING_CLASS_REGISTRY:  # a reloaded module registers once
    register_sae_training_class(NAME, PaperGatedTrainingSAE, PaperGatedTrainingSAEConfig)
