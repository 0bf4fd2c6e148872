"""The paper's gated SAE: its loss and gradients, its export as gated and as JumpReLU, and data on which plain L1 shrinks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, GatedTrainingSAE, GatedTrainingSAEConfig, StandardTrainingSAEConfig, TopKSAE, TopKSAEConfig, TrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.architectures.paper_gated import PaperGatedTrainingSAE, PaperGatedTrainingSAEConfig
from metasae_lightning.errors import InputError
from metasae_lightning.sae.conversion import to_jumprelu
from metasae_lightning.sae.learner import Learner
from metasae_lightning.sae.learner_config import LearnerConfig

D_IN, D_SAE, L1 = 6, 10, 0.3
PARAMETERS = {"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"}


def random_sae(cls: type[Any], cfg: TrainingSAEConfig, dtype: torch.dtype = torch.float64) -> Any:
    """A training SAE in which no tensor has a default value; decoder rows of different lengths."""
    sae = cls(cfg).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.5
    return sae


def rows(count: int = 40, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(count, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def losses_and_gradients(sae: Any, x: Tensor) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The three terms of an SAE's loss, and each term's gradient of each parameter (zero where there is none)."""
    out = sae.training_forward_pass(TrainStepInput(x, {"l1": L1}, None, 0, False))
    torch.testing.assert_close(out.loss, sum(out.losses.values()), rtol=1e-12, atol=0)
    parameters = dict(sae.named_parameters())
    gradients = {
        name: dict(
            zip(parameters, torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, materialize_grads=True), strict=True)
        )
        for name, loss in out.losses.items()
    }
    return out.losses, gradients


def by_formula(sae: Any, x: Tensor) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The same by the paper's formula, with gradients derived by hand: sums over rows of products, divided by the number of rows."""
    W, D, b, c_gate, c_mag, r = (getattr(sae, name).detach() for name in ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"))
    n, centred = len(x), x - b
    pi, magnitude = centred @ W + c_gate, centred @ (W * r.exp()) + c_mag
    open_gate, positive = (pi > 0).double(), (magnitude > 0).double()
    f, gate = open_gate * magnitude.clamp(min=0), pi.clamp(min=0)
    error, gate_error = f @ D + b - x, gate @ D + b - x
    losses = {
        "mse_loss": error.square().sum() / n,
        "l1_loss": L1 * gate.sum() / n,
        "auxiliary_reconstruction_loss": gate_error.square().sum() / n,
    }
    zero = {name: torch.zeros_like(getattr(sae, name)) for name in PARAMETERS}
    # First term: d f = open positive (d centred W e^r + centred dW e^r + (centred W e^r) dr + dc_mag); b_dec also by -d centred and +1.
    to_magnitude = 2 / n * (error @ D.T) * open_gate * positive
    first = {
        "W_dec": 2 / n * f.T @ error,
        "b_dec": 2 / n * error.sum(0) - to_magnitude.sum(0) @ (W * r.exp()).T,
        "W_enc": centred.T @ to_magnitude * r.exp(),
        "r_mag": (to_magnitude * (centred @ (W * r.exp()))).sum(0),
        "b_mag": to_magnitude.sum(0),
    }

    def through_pi(to_gate: Tensor) -> dict[str, Tensor]:
        return zero | {"b_dec": -to_gate.sum(0) @ W.T, "W_enc": centred.T @ to_gate, "b_gate": to_gate.sum(0)}

    gradients = {
        "mse_loss": zero | first,
        "l1_loss": through_pi(L1 / n * open_gate),
        # The stop-gradient: the error's own b_dec and D are constants here.
        "auxiliary_reconstruction_loss": through_pi(2 / n * (gate_error @ D.T) * open_gate),
    }
    return losses, gradients


def test_loss_and_every_gradient_are_the_papers_and_saelens_differs_in_two_places():
    config: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "l1_coefficient": L1, "dtype": "float64"}
    sae = random_sae(PaperGatedTrainingSAE, PaperGatedTrainingSAEConfig(**config))
    x = rows()
    (losses, gradients), (expected, expected_gradients) = losses_and_gradients(sae, x), by_formula(sae, x)
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-9, atol=0)
        for parameter in PARAMETERS:
            torch.testing.assert_close(gradients[name][parameter], expected_gradients[name][parameter], rtol=1e-9, atol=1e-12)
    # Which term trains what.
    trained = {name: {p for p in PARAMETERS if gradients[name][p].any()} for name in gradients}
    gate = {"W_enc", "b_gate", "b_dec"}
    assert trained == {"mse_loss": PARAMETERS - {"b_gate"}, "l1_loss": gate, "auxiliary_reconstruction_loss": gate}

    # The control, SAELens's class with the same weights: another L1 term, and another gradient of the third term in decoder and b_dec.
    other = random_sae(GatedTrainingSAE, GatedTrainingSAEConfig(**config))
    other.load_state_dict(sae.state_dict())
    other_losses, other_gradients = losses_and_gradients(other, x)
    gate_acts = ((x - sae.b_dec) @ sae.W_enc + sae.b_gate).relu().detach()
    gate_error = (gate_acts @ sae.W_dec + sae.b_dec - x).detach()
    for name in ("mse_loss", "auxiliary_reconstruction_loss"):
        torch.testing.assert_close(other_losses[name], losses[name], rtol=1e-9, atol=0)
    torch.testing.assert_close(other_losses["l1_loss"], L1 * (gate_acts * sae.W_dec.norm(dim=1)).sum(1).mean(), rtol=1e-9, atol=0)
    third = "auxiliary_reconstruction_loss"
    extra = {"W_dec": 2 / len(x) * gate_acts.T @ gate_error, "b_dec": 2 / len(x) * gate_error.sum(0)}
    for parameter in PARAMETERS:
        torch.testing.assert_close(other_gradients["mse_loss"][parameter], gradients["mse_loss"][parameter], rtol=1e-9, atol=1e-12)
        difference = other_gradients[third][parameter] - gradients[third][parameter]
        expected_difference = extra.get(parameter, torch.zeros_like(difference))
        torch.testing.assert_close(difference, expected_difference, rtol=1e-9, atol=1e-12)
    assert extra["W_dec"].norm() > 0.1 and extra["b_dec"].norm() > 0.1


