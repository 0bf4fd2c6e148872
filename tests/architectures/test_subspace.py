"""The subspace-aware SAE: its loss against the formula, its sparse forward pass against the dense one, and its export."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from torch import Tensor

from metasae_lightning.architectures import SubspaceTrainingSAEConfig, Units
from metasae_lightning.compute.row_chunks import dry_run_scale
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.steering import change_latents, steer
from metasae_lightning.functional.subspaces import composition_norm, nuclear_norm
from metasae_lightning.memory.scaled_copies import scaled_down
from metasae_lightning.metrics import DecoderGeometry
from metasae_lightning.report import latent_browser
from metasae_lightning.sae import forward, pretrained
from metasae_lightning.sae.conversion import transfer_weights
from metasae_lightning.sae.export import export
from metasae_lightning.sae.forward_pass import ForwardPass
from metasae_lightning.sae.forward_result import ForwardResult
from metasae_lightning.sae.normalizers import make_normalizer
from metasae_lightning.sae.pretrained import load_pretrained
from metasae_lightning.sae.subspace_forward import SubspaceForward
from metasae_lightning.sae.thresholds import calibrate, global_threshold
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import activations

D_IN, K, R, S = 16, 12, 3, 2


def build(dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A subspace SAE with biases and an encoder that is not the decoder's transpose."""
    cfg = SubspaceTrainingSAEConfig(d_in=D_IN, d_sae=K * R, **{"group_size": R, "k": S, "decoder_init_norm": 1.0, **settings})
    sae: Any = pretrained.build(cfg, role="primary", seed=0).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.W_enc.add_(0.3 * torch.randn(sae.W_enc.shape, generator=generator, dtype=dtype))
        for bias in (sae.b_enc, sae.b_dec):
            bias.copy_(0.2 * torch.randn(bias.shape, generator=generator, dtype=dtype))
    return sae


def batch(rows: int = 40, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(1), dtype=dtype)


def dead_groups(count: int) -> Tensor:
    return torch.arange(K) < count


