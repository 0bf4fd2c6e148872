"""Comparison of two SAEs: matched latents, splits, and intervals and p values of the differences of their measures."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metasae_lightning import functional
from metasae_lightning.cli import main
from metasae_lightning.data.recipe import data_of
from metasae_lightning.evaluation.bootstrap import PhiByGroup, jackknife_interval
from metasae_lightning.evaluation.compare import FIGURES, LOSSES, Matches, best_matches, compare, match_decoder_rows, permutation_p, splits
from metasae_lightning.evaluation.evaluate import evaluate
from metasae_lightning.evaluation.saes import load_sae
from metasae_lightning.evaluation.settings import Settings
from metasae_lightning.metrics import Phi
from metasae_lightning.metrics.firings import Firings
from metasae_lightning.step import Codes
from tests.evaluation.test_evaluate import QUICK
from tests.helpers.judged import write_run

N = 4000


def firings_of(dense: torch.Tensor) -> Firings:
    latents = dense.nonzero()[:, 1].int()
    return Firings.of(latents, dense.sum(1).int(), dense.shape[1])


def random_firings(rates: list[float], seed: int, tokens: int = N) -> torch.Tensor:
    return (torch.rand(tokens, len(rates), generator=torch.Generator().manual_seed(seed)) < torch.tensor(rates)).float()


def test_best_matches_equal_topk_of_the_full_phi_matrix_in_both_directions():
    dense_a, dense_b = random_firings([0.02, 0.1, 0.3, 0.5, 0.0], 0), random_firings([0.05, 0.2, 0.4, 0.1, 0.1, 0.01, 1.0], 1)
    dense_b[:, 4] = dense_a[:, 1]
    metric = Phi(5, 7)
    metric.update(Codes.from_dense(dense_a), Codes.from_dense(dense_b))
    full_phi = torch.cat([phi for _, phi in metric.tiles()]).float()
    for memory_gib in (2.0, 2 * 7 * 64 / 2**30):  # all latents in one chunk; chunks of two latents
        forward, backward = best_matches(firings_of(dense_a), firings_of(dense_b), memory_gib)
        for matches, expected in ((forward, full_phi.topk(3)), (backward, full_phi.T.topk(3))):
            is_nonzero = expected.values > 0  # latents that never or always fire tie at phi 0
            assert torch.equal(matches.phi, expected.values) and torch.equal(matches.latent[is_nonzero], expected.indices[is_nonzero])
        assert forward.latent[1, 0] == 4 and backward.latent[4, 0] == 1 and forward.phi[1, 0] == 1
    assert forward.live.tolist() == [True, True, True, True, False] and backward.live.tolist()[-1] is False
    assert forward.figures()["above_0.7"] == 0.25


# `parent` fires where `left` or `right` does, and these two never fire together: the cleanest possible split.
# The two copies fire on all tokens of `parent` and on a few more.
def test_splits_reports_both_parts_and_the_lower_bound_on_their_phi():
    left, right, other = random_firings([0.05], 0)[:, 0], random_firings([0.05], 1)[:, 0], random_firings([0.1], 2)[:, 0]
    right = right * (1 - left)
    parent, extra = ((left + right) > 0).float(), random_firings([0.002, 0.002], 3)
    twins = ((parent[:, None] + extra) > 0).float()
    dense, parts, copies = torch.stack([other, parent], 1), torch.stack([left, right], 1), torch.cat([twins, other[:, None]], 1)
    forward, _ = best_matches(firings_of(dense), firings_of(parts), 2.0)
    (clean_split,) = splits(forward, firings_of(parts))
    assert clean_split["latent"] == 1 and sorted(clean_split["into"]) == [0, 1]
    # Two latents that never fire together and whose union is a third one attain the bound.
    assert clean_split["bound"] == pytest.approx(clean_split["phi_between"], abs=1e-6) and clean_split["phi_between"] < 0
    forward, _ = best_matches(firings_of(dense), firings_of(copies), 2.0)
    (split_into_copies,) = [split for split in splits(forward, firings_of(copies)) if split["latent"] == 1]
    assert sorted(split_into_copies["into"]) == [0, 1] and 0.8 < split_into_copies["bound"] <= split_into_copies["phi_between"]


@given(st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_cofiring_bound_is_never_above_the_correlation_of_the_two_parts(seed: int):
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(60, 1, generator=generator)
    dense = (torch.rand(60, 3, generator=generator) * 0.5 + base > 0.8).double()
    correlations = torch.corrcoef(dense.T)
    if correlations.isfinite().all():
        bound = functional.cofiring_bound(correlations[0, 1], correlations[0, 2])
        assert bound <= correlations[1, 2] + 1e-9


def test_match_decoder_rows_undoes_a_permutation_and_its_sparse_path_equals_the_dense_one():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(80, 16, generator=generator)
    permutation = torch.randperm(80, generator=generator)
    matched, partners, cosines = match_decoder_rows(rows, 3 * rows[permutation])
    assert torch.equal(permutation[partners[matched.argsort()]], torch.arange(80)) and cosines.min() > 0.999
    noisy = rows[permutation][:70] + 0.3 * torch.randn(70, 16, generator=generator)
    dense_match = match_decoder_rows(noisy, rows)
    sparse_match = match_decoder_rows(noisy, rows, dense=10)
    assert torch.equal(dense_match[1][dense_match[0].argsort()], sparse_match[1][sparse_match[0].argsort()])
    assert sparse_match[2].sum().item() == pytest.approx(dense_match[2].sum().item(), rel=1e-6)
    # A row whose nearest rows are all matched to others has no match.
    partial_match = match_decoder_rows(torch.ones(3, 4), torch.eye(4)[:2] + 1, dense=1, nearest=2)
    assert len(partial_match[0]) == 2


def document_clustered_codes(documents: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of 40 independent latents, each of which can fire in a random half of the documents only, and document ids."""
    generator = torch.Generator().manual_seed(seed)
    can_fire = (torch.rand(documents, 40, generator=generator) < 0.5).float().repeat_interleave(20, 0)
    dense = (torch.rand(documents * 20, 40, generator=generator) < 0.2 * can_fire).float()
    return dense, torch.arange(documents).repeat_interleave(20)


