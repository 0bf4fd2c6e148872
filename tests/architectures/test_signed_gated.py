"""The signed gated SAE: its formula, the gated SAE as its special case, both signs, planted antipodal features, export."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TopKTrainingSAEConfig, TrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from safetensors.torch import load_file
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.architectures import SignedGatedTrainingSAEConfig, Units
from metasae_lightning.architectures.signed_gated import NEGATIVE, SignedGatedTrainingSAE
from metasae_lightning.errors import InputError
from metasae_lightning.sae import export
from metasae_lightning.step import Batch
from metasae_lightning.training import JointSAE
from tests.architectures.short_training import trained

L1 = 0.3
EXPORTED = {"W_enc", "W_dec", "b_dec", *NEGATIVE, *NEGATIVE.values()}


def random_sae(*, tied: bool, d_in: int = 6, d_sae: int = 11) -> SignedGatedTrainingSAE:
    """An SAE in float64 with random weights; some biases are above 0, so that both gates of a latent may be open."""
    generator = torch.Generator().manual_seed(3)
    cfg = SignedGatedTrainingSAEConfig(d_in=d_in, d_sae=d_sae, dtype="float64", l1_coefficient=L1, tie_polarities=tied)
    sae = SignedGatedTrainingSAE(cfg)
    for parameter in sae.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return sae


def rows(count: int = 40, d_in: int = 6) -> Tensor:
    return torch.randn(count, d_in, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def forward(sae: SignedGatedTrainingSAE, x: Tensor) -> Any:
    return sae.training_forward_pass(TrainStepInput(x, {"l1": L1}, None, 0, False))


def gradients(loss: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), retain_graph=True), strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_codes_loss_and_gradient_are_those_of_the_formula(tied: bool):
    sae, x = random_sae(tied=tied), rows()
    weights = dict(sae.named_parameters())
    assert len(weights) == (6 if tied else 9)
    W_enc, W_dec, b_dec = weights["W_enc"], weights["W_dec"], weights["b_dec"]
    plus = {name: weights[name] for name in NEGATIVE}
    minus = {name: weights[name if tied else negative] for name, negative in NEGATIVE.items()}
    z = (x - b_dec) @ W_enc
    up, down = z + plus["b_gate"], -z + minus["b_gate"]
    assert ((up > 0) & (down > 0)).any()  # both open: the wider counts
    open_up, open_down = ((up > 0) & (up >= down)).double(), ((down > 0) & (down > up)).double()
    f = open_up * torch.relu(plus["r_mag"].exp() * z + plus["b_mag"]) - open_down * torch.relu(-minus["r_mag"].exp() * z + minus["b_mag"])
    h = open_up * up - open_down * down
    auxiliary = h @ W_dec.detach() + b_dec.detach()
    error, penalty = ((x - f @ W_dec - b_dec) ** 2).sum(1).mean(), h.abs().sum(1).mean()
    loss = error + L1 * penalty + ((x - auxiliary) ** 2).sum(1).mean()
    out = forward(sae, x)
    assert (f > 0).any() and (f < 0).any()
    torch.testing.assert_close(out.feature_acts, f, rtol=0, atol=1e-9)
    torch.testing.assert_close(out.loss, loss, rtol=0, atol=1e-9)
    theirs = gradients(loss, weights)
    for name, gradient in gradients(out.loss, weights).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=1e-9)
    # The control: the auxiliary error would have another gradient if it moved the decoder.
    moving = error + L1 * penalty + ((x - h @ W_dec - b_dec) ** 2).sum(1).mean()
    assert not torch.allclose(gradients(moving, weights)["W_dec"], theirs["W_dec"])


def test_with_the_negative_gates_shut_it_is_the_gated_sae():
    sae, x = random_sae(tied=False), rows()
    weights = {name: weight for name, weight in sae.named_parameters() if not name.endswith("_negative")}
    for shut in (-torch.inf, -1e6):
        sae.get_parameter("b_gate_negative").data.fill_(shut)
        # The gated SAE of arXiv 2404.16014: L = ||x - x'(f)||^2 + l1 ||ReLU(pi)||_1 + ||x - x'_frozen(ReLU(pi))||^2
        pi = (x - sae.b_dec) @ sae.W_enc + sae.b_gate
        f = (pi > 0) * torch.relu((x - sae.b_dec) @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag)
        frozen = pi.relu() @ sae.W_dec.detach() + sae.b_dec.detach()
        loss = (f @ sae.W_dec + sae.b_dec - x).square().sum(1).mean() + L1 * pi.relu().sum(1).mean() + (frozen - x).square().sum(1).mean()
        out = forward(sae, x)
        torch.testing.assert_close(out.feature_acts, f, rtol=0, atol=1e-12)
        torch.testing.assert_close(out.loss, loss, rtol=0, atol=1e-12)
        theirs = gradients(loss, weights)
        for name, gradient in gradients(out.loss, weights).items():
            torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=1e-12)
    sae.get_parameter("b_gate_negative").data.fill_(0)  # the control
    assert (sae.encode(x) < 0).any()


def test_a_negated_encoder_with_swapped_signs_negates_the_codes():
    sae, x = random_sae(tied=False), rows()
    codes, rebuilt = sae.encode(x), sae(x)
    sae.W_enc.data.neg_()
    assert not torch.allclose(sae.encode(x), -codes)  # the control: the two signs have different weights
    for name, negative in NEGATIVE.items():
        positive_weight, negative_weight = sae.get_parameter(name), sae.get_parameter(negative)
        positive_weight.data, negative_weight.data = negative_weight.data, positive_weight.data
    torch.testing.assert_close(sae.encode(x), -codes, rtol=0, atol=0)
    sae.W_dec.data.neg_()
    torch.testing.assert_close(sae(x), rebuilt, rtol=0, atol=0)


def planted(features: Tensor, seed: int, count: int = 8192) -> Tensor:
    """Rows of 2 of 8 places each, whose feature is the first or the second of its place, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(count, 8, generator=generator).topk(2, dim=1).indices
    chosen = places + 8 * torch.randint(0, 2, (count, 2), generator=generator)
    values = torch.rand(count, 2, generator=generator) + 0.5
    return torch.zeros(count, 16).scatter(1, chosen, values) @ features + 0.01 * torch.randn(count, 16, generator=generator)


