"""Another SAE's weights in training form: the same function, in every architecture, normaliser and way of writing it that permits it."""

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
    """An SAE whose every tensor says something: rows of all lengths, biases, a threshold a latent."""
    cls, make = CLASSES[name]
    more = {"k": 4} if name in ("topk", "abstopk") else {"max_iterations": 4} if name == "matching_pursuit" else {}
    sae = cls(make(**{"d_in": D_IN, "d_sae": d_sae, **more, **kw}))
    g = torch.Generator().manual_seed(seed)
    rows = functional.unit_rows(torch.randn(d_sae, D_IN, generator=g))
    lengths = torch.ones(d_sae, 1) if unit or name == "matching_pursuit" else 0.3 + 2 * torch.rand(d_sae, 1, generator=g)
    values = {"W_dec": rows * lengths, "W_enc": (rows / lengths).T.contiguous(), "b_dec": 0.3 + 0.2 * torch.randn(D_IN, generator=g)}
    for name in ("b_enc", "b_gate", "b_mag", "r_mag"):
        values[name] = 0.1 * torch.randn(d_sae, generator=g)
    values["threshold"] = 0.05 + 0.8 * torch.rand(d_sae, generator=g)
    sae.load_state_dict({name: values[name] for name in sae.state_dict()})
    return sae.to(dtype=getattr(torch, kw.get("dtype", "float32"))).eval().requires_grad_(False)


def saved(sae: SAE[Any], folder: Path) -> str:
    sae.save_model(folder)
    return str(folder)


def started(place: str, name: str, *, rows: str = "unit", measured_k: bool = False, **kw: Any) -> tuple[JointSAE, InitReport, torch.Tensor]:
    """A module after its first look at 512 rows, which took the weights."""
    module = JointSAE(config(name, **kw), decoder_rows=rows, init_from=InitFrom(place, measured_k=measured_k))  # pyright: ignore
    x = activations(0, rows=512) + OFFSET
    adopted = module.primary.initialize(x)
    assert adopted is not None
    return module, adopted, x


def dense(codes: Codes) -> torch.Tensor:
    found = torch.zeros(codes.shape)
    found[codes.rows, codes.latents] = codes.values
    return found