# Two draws from one distribution differ by chance only: the 95 % interval of their difference covers 0 in about 95 of 100 seeds, and its
# standard error is near the spread of the difference over seeds.
def test_jackknife_interval_of_a_difference_in_cofiring_covers_zero_under_the_null():
    n_covering, points, widths = 0, list[float](), list[float]()
    for seed in range(100):
        excess, without_each = list[float](), list[torch.Tensor]()
        for half in (0, 1):
            dense, group = document_clustered_codes(60, 2 * seed + half)
            counts = PhiByGroup(40, 60, matchings=8)
            counts.update(Codes.from_dense(dense), group)
            excess.append(counts.excess(torch.ones(1, 60, dtype=torch.float64)).item())
            without_each.append(counts.without_each())
        low, high = jackknife_interval(excess[1] - excess[0], without_each[1] - without_each[0])
        n_covering += low <= 0 <= high
        points.append(excess[1] - excess[0])
        widths.append((high - low) / (2 * 1.96))
    spread = torch.tensor(points).std().item()
    print(f"{n_covering} of 100 intervals cover 0; standard error {sum(widths) / 100:.2e}, spread over seeds {spread:.2e}")
    assert n_covering >= 88
    # The jackknife of a mean of absolute values errs on the wide side.
    assert 0.9 * spread < sum(widths) / 100 < 1.8 * spread