def restated(sae: Any, x: Tensor, dead: Tensor, *, weight: float, target: str, unit: bool, of_batch: bool, k_aux: int) -> Tensor:
    """The loss of SASA written out, group by group and row by row."""
    W = sae.W_enc / sae.W_enc.norm(dim=0) if unit else sae.W_enc
    u = (x - sae.b_dec) @ W + sae.b_enc
    groups = u.view(len(x), K, R)
    norms = (groups**2).sum(-1).sqrt().detach()
    if of_batch:
        cut = norms.flatten().sort(descending=True).values[S * len(x) - 1]
        is_active = norms >= cut
    else:
        is_active = norms >= norms.sort(descending=True).values[:, S - 1 : S]
    D = sae.W_dec.view(K, R, D_IN)
    rebuilt = sum((groups[:, g] * is_active[:, g, None]) @ D[g] for g in range(K)) + sae.b_dec
    loss = ((x - rebuilt) ** 2).sum(-1).mean()
    for g in range(K):
        block = D[g] if target == "decoder" else W[:, g * R : (g + 1) * R] @ D[g]
        U, s, V = torch.linalg.svd(block.detach(), full_matrices=False)
        # (D D^T + 1e-6 I)^(-1/2) D has the singular values s / sqrt(s^2 + 1e-6).
        loss = loss + weight / K * (block * (U * (s / (s**2 + 1e-6 * (target == "decoder")).sqrt())[:R].nan_to_num() @ V)).sum()
    latents = [i for i in range(K * R) if dead[i // R]]
    k = min(k_aux, len(latents), D_IN // 2)
    for row, acts in zip((x - rebuilt).detach(), u, strict=True):
        chosen = sorted(latents, key=lambda i: -acts[i].item())[:k]
        part = sum((acts[i] * sae.W_dec[i] for i in chosen), torch.zeros_like(row))
        loss = loss + min(len(latents) / max(k, 1), 1.0) * ((part - row) ** 2).sum() / len(x) * bool(k)
    return loss


def run(forward_pass: ForwardPass, x: Tensor, dead: Tensor) -> tuple[ForwardResult, dict[str, Tensor]]:
    """A forward and a backward pass: the result and the gradients by name."""
    forward_pass.sae.zero_grad()
    result = forward_pass.train(x, dead=dead, step=0, fresh_gradients=True)
    result.loss.backward()
    return result, {name: parameter.grad for name, parameter in forward_pass.sae.named_parameters()}


@pytest.mark.parametrize("n_dead", [0, 1, 5])
@pytest.mark.parametrize("of_batch", [False, True])
@pytest.mark.parametrize("unit", [False, True])
def test_loss_and_gradients_are_those_of_the_formula(unit: bool, of_batch: bool, n_dead: int):
    settings = {"unit_encoder": unit, "batch_top": of_batch, "nuclear_coefficient": 0.7, "k_aux": 5}
    sae, x, dead = build(**settings), batch(), dead_groups(n_dead)
    other = copy.deepcopy(sae)
    result, gradients = run(forward.forward_pass_for(sae, "dense"), x, dead)
    expected = restated(other, x, dead, weight=0.7, target="decoder", unit=unit, of_batch=of_batch, k_aux=5)
    expected.backward()
    torch.testing.assert_close(result.loss, expected, rtol=1e-9, atol=0)
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-11, msg=name)


def test_the_nuclear_norms_gradient_is_that_of_the_singular_values():
    generator = torch.Generator().manual_seed(0)
    E, D = (torch.randn(5, 3, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    for value, reference in (
        (nuclear_norm(D, 0.0), torch.linalg.svdvals(D).sum(-1).mean()),
        (composition_norm(E, D, 0.0), torch.linalg.svdvals(E.mT @ D)[:, :3].sum(-1).mean()),
    ):
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=0)
        ours, theirs = (torch.autograd.grad(v, (E, D), allow_unused=True, retain_graph=True) for v in (value, reference))
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# With eps the value at a block without full rank is finite, and so is its gradient; the singular values' own gradient is not.
def test_a_block_of_rank_one_has_a_finite_gradient():
    row = torch.nn.functional.normalize(torch.randn(1, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    block = row.expand(3, 8)[None].clone().requires_grad_()
    value = nuclear_norm(block)
    value.backward()
    # Three equal unit rows have one singular value, sqrt(3).
    assert value.item() == pytest.approx(math.sqrt(3), rel=1e-4)
    assert block.grad is not None and block.grad.isfinite().all()


@pytest.mark.parametrize("path", ["CPU", "GPU"])
@pytest.mark.parametrize("target", ["decoder", "composition"])
@pytest.mark.parametrize("of_batch", [False, True])
def test_the_sparse_forward_pass_equals_the_dense_one(of_batch: bool, target: Any, path: str):
    for unit, centred, n_dead in ((True, True, 0), (True, False, 2), (False, True, K)):
        sae = build(unit_encoder=unit, batch_top=of_batch, nuclear_target=target, apply_b_dec_to_input=centred, k_aux=5)
        sparse, dense = forward.forward_pass_for(sae, "sparse"), forward.forward_pass_for(copy.deepcopy(sae), "dense")
        assert isinstance(sparse, SubspaceForward) and not isinstance(dense, SubspaceForward)
        with dry_run_scale(1.0, gpu=path == "GPU"):
            (ours, gradients), (theirs, expected) = (run(each, batch(), dead_groups(n_dead)) for each in (sparse, dense))
            for name, value in theirs.losses.items():
                torch.testing.assert_close(ours.losses[name], value, rtol=1e-9, atol=1e-12, msg=name)
            torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-9, atol=0)
            torch.testing.assert_close(ours.reconstruction, theirs.reconstruction, rtol=1e-9, atol=1e-11)
            for name, gradient in expected.items():
                torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-11, msg=name)
            for a, b in zip(sparse.sae.buffers(), dense.sae.buffers(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=0)
                assert a > 0
            for a, b in ((ours.codes, theirs.codes), (sparse.read(batch())[0], dense.read(batch())[0])):
                assert torch.equal(a.rows, b.rows) and torch.equal(a.latents, b.latents) and a.shape == b.shape == (40, K)
                torch.testing.assert_close(a.values, b.values, rtol=1e-9, atol=0)
            torch.testing.assert_close(sparse.read(batch())[1], dense.read(batch())[1].detach(), rtol=1e-9, atol=1e-11)


# Without groups, magnitudes are ranked: the function is that of a TopK of absolute values.
def test_groups_of_one_latent_rank_magnitudes():
    sae = build(group_size=1, k=4)
    codes = sae.encode(batch())
    _, pre = sae.encode_with_hidden_pre(batch())
    assert (codes < 0).any() and codes.count_nonzero(1).eq(4).all()
    kept = pre.abs().topk(4).indices
    torch.testing.assert_close(codes.gather(1, kept), pre.gather(1, kept), rtol=0, atol=0)


@pytest.mark.parametrize("normalizer", ["none", "layer_norm", "expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("of_batch", [False, True])
def test_the_exported_sae_has_the_codes_of_training(tmp_path: Path, of_batch: bool, normalizer: str):
    sae, x = build(torch.float32, batch_top=of_batch, k=S), activations(0, 200)
    space = make_normalizer(normalizer, D_IN)
    space.fit(x)
    z, undo = space.normalize(x)
    training = forward.forward_pass_for(sae, "sparse")
    for _ in range(5):
        training.train(z, dead=dead_groups(0), step=0, fresh_gradients=True)
    if of_batch:  # inference keeps norms above the threshold, and the smallest active one is equal to it
        sae.topk_threshold *= 1 - 1e-4
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    record = export(sae, tmp_path / "sae", normalizer=space, updates=5, samples=[x])
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())
    assert record.target_l0 == S and record.l0 == pytest.approx(S, rel=0.01)
    loaded: Any = SAE.load_from_disk(tmp_path / "sae")
    assert type(loaded).__name__ == "SubspaceSAE" and set(loaded.state_dict()) == {
        *("W_enc", "W_dec", "b_enc", "b_dec"),
        *(["threshold"] if of_batch else []),
    }
    codes, rebuilt = training.read(z)
    ours = loaded.encode(x).detach()
    torch.testing.assert_close(loaded.decode(ours).detach(), space.restore(rebuilt, undo), rtol=1e-4, atol=1e-5)
    dense = torch.zeros(len(x), K).index_put((codes.rows, codes.latents), codes.values)
    torch.testing.assert_close(ours.view(len(x), K, R).norm(dim=-1), dense, rtol=1e-4, atol=1e-5)
    # Inference encodes tokens of any number of leading dimensions.
    torch.testing.assert_close(loaded.encode(x.view(4, 50, D_IN)).detach().view(200, -1), ours, rtol=1e-4, atol=1e-5)


def test_thresholds_are_calibrated_on_norms_of_groups():
    sae = build(torch.float32, batch_top=True)
    loaded: Any = SAE.from_dict(sae.cfg.get_inference_sae_cfg_dict())
    loaded.load_state_dict({**{n: t for n, t in sae.state_dict().items() if n != "topk_threshold"}, "threshold": torch.zeros(K)})
    scores = pretrained.pre_activations(loaded)
    assert scores is not None and scores(batch(dtype=torch.float32)).shape == (40, K)
    samples = [activations(i, 400) for i in range(3)]
    for rule in ("global", "rate"):
        result = calibrate(scores, samples, 1.5, rule)
        assert result.threshold.shape == (K,) and result.l0 == pytest.approx(1.5, abs=0.02)
        with torch.no_grad():
            loaded.threshold.copy_(result.threshold)
        assert pretrained.measure(loaded, samples)[0] == pytest.approx(result.l0, abs=1e-6)
    assert global_threshold(scores, samples, 1.5)[0] > 0
    assert pretrained.pre_activations(SAE.from_dict(build().cfg.get_inference_sae_cfg_dict())) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 5}, "d_sae must be a multiple of group_size, got 36 and 5"),
        ({"k": 13}, "from 1 to d_sae / group_size = 12, a fraction only with batch_top, got 13"),
        ({"k": 1.5}, "got 1.5"),
        ({"nuclear_coefficient": -1.0}, "must not be negative"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message) as error:
        build(**settings)
    assert "\n" not in str(error.value)
    assert build(k=1.5, batch_top=True).cfg.k == 1.5


def test_the_decoders_figures_have_the_stable_ranks_of_groups():
    # Rows of a group: twice the same direction, and two orthogonal ones of equal length. Ranks 1 and 2.
    W_dec = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    metric = DecoderGeometry(group_size=2)
    metric.update(W_dec)
    figures = {name: value.item() for name, value in metric.compute().items() if name.startswith("stable")}
    assert figures == {
        "stable_rank_mean": 1.5,
        "stable_rank_q10": pytest.approx(1.1),
        "stable_rank_median": 1.5,
        "stable_rank_q90": pytest.approx(1.9),
    }
    alone = DecoderGeometry()
    alone.update(W_dec)
    assert not any(name.startswith("stable") for name in alone.compute())


def test_training_starts_from_an_exported_sae(tmp_path: Path):
    sae, x = build(torch.float32, batch_top=True), activations(0, 200)
    export(sae, tmp_path / "sae", normalizer=make_normalizer("none", D_IN), updates=1)
    target = build(torch.float32, batch_top=True, decoder_init_norm=0.5)
    lost = transfer_weights(SAE.load_from_disk(tmp_path / "sae"), target, make_normalizer("none", D_IN), x, unit_rows=True)
    assert lost == []
    torch.testing.assert_close(target.encode(x), sae.encode(x), rtol=1e-4, atol=1e-5)
    other = build(torch.float32, group_size=4, batch_top=True)
    (sentence,) = transfer_weights(SAE.load_from_disk(tmp_path / "sae"), other, make_normalizer("none", D_IN), x, unit_rows=True)
    assert sentence == "group_size is 4, where the source has 3"


def test_what_a_start_from_an_exported_sae_loses_is_said(tmp_path: Path):
    source, x = build(torch.float32, batch_top=True, unit_encoder=False), batch(dtype=torch.float32)
    export(source, tmp_path / "sae", normalizer=make_normalizer("none", D_IN), updates=0, samples=[x])
    exported = SAE.load_from_disk(tmp_path / "sae")
    with torch.no_grad():
        exported.W_dec *= torch.linspace(0.5, 2, K * R)[:, None]

    def lost(**settings: Any) -> list[str]:
        target = build(torch.float32, **settings)
        return transfer_weights(exported, target, make_normalizer("none", D_IN), x, unit_rows=True)

    rule, rows, columns = lost()
    assert rule == "batch_top is False, not True"
    assert re.fullmatch(r"decoder rows had lengths from 0\.5 to 2, which now weigh on the ranking", rows)
    assert re.fullmatch(r"columns of W_enc had lengths from [\d.]+ to [\d.]+, and unit_encoder divides by them", columns)
    assert lost(unit_encoder=False, batch_top=True) == [rows]


@pytest.mark.parametrize("factor", [1.7, 3.0, 20.0])
def test_a_scaled_down_copy_has_whole_groups(factor: float):
    cfg = SubspaceTrainingSAEConfig(d_in=D_IN, d_sae=K * R, group_size=R, k=S)
    copied = scaled_down(JointSAE(cfg), factor).primary.sae.cfg
    assert copied.d_sae % R == 0 and copied.d_sae >= R and 0 < copied.k <= copied.d_sae // R
    assert abs(copied.d_sae - K * R / factor) <= R


def test_the_page_reads_the_direction_of_each_group_and_steering_adds_it(tmp_path: Path):
    sae = build(torch.float32)
    export(sae, tmp_path / "sae", normalizer=make_normalizer("none", D_IN), updates=0)
    rows = latent_browser.decoder_rows(tmp_path / "sae")
    units = Units.of(sae.cfg)
    # One row a group: rows of latents would be 36, and row 2 that of a latent of group 0.
    torch.testing.assert_close(torch.from_numpy(rows), units.directions(sae.W_dec.detach()), rtol=0, atol=1e-6)
    assert len(rows) == K
    x = batch(dtype=torch.float32)
    exported: Any = load_pretrained(tmp_path / "sae")
    numbers = {index: 3 * code for index, code in units.codes_of_direction(2, exported.W_dec).items()}
    steered = steer(x, exported, lambda acts: change_latents(acts, numbers))
    torch.testing.assert_close(steered, x + 3 * torch.from_numpy(rows[2]), rtol=0, atol=1e-5)