def measured(cfg: TrainingSAEConfig, features: Tensor) -> tuple[float, float, Tensor]:
    """FVU and L0 on fresh rows after training, and the directions of both signs of each latent."""
    sae, x = trained(cfg, planted(features, 0)), planted(features, 1)
    codes = sae.encode(x)
    directions = Units(cfg.d_sae, is_signed=True, by_polarity=True).directions(sae.W_dec)
    return functional.fvu(x, sae.decode(codes)).item(), (codes != 0).sum(1).float().mean().item(), directions


def signed(d_sae: int) -> TrainingSAEConfig:
    return SignedGatedTrainingSAEConfig(d_in=16, d_sae=d_sae, l1_coefficient=1.0, decoder_init_norm=1.0)


def topk(d_sae: int) -> TrainingSAEConfig:
    return TopKTrainingSAEConfig(d_in=16, d_sae=d_sae, k=2, decoder_init_norm=1.0, rescale_acts_by_decoder_norm=False)


# 16 features in 8 antipodal pairs: 8 signed latents are enough, and 8 of TopK are not. The control has 16 orthogonal features.
def test_antipodal_features_need_half_the_latents():
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(7))).Q
    antipodal, orthogonal = torch.cat([basis[:8], -basis[:8]]), basis
    fvu, l0, directions = measured(signed(8), antipodal)
    half, _, _ = measured(topk(8), antipodal)
    full, _, _ = measured(topk(16), antipodal)
    assert l0 == pytest.approx(2, abs=0.2)
    assert fvu < 0.1 * half and fvu < 1.5 * full
    # Every feature is the direction of a sign of a latent.
    assert (antipodal @ directions.T).amax(1).min() > 0.95
    fvu, l0, directions = measured(signed(8), orthogonal)
    half, _, _ = measured(topk(8), orthogonal)
    assert fvu > 0.7 * half > 0.2
    assert (orthogonal @ directions.T).amax(1).min() < 0.9


def shifted_rows(seed: int) -> Tensor:
    return planted(torch.eye(16), seed, 256) + 0.3


@pytest.mark.parametrize("normalizer", ["none", "layer_norm", "expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_exported_sae_has_the_same_codes_and_reconstruction(tied: bool, normalizer: Any, tmp_path: Path):
    cfg = SignedGatedTrainingSAEConfig(
        d_in=16, d_sae=24, l1_coefficient=L1, tie_polarities=tied, normalize_activations=normalizer, apply_b_dec_to_input=tied
    )
    module = JointSAE(cfg, seed=1)
    optimizer = torch.optim.Adam(module.primary.parameters(), lr=1e-2)
    for step in range(20):
        module.step(Batch(shifted_rows(step)), optimizer)
    learner = module.primary
    export.export(learner.sae, tmp_path / "sae", normalizer=learner.normalizer, updates=int(learner.updates))
    assert set(load_file(tmp_path / "sae" / "sae_weights.safetensors")) == EXPORTED
    loaded, x = SAE.load_from_disk(str(tmp_path / "sae")), shifted_rows(10**6)
    assert loaded.cfg.architecture() == "signed_gated" and Units.of(loaded.cfg).is_signed
    z, undo = learner.normalizer.normalize(x)
    codes = learner.sae.encode(z).detach()
    assert (codes > 0).any() and (codes < 0).any()
    torch.testing.assert_close(loaded.encode(x), codes, rtol=1e-5, atol=1e-5)
    rebuilt = learner.normalizer.restore(learner.sae.decode(codes), undo).detach()
    torch.testing.assert_close(loaded.decode(loaded.encode(x)), rebuilt, rtol=1e-5, atol=1e-5)
    if normalizer == "none":
        loaded.fold_W_dec_norm()
        torch.testing.assert_close(loaded(x), rebuilt, rtol=1e-5, atol=1e-5)


def test_tied_signs_refuse_a_whitening_that_shifts_them():
    options: dict[str, Any] = {"normalize_activations": "covariance_whitening", "apply_b_dec_to_input": False}
    with pytest.raises(InputError, match="tie_polarities: covariance_whitening shifts the two signs apart"):
        SignedGatedTrainingSAEConfig(d_in=4, d_sae=8, **options)
    SignedGatedTrainingSAEConfig(d_in=4, d_sae=8, **options, tie_polarities=False)