def test_permutation_p_is_small_for_a_shift_and_uniform_under_the_null():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, generator=generator)
    assert permutation_p(noise + 0.5, 999) == 0.001
    p_values = torch.tensor([permutation_p(torch.randn(50, generator=generator), 199, seed) for seed in range(200)])
    assert (p_values <= 0.05).float().mean().item() == pytest.approx(0.05, abs=0.04)
    assert p_values.mean().item() == pytest.approx(0.5, abs=0.07)


def test_comparing_an_sae_with_a_copy_gives_zero_differences_and_perfect_matches(tmp_path: Path):
    run_a, run_b = write_run(tmp_path, "one"), write_run(tmp_path, "two")
    a, b = evaluate([load_sae(str(run_a)), load_sae(str(run_b))], data_of(run_a / "config.yaml"), Settings(**QUICK))
    comparison = compare(a, b, Settings(**QUICK))
    for name in ("fvu", "l0", "cosine", "ce_sae", "kl"):
        entry = comparison["differences"][name]
        assert entry["difference"] == 0 and entry["interval"] == [0, 0] and entry["p"] == 1, name
    assert comparison["cross_phi"]["a_in_b"]["above_0.7"] == 1
    assert comparison["cross_phi"]["a_in_b_by_chance"]["q90"] < 0.5
    assert comparison["matching"]["a"] == comparison["matching"]["b"] and comparison["matching"]["mean_cosine"] == pytest.approx(1)


# The permutation test swaps the sums of single documents, so these sums must add up to the reported figures.
def test_sums_by_document_add_up_to_the_reported_figures(tmp_path: Path):
    (evaluation,) = evaluate([load_sae(str(write_run(tmp_path, "one")))], data_of(tmp_path / "one" / "config.yaml"), Settings(**QUICK))
    _, sums, total = evaluation.collected.by_document
    tokens, spread = sums[:, 0].sum(), sums[:, 1].sum() - total.sum(0).square().sum() / sums[:, 0].sum()
    figures = evaluation.entry["figures"]
    for name, column in FIGURES.items():
        figure = sums[:, column].sum() / (spread if name == "fvu" else tokens)
        assert figure.item() == pytest.approx(figures["reconstruction"][name], rel=1e-6), name
    assert evaluation.spliced is not None
    for name, column in LOSSES.items():
        figure = evaluation.spliced.sums[:, column].sum() / evaluation.spliced.sums[:, 0].sum()
        assert figure.item() == pytest.approx(figures["splice"][name], rel=1e-6), name


def test_compare_command_writes_the_record_and_prints_differences_splits_and_contexts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    run_a, run_b = write_run(tmp_path, "one"), write_run(tmp_path, "two", seed=1, d_sae=64)
    args = [f"--{name}={value}" for name, value in QUICK.items()]
    assert main(["compare", str(run_a), str(run_b), *args]) == 0
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "runs" / "compare-one-two.json").read_text())
    assert record["a"]["rule"]["rule"] == record["b"]["rule"]["rule"] == "rate"
    fvu = record["differences"]["fvu"]
    assert fvu["interval"][0] <= fvu["difference"] <= fvu["interval"][1]
    assert [fvu["a"], fvu["b"]] == [record[side]["figures"]["reconstruction"]["fvu"] for side in ("a", "b")]
    assert fvu["difference"] == fvu["b"] - fvu["a"]
    assert len(record["best"]["a_in_b"]["latent"]) == 48 and len(record["best"]["b_in_a"]["latent"]) == 64
    assert record["splits"] and all(split["bound"] <= split["phi_between"] + 1e-6 for split in record["splits"])
    assert "two less one" in out and "one splits:" in out and "«" in out and "by chance" in out
    # The command does not write the evaluation records of the single runs.
    assert not (run_a / "evaluation.json").exists() and not (run_b / "evaluation.json").exists()


def test_matches_without_live_latents_have_a_nan_median_only():
    figures = Matches(torch.zeros(2, 1), torch.zeros(2, 1).long(), torch.zeros(2).bool()).figures()
    assert list(figures) == ["median"] and figures["median"] != figures["median"]