def same(sae: SAE[Any], module: JointSAE, x: torch.Tensor) -> None:
    """The same latents, the same reconstruction."""
    sae = sae.to(dtype=torch.float32)
    theirs = sae.encode(x)
    codes, rebuilt = module.primary.read(x)
    edge = ((dense(codes) != 0) != (theirs != 0)).any(-1)  # a pre-activation on the very edge may fall to either side in fp32
    assert edge.float().mean() < 0.01 and 0.02 < (theirs != 0).float().mean() < 0.8
    torch.testing.assert_close(rebuilt[~edge], sae.decode(theirs)[~edge], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", ["unit", "free"])
@pytest.mark.parametrize("subtracts", [(True, True), (False, True), (True, False)], ids=str)
@pytest.mark.parametrize("normalizer", AFFINE)
@pytest.mark.parametrize("name", THRESHOLDED)
def test_thresholded_saes_go_on_as_they_were(name: str, normalizer: str, subtracts: tuple[bool, bool], rows: str, tmp_path: Path):
    sae = source(name, apply_b_dec_to_input=subtracts[0])
    place = saved(sae, tmp_path / "sae")
    module, adopted, x = started(place, name, rows=rows, normalize_activations=normalizer, apply_b_dec_to_input=subtracts[1])
    assert adopted.lost == []
    assert adopted.l0[1] == pytest.approx(adopted.l0[0], rel=2e-3) and adopted.fvu[1] == pytest.approx(adopted.fvu[0], rel=1e-3)
    same(sae, module, x)
    if rows == "unit":
        torch.testing.assert_close(module.primary.W_dec.norm(dim=-1), torch.ones(48), rtol=0, atol=1e-6)


@pytest.mark.parametrize("normalizer", PER_TOKEN)
@pytest.mark.parametrize("name", [*THRESHOLDED, "topk"])
def test_what_is_done_to_each_token_is_done_again(name: str, normalizer: str, tmp_path: Path):
    sae = source(name, unit=name == "topk", normalize_activations=normalizer)
    module, adopted, x = started(saved(sae, tmp_path / "sae"), name, normalize_activations=normalizer)
    assert adopted.lost == []
    same(sae, module, x)
    with pytest.raises(InputError, match=f"set normalize_activations: {normalizer}"):
        started(str(tmp_path / "sae"), name)


# Every gated or standard SAE is a JumpReLU one; a JumpReLU one is gated; standard ones have neither gates nor thresholds.
@pytest.mark.parametrize("pair", [("gated", "jumprelu"), ("standard", "jumprelu"), ("standard", "gated"), ("jumprelu", "gated")], ids=str)
def test_one_architecture_is_another(pair: tuple[str, str], tmp_path: Path):
    sae = source(pair[0])
    module, adopted, x = started(saved(sae, tmp_path / "sae"), pair[1])
    assert adopted.lost == [] and adopted.architectures == pair
    same(sae, module, x)


@pytest.mark.parametrize("how", ["as it is", "rescaled", "even rows"])
@pytest.mark.parametrize("name", ["topk", "abstopk"])
def test_ranks_stay_where_rows_let_them(name: str, how: str, tmp_path: Path):
    sae = source(name, unit=how == "even rows", rescale_acts_by_decoder_norm=how == "rescaled")
    if how == "even rows":
        sae.W_dec *= 1.7
    rows, rescale = ("free", False) if how == "as it is" else ("unit", True)
    module, adopted, x = started(saved(sae, tmp_path / "sae"), name, rows=rows, rescale_acts_by_decoder_norm=rescale)
    assert adopted.lost == []
    same(sae, module, x)


def test_rows_that_would_change_ranks_are_said(tmp_path: Path):
    sae = source("topk")
    _, adopted, _ = started(saved(sae, tmp_path / "sae"), "topk")
    assert "which now weigh on the ranking" in adopted.lost[0] and "which now weigh on the ranking" in str(adopted)
    assert adopted.fvu[1] != pytest.approx(adopted.fvu[0], rel=1e-3)


@pytest.mark.parametrize("normalizer", AFFINE[:2])
def test_matching_pursuit_goes_on(normalizer: str, tmp_path: Path):
    sae = source("matching_pursuit")
    module, adopted, x = started(saved(sae, tmp_path / "sae"), "matching_pursuit", normalize_activations=normalizer)
    # In another unit the same 0.01 is another threshold; here the four iterations end before either.
    assert [line.split()[0] for line in adopted.lost] == ([] if normalizer == "none" else ["residual_threshold"])
    same(sae, module, x)


@pytest.mark.parametrize("rows", ["unit", "free"])
def test_jumprelu_as_jumprelu_is_equal_to_the_bit(rows: str, tmp_path: Path):
    sae: Any = source("jumprelu", unit=rows == "unit")
    sae.threshold[:5] = -0.5  # as good as 0: what is not active is not negative
    module, _, x = started(saved(sae, tmp_path / "sae"), "jumprelu", rows=rows)
    codes, rebuilt = module.primary.read(x)
    assert torch.equal(dense(codes), sae.encode(x)) and torch.equal(rebuilt, sae.decode(sae.encode(x)))
    for name, tensor in sae.state_dict().items():
        assert torch.equal(module.primary.sae.state_dict()[name], tensor.clamp(min=0) if name == "threshold" else tensor)


# With one threshold for all latents of unit rows, the `L0 * rows` largest activations are those that exceed it, but for a product's floor.
@pytest.mark.parametrize("name", ["batchtopk", "matryoshka_batchtopk"])
def test_k_can_be_what_the_source_has(name: str, tmp_path: Path):
    sae: Any = source("jumprelu", unit=True)
    sae.threshold.fill_(0.4)
    module, adopted, x = started(saved(sae, tmp_path / "sae"), name, measured_k=True)
    assert "ranks a batch's activations" in adopted.lost[0]
    assert adopted.l0[0] == pytest.approx((sae.encode(x) > 0).sum().item() / 512) and 2 < adopted.l0[0] < 40
    assert module.primary.sae.cfg.k == adopted.l0[0]
    assert abs(adopted.l0[1] - adopted.l0[0]) * 512 <= 1.01
    assert adopted.fvu[1] == pytest.approx(adopted.fvu[0], abs=1e-3)
    # A resumed run goes on with it, and needs no source.
    again = JointSAE(config(name), init_from=InitFrom(str(tmp_path / "gone"), measured_k=True))
    again.load_state_dict(module.state_dict())
    assert again.primary.sae.cfg.k == again.primary.sae.activation_fn.k == adopted.l0[0]  # pyright: ignore
    assert again.primary.initialize(x) is None
    assert torch.equal(again.primary.read(x)[1], module.primary.read(x)[1])


def test_topk_takes_a_whole_k_and_others_none(tmp_path: Path):
    place = saved(source("jumprelu"), tmp_path / "sae")
    module, adopted, _ = started(place, "topk", measured_k=True)
    assert module.primary.sae.cfg.k == round(adopted.l0[0])
    with pytest.raises(InputError, match="a 'standard' SAE has no k"):
        started(saved(source("standard"), tmp_path / "other"), "standard", measured_k=True)


# The figures that are said are those of both SAEs, measured again here.
@pytest.mark.parametrize("pair", [("topk", "jumprelu"), ("topk", "batchtopk"), ("gated", "topk"), ("jumprelu", "standard")], ids=str)
def test_what_is_lost_is_said_and_measured(pair: tuple[str, str], tmp_path: Path):
    sae = source(pair[0], unit=True)
    module, adopted, x = started(saved(sae, tmp_path / "sae"), pair[1])
    assert adopted.lost
    codes, rebuilt = module.primary.read(x)
    assert adopted.fvu == pytest.approx((functional.fvu(x, sae.decode(sae.encode(x))).item(), functional.fvu(x, rebuilt).item()), rel=1e-5)
    assert adopted.l0 == pytest.approx(((sae.encode(x) != 0).sum(1).float().mean().item(), codes.l0))
    assert f"{adopted.fvu[0]:.4f} -> {adopted.fvu[1]:.4f}" in str(adopted) and str(tmp_path / "sae") in str(adopted)
    if pair[0] == "topk":  # as many are active, if not the same
        assert adopted.l0[1] == pytest.approx(adopted.l0[0], rel=0.01)


def test_another_k_is_said(tmp_path: Path):
    _, adopted, _ = started(saved(source("topk", unit=True, k=6), tmp_path / "sae"), "topk")
    assert adopted.lost == ["k is 4, where the source has 6"]


# The first batch is a training step's, in whatever precision that runs: biases that take up the shift would be off by a part in 300.
def test_mixed_precision_does_not_touch_the_weights(tmp_path: Path):
    place = saved(source("gated", apply_b_dec_to_input=False), tmp_path / "sae")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, adopted, x = started(place, "gated")
    plain, _, _ = started(place, "gated")
    for name, tensor in plain.primary.sae.state_dict().items():
        assert torch.equal(tensor, mixed.primary.sae.state_dict()[name]), name
    assert adopted.fvu[1] == pytest.approx(adopted.fvu[0], rel=1e-3) and len(x) == 512


def test_a_learner_with_a_measured_k_can_be_copied(tmp_path: Path):
    place = saved(source("jumprelu", unit=True), tmp_path / "sae")
    module, adopted, _ = started(place, "batchtopk", measured_k=True)
    fresh = JointSAE(config("batchtopk"), init_from=InitFrom(place, measured_k=True)).primary
    twin = copy.deepcopy(fresh)
    twin.load_state_dict(module.primary.state_dict())
    assert twin.sae.cfg.k == adopted.l0[0] and fresh.sae.cfg.k == 4


def test_an_sae_that_is_silent_has_no_k(tmp_path: Path):
    sae: Any = source("jumprelu")
    sae.threshold.fill_(1e6)
    with pytest.raises(InputError, match=r"no latent of .* is active on these 512 rows"):
        started(saved(sae, tmp_path / "sae"), "batchtopk", measured_k=True)


def test_half_precision_is_read_as_it_is(tmp_path: Path):
    sae = source("jumprelu", unit=True, dtype="bfloat16")
    module, adopted, x = started(saved(sae, tmp_path / "sae"), "jumprelu", rows="free")
    assert module.primary.W_dec.dtype == torch.float32 and adopted.lost == []
    assert torch.equal(module.primary.W_dec, sae.W_dec.float())
    same(sae, module, x)


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [("topk", "abstopk", "cannot be written as"), ("jumprelu", "matching_pursuit", "cannot be written as")],
)
def test_pairs_that_make_no_sense_are_refused(name: str, target: str, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        started(saved(source(name), tmp_path / "sae"), target)


def test_rows_without_a_direction_are_refused(tmp_path: Path):
    sae = source("jumprelu")
    sae.W_dec[3] = 0
    with pytest.raises(InputError, match="1 decoder rows are zero"):
        started(saved(sae, tmp_path / "sae"), "jumprelu")


# From every source, 200 joint steps on fresh batches lower the loss on the batch that the start was measured on.
@pytest.mark.parametrize(
    ("name", "target"), [*((name, name) for name in CLASSES), ("jumprelu", "batchtopk"), ("jumprelu", "matryoshka_batchtopk")]
)
def test_joint_steps_go_on_from_there(name: str, target: str, tmp_path: Path):
    place = saved(source(name), tmp_path / "sae")
    module = JointSAE(config(target), config("batchtopk", 8), {"d": Decomposability(0.3)}, init_from=place)
    primary, meta = optimizers(module, lr=2e-3)
    x = activations(0, rows=512) + OFFSET
    first = module.step(Batch(x), primary, meta)
    sae = source(name)
    if name == target and "topk" not in name:  # where rows of all lengths keep their ranks
        assert first.primary.fvu.item() == pytest.approx(functional.fvu(x, sae.decode(sae.encode(x))).item(), rel=1e-3)
    losses = [first.loss.item()]
    losses += [module.step(Batch(activations(i) + OFFSET), primary, meta).loss.item() for i in range(1, 200)]
    losses.append(module.step(Batch(x), primary, meta).loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert module.meta is not None and int(module.meta.steps) == 100