def test_the_initial_encoder_is_the_transpose_of_unit_decoder_rows_and_biases_are_zero():
    sae = PaperGatedTrainingSAE(PaperGatedTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE), rtol=0, atol=1e-6)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert not any(getattr(sae, name).any() for name in ("b_dec", "b_gate", "b_mag", "r_mag"))


def test_jumprelu_has_the_papers_thresholds_and_an_sae_that_ranks_is_refused(tmp_path: Path):
    cfg = PaperGatedTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, l1_coefficient=L1)
    sae = random_sae(PaperGatedTrainingSAE, cfg, torch.float32)
    sae.save_inference_model(tmp_path / "sae")
    gated = SAE.load_from_disk(str(tmp_path / "sae"))
    jumprelu, x = to_jumprelu(gated), rows(500, torch.float32)
    expected = (sae.b_mag - sae.r_mag.exp() * sae.b_gate).detach()
    # A threshold below 0 acts like 0, since activations are not negative.
    torch.testing.assert_close(jumprelu.threshold, expected.clamp(min=0))
    assert (expected > 0.1).any() and (expected < -0.1).any()
    # The control: without the thresholds other latents are active.
    codes = jumprelu.encode(x)
    torch.testing.assert_close(codes, gated.encode(x), rtol=1e-5, atol=1e-5)
    jumprelu.threshold.zero_()
    assert ((jumprelu.encode(x) > 0) != (codes > 0)).float().mean() > 0.02
    with pytest.raises(InputError, match="as_jumprelu: a 'topk' SAE cannot be written as a JumpReLU one"):
        to_jumprelu(TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=2)))


# 48 features in 24 dimensions, each active on a twelfth of the rows, with magnitudes over two orders. An L1 norm of the codes makes every
# activation smaller by the same amount, which takes most of a small one; the gate's L1 norm does not touch the codes.
FEATURES = torch.nn.functional.normalize(torch.randn(48, 24, generator=torch.Generator().manual_seed(0)), dim=-1)


def varying_magnitudes(step: int, count: int = 512) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    is_active = torch.rand(count, 48, generator=generator) < 1 / 12
    return (is_active * torch.exp(0.8 * torch.randn(count, 48, generator=generator))) @ FEATURES


def trained_figures(cfg: TrainingSAEConfig, steps: int = 400) -> tuple[float, float, float]:
    """L0, FVU and relative reconstruction bias of an SAE that was trained on the planted features."""
    learner = Learner(cfg, LearnerConfig(dead_after=10**9), role="primary", seed=0)
    optimizer = torch.optim.Adam(learner.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, steps)
    for step in range(steps):
        learner.learn(varying_magnitudes(step), optimizer, backward=torch.Tensor.backward)
        schedule.step()
    x = varying_magnitudes(steps, 8192)
    codes, reconstruction = learner.read(x)
    sums = functional.agreement_sums(x, reconstruction)
    return codes.l0, functional.fvu(x, reconstruction).item(), (sums[2] / sums[3]).item()


def test_on_features_of_varying_magnitude_the_gate_avoids_the_shrinkage_of_l1():
    size: dict[str, Any] = {"d_in": 24, "d_sae": 48, "decoder_init_norm": 1.0}
    l0, fvu, bias = trained_figures(PaperGatedTrainingSAEConfig(**size, l1_coefficient=1.0))
    standard_l0, standard_fvu, standard_bias = trained_figures(StandardTrainingSAEConfig(**size, l1_coefficient=0.75))
    assert l0 <= standard_l0 < 12
    assert fvu < 0.75 * standard_fvu
    assert bias == pytest.approx(1, abs=0.02)
    assert standard_bias < 0.9
    # The control: without an L1 norm nothing shrinks.
    assert trained_figures(StandardTrainingSAEConfig(**size, l1_coefficient=0.0))[2] == pytest.approx(1, abs=0.02)
