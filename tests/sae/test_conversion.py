"""Converted weights compute the source SAE's function, for every pair of architectures and every normaliser that permit it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    AbsTopKSAE,
    AbsTopKSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    MatchingPursuitSAE,
    MatchingPursuitSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)

from metasae_lightning import functional
from metasae_lightning.errors import InputError
from metasae_lightning.penalties import Decomposability
from metasae_lightning.sae.init_from import InitFrom, InitReport
from metasae_lightning.step import Batch, Codes
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import D_IN, activations, config, optimizers

CLASSES: dict[str, tuple[type[SAE[Any]], Any]] = {
    "standard": (StandardSAE, StandardSAEConfig),
    "gated": (GatedSAE, GatedSAEConfig),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
    "topk": (TopKSAE, TopKSAEConfig),
    "abstopk": (AbsTopKSAE, AbsTopKSAEConfig),
    "matching_pursuit": (MatchingPursuitSAE, MatchingPursuitSAEConfig),
}
OFFSET = 0.5
AFFINE = ["none", "expected_average_only_in", "covariance_whitening"]
PER_TOKEN = ["layer_norm", "constant_norm_rescale"]
THRESHOLDED = ["standard", "gated", "jumprelu"]
pytestmark = pytest.mark.filterwarnings("ignore:decoder_init_norm must be set")


def source(name: str, seed: int = 0, d_sae: int = 48, *, unit: bool = False, **kw: Any) -> SAE[Any]:
    """An inference SAE in which no tensor has a default value: decoder rows of different lengths, biases, a threshold per latent."""
    cls, config_class = CLASSES[name]
    own_args = {"k": 4} if name in ("topk", "abstopk") else {"max_iterations": 4} if name == "matching_pursuit" else {}
    sae = cls(config_class(**{"d_in": D_IN, "d_sae": d_sae, **own_args, **kw}))
    generator = torch.Generator().manual_seed(seed)
    rows = functional.unit_rows(torch.randn(d_sae, D_IN, generator=generator))
    lengths = torch.ones(d_sae, 1) if unit or name == "matching_pursuit" else 0.3 + 2 * torch.rand(d_sae, 1, generator=generator)
    values = {
        "W_dec": rows * lengths,
        "W_enc": (rows / lengths).T.contiguous(),
        "b_dec": 0.3 + 0.2 * torch.randn(D_IN, generator=generator),
    }
    for name in ("b_enc", "b_gate", "b_mag", "r_mag"):
        values[name] = 0.1 * torch.randn(d_sae, generator=generator)
    values["threshold"] = 0.05 + 0.8 * torch.rand(d_sae, generator=generator)
    sae.load_state_dict({name: values[name] for name in sae.state_dict()})
    return sae.to(dtype=getattr(torch, kw.get("dtype", "float32"))).eval().requires_grad_(False)


def saved_path(sae: SAE[Any], folder: Path) -> str:
    """The path of the folder that the SAE is saved in."""
    sae.save_model(folder)
    return str(folder)


def initialized(
    folder: str, name: str, *, rows: str = "unit", measured_k: bool = False, **kw: Any
) -> tuple[JointSAE, InitReport, torch.Tensor]:
    """A module initialised from the SAE on 512 rows, the report on that, and the rows."""
    module = JointSAE(config(name, **kw), decoder_rows=rows, init_from=InitFrom(folder, measured_k=measured_k))  # pyright: ignore
    x = activations(0, rows=512) + OFFSET
    report = module.primary.initialize(x)
    assert report is not None
    return module, report, x


def dense(codes: Codes) -> torch.Tensor:
    """The codes as a dense matrix."""
    acts = torch.zeros(codes.shape)
    acts[codes.rows, codes.latents] = codes.values
    return acts


def assert_same_function(sae: SAE[Any], module: JointSAE, x: torch.Tensor) -> None:
    """The module has the SAE's active latents and its reconstruction."""
    sae = sae.to(dtype=torch.float32)
    source_codes = sae.encode(x)
    codes, rebuilt = module.primary.read(x)
    # In fp32 a value very near the threshold may fall on either side.
    is_at_threshold = ((dense(codes) != 0) != (source_codes != 0)).any(-1)
    assert is_at_threshold.float().mean() < 0.01 and 0.02 < (source_codes != 0).float().mean() < 0.8
    torch.testing.assert_close(rebuilt[~is_at_threshold], sae.decode(source_codes)[~is_at_threshold], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", ["unit", "free"])
@pytest.mark.parametrize("subtracts", [(True, True), (False, True), (True, False)], ids=str)
@pytest.mark.parametrize("normalizer", AFFINE)
@pytest.mark.parametrize("name", THRESHOLDED)
def test_converted_saes_with_thresholds_compute_the_same_function(
    name: str, normalizer: str, subtracts: tuple[bool, bool], rows: str, tmp_path: Path
):
    sae = source(name, apply_b_dec_to_input=subtracts[0])
    folder = saved_path(sae, tmp_path / "sae")
    module, report, x = initialized(folder, name, rows=rows, normalize_activations=normalizer, apply_b_dec_to_input=subtracts[1])
    assert report.lost == []
    assert report.l0[1] == pytest.approx(report.l0[0], rel=2e-3) and report.fvu[1] == pytest.approx(report.fvu[0], rel=1e-3)
    assert_same_function(sae, module, x)
    if rows == "unit":
        torch.testing.assert_close(module.primary.W_dec.norm(dim=-1), torch.ones(48), rtol=0, atol=1e-6)


@pytest.mark.parametrize("normalizer", PER_TOKEN)
@pytest.mark.parametrize("name", [*THRESHOLDED, "topk"])
def test_a_per_token_normaliser_keeps_the_function_and_another_one_is_refused(name: str, normalizer: str, tmp_path: Path):
    sae = source(name, unit=name == "topk", normalize_activations=normalizer)
    module, report, x = initialized(saved_path(sae, tmp_path / "sae"), name, normalize_activations=normalizer)
    assert report.lost == []
    assert_same_function(sae, module, x)
    with pytest.raises(InputError, match=f"set normalize_activations: {normalizer}"):
        initialized(str(tmp_path / "sae"), name)


# JumpReLU can express every gated or standard SAE, and gated every JumpReLU one; standard SAEs have neither gates nor thresholds.
# The paper's gated SAE has SAELens's gated function, and the adaptive elastic net the standard one.
@pytest.mark.parametrize(
    "pair",
    [
        *[("gated", "jumprelu"), ("standard", "jumprelu"), ("standard", "gated"), ("jumprelu", "gated")],
        *[(name, "paper_gated") for name in THRESHOLDED],
        ("standard", "adaptive_elastic_net"),
    ],
    ids=str,
)
def test_conversion_to_a_more_general_architecture_keeps_the_function(pair: tuple[str, str], tmp_path: Path):
    sae = source(pair[0])
    module, report, x = initialized(saved_path(sae, tmp_path / "sae"), pair[1])
    assert report.lost == [] and report.architectures == pair
    assert_same_function(sae, module, x)


@pytest.mark.parametrize("case", ["as it is", "rescaled", "even rows"])
@pytest.mark.parametrize("name", ["topk", "abstopk"])
def test_converted_topk_saes_compute_the_same_function_where_the_ranking_is_kept(name: str, case: str, tmp_path: Path):
    sae = source(name, unit=case == "even rows", rescale_acts_by_decoder_norm=case == "rescaled")
    if case == "even rows":
        sae.W_dec *= 1.7
    rows, rescale = ("free", False) if case == "as it is" else ("unit", True)
    module, report, x = initialized(saved_path(sae, tmp_path / "sae"), name, rows=rows, rescale_acts_by_decoder_norm=rescale)
    assert report.lost == []
    assert_same_function(sae, module, x)


def test_the_report_names_a_ranking_changed_by_row_lengths_as_lost(tmp_path: Path):
    sae = source("topk")
    _, report, _ = initialized(saved_path(sae, tmp_path / "sae"), "topk")
    assert "which now weigh on the ranking" in report.lost[0] and "which now weigh on the ranking" in str(report)
    assert report.fvu[1] != pytest.approx(report.fvu[0], rel=1e-3)


@pytest.mark.parametrize("normalizer", AFFINE[:2])
def test_matching_pursuit_keeps_its_function(normalizer: str, tmp_path: Path):
    sae = source("matching_pursuit")
    module, report, x = initialized(saved_path(sae, tmp_path / "sae"), "matching_pursuit", normalize_activations=normalizer)
    # Scaled activations need another residual_threshold than 0.01; here the four iterations end before either is reached.
    assert [line.split()[0] for line in report.lost] == ([] if normalizer == "none" else ["residual_threshold"])
    assert_same_function(sae, module, x)


@pytest.mark.parametrize("rows", ["unit", "free"])
def test_jumprelu_initialised_from_jumprelu_is_bit_equal(rows: str, tmp_path: Path):
    sae: Any = source("jumprelu", unit=rows == "unit")
    sae.threshold[:5] = -0.5  # equivalent to 0, since activations are not negative
    module, _, x = initialized(saved_path(sae, tmp_path / "sae"), "jumprelu", rows=rows)
    codes, rebuilt = module.primary.read(x)
    assert torch.equal(dense(codes), sae.encode(x)) and torch.equal(rebuilt, sae.decode(sae.encode(x)))
    for name, tensor in sae.state_dict().items():
        assert torch.equal(module.primary.sae.state_dict()[name], tensor.clamp(min=0) if name == "threshold" else tensor)


# With unit rows and one threshold for all latents, the `L0 * rows` largest activations (rounded down) are those above the threshold.
@pytest.mark.parametrize("name", ["batchtopk", "matryoshka_batchtopk"])
def test_measured_k_equals_the_l0_of_the_source_and_is_restored_without_it(name: str, tmp_path: Path):
    sae: Any = source("jumprelu", unit=True)
    sae.threshold.fill_(0.4)
    module, report, x = initialized(saved_path(sae, tmp_path / "sae"), name, measured_k=True)
    assert "ranks a batch's activations" in report.lost[0]
    assert report.l0[0] == pytest.approx((sae.encode(x) > 0).sum().item() / 512) and 2 < report.l0[0] < 40
    assert module.primary.sae.cfg.k == report.l0[0]
    assert abs(report.l0[1] - report.l0[0]) * 512 <= 1.01
    assert report.fvu[1] == pytest.approx(report.fvu[0], abs=1e-3)
    # A resumed run has the same k and does not need the source.
    resumed = JointSAE(config(name), init_from=InitFrom(str(tmp_path / "gone"), measured_k=True))
    resumed.load_state_dict(module.state_dict())
    assert resumed.primary.sae.cfg.k == resumed.primary.sae.activation_fn.k == report.l0[0]  # pyright: ignore
    assert resumed.primary.initialize(x) is None
    assert torch.equal(resumed.primary.read(x)[1], module.primary.read(x)[1])


def test_topk_rounds_the_measured_k_and_standard_refuses_it(tmp_path: Path):
    folder = saved_path(source("jumprelu"), tmp_path / "sae")
    module, report, _ = initialized(folder, "topk", measured_k=True)
    assert module.primary.sae.cfg.k == round(report.l0[0])
    with pytest.raises(InputError, match="a 'standard' SAE has no k"):
        initialized(saved_path(source("standard"), tmp_path / "other"), "standard", measured_k=True)


# The report's numbers are those of both SAEs, measured again here.
@pytest.mark.parametrize(
    "pair",
    [
        *[("topk", "jumprelu"), ("topk", "batchtopk"), ("gated", "topk"), ("jumprelu", "standard")],
        *[("topk", "paper_gated"), ("gated", "adaptive_elastic_net"), ("topk", "adaptive_elastic_net")],
    ],
    ids=str,
)
def test_the_report_has_what_is_lost_and_both_saes_measurements(pair: tuple[str, str], tmp_path: Path):
    sae = source(pair[0], unit=True)
    module, report, x = initialized(saved_path(sae, tmp_path / "sae"), pair[1])
    assert report.lost
    codes, rebuilt = module.primary.read(x)
    assert report.fvu == pytest.approx((functional.fvu(x, sae.decode(sae.encode(x))).item(), functional.fvu(x, rebuilt).item()), rel=1e-5)
    assert report.l0 == pytest.approx(((sae.encode(x) != 0).sum(1).float().mean().item(), codes.l0))
    assert f"{report.fvu[0]:.4f} -> {report.fvu[1]:.4f}" in str(report) and str(tmp_path / "sae") in str(report)
    if pair[0] == "topk" and pair[1] != "adaptive_elastic_net":  # as many latents are active, though not the same
        assert report.l0[1] == pytest.approx(report.l0[0], rel=0.01)


def test_the_report_names_a_different_k_as_lost(tmp_path: Path):
    _, report, _ = initialized(saved_path(source("topk", unit=True, k=6), tmp_path / "sae"), "topk")
    assert report.lost == ["k is 4, where the source has 6"]


# The first training step may run in mixed precision: in bfloat16 the biases that absorb the shift would be off by one part in 300.
def test_mixed_precision_does_not_change_the_converted_weights(tmp_path: Path):
    folder = saved_path(source("gated", apply_b_dec_to_input=False), tmp_path / "sae")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, report, x = initialized(folder, "gated")
    float32, _, _ = initialized(folder, "gated")
    for name, tensor in float32.primary.sae.state_dict().items():
        assert torch.equal(tensor, mixed.primary.sae.state_dict()[name]), name
    assert report.fvu[1] == pytest.approx(report.fvu[0], rel=1e-3) and len(x) == 512


def test_a_learner_with_a_measured_k_can_be_copied(tmp_path: Path):
    folder = saved_path(source("jumprelu", unit=True), tmp_path / "sae")
    module, report, _ = initialized(folder, "batchtopk", measured_k=True)
    fresh = JointSAE(config("batchtopk"), init_from=InitFrom(folder, measured_k=True)).primary
    copied = copy.deepcopy(fresh)
    copied.load_state_dict(module.primary.state_dict())
    assert copied.sae.cfg.k == report.l0[0] and fresh.sae.cfg.k == 4


def test_measured_k_of_a_source_without_active_latents_is_refused(tmp_path: Path):
    sae: Any = source("jumprelu")
    sae.threshold.fill_(1e6)
    with pytest.raises(InputError, match=r"no latent of .* is active on these 512 rows"):
        initialized(saved_path(sae, tmp_path / "sae"), "batchtopk", measured_k=True)


def test_a_bfloat16_source_is_converted_exactly(tmp_path: Path):
    sae = source("jumprelu", unit=True, dtype="bfloat16")
    module, report, x = initialized(saved_path(sae, tmp_path / "sae"), "jumprelu", rows="free")
    assert module.primary.W_dec.dtype == torch.float32 and report.lost == []
    assert torch.equal(module.primary.W_dec, sae.W_dec.float())
    assert_same_function(sae, module, x)


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [("topk", "abstopk", "cannot be written as"), ("jumprelu", "matching_pursuit", "cannot be written as")],
)
def test_architectures_that_cannot_be_rewritten_are_refused(name: str, target: str, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        initialized(saved_path(source(name), tmp_path / "sae"), target)


def test_zero_decoder_rows_are_refused(tmp_path: Path):
    sae = source("jumprelu")
    sae.W_dec[3] = 0
    with pytest.raises(InputError, match="1 decoder rows are zero"):
        initialized(saved_path(sae, tmp_path / "sae"), "jumprelu")


# From every source, 200 joint steps on fresh batches lower the loss on the first batch.
@pytest.mark.parametrize(
    ("name", "target"), [*((name, name) for name in CLASSES), ("jumprelu", "batchtopk"), ("jumprelu", "matryoshka_batchtopk")]
)
def test_joint_training_from_a_converted_sae_lowers_the_loss(name: str, target: str, tmp_path: Path):
    folder = saved_path(source(name), tmp_path / "sae")
    module = JointSAE(config(target), config("batchtopk", 8), {"d": Decomposability(0.3)}, init_from=folder)
    primary, meta = optimizers(module, lr=2e-3)
    x = activations(0, rows=512) + OFFSET
    first = module.step(Batch(x), primary, meta)
    sae = source(name)
    if name == target and "topk" not in name:  # with top-k, unit rows change the ranking
        assert first.primary.fvu.item() == pytest.approx(functional.fvu(x, sae.decode(sae.encode(x))).item(), rel=1e-3)
    losses = [first.loss.item()]
    losses += [module.step(Batch(activations(i) + OFFSET), primary, meta).loss.item() for i in range(1, 200)]
    losses.append(module.step(Batch(x), primary, meta).loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert module.meta is not None and int(module.meta.steps) == 100
