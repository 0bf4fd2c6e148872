"""Two SAEs: what corresponds, what splits, and which differences are more than the documents that were drawn."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metasae_lightning import functional
from metasae_lightning.cli import main
from metasae_lightning.cli.arguments import data_of
from metasae_lightning.evaluation.bootstrap import PhiByGroup, jackknife_interval
from metasae_lightning.evaluation.compare import FIGURES, LOSSES, Matches, best_matches, compare, match_decoder_rows, permutation_p, splits
from metasae_lightning.evaluation.evaluate import evaluate
from metasae_lightning.evaluation.saes import load_sae
from metasae_lightning.evaluation.settings import Settings
from metasae_lightning.metrics import Phi
from metasae_lightning.metrics.cofiring import Firings
from metasae_lightning.step import Codes
from tests.evaluation.test_evaluate import QUICK
from tests.helpers.judged import run

N = 4000


def made(dense: torch.Tensor) -> Firings:
    latents = dense.nonzero()[:, 1].int()
    return Firings.of(latents, dense.sum(1).int(), dense.shape[1])


def fired(rates: list[float], seed: int, tokens: int = N) -> torch.Tensor:
    return (torch.rand(tokens, len(rates), generator=torch.Generator().manual_seed(seed)) < torch.tensor(rates)).float()


def test_best_matches_are_those_of_the_whole_matrix_both_ways():
    one, two = fired([0.02, 0.1, 0.3, 0.5, 0.0], 0), fired([0.05, 0.2, 0.4, 0.1, 0.1, 0.01, 1.0], 1)
    two[:, 4] = one[:, 1]
    metric = Phi(5, 7)
    metric.update(Codes.from_dense(one), Codes.from_dense(two))
    whole = torch.cat([phi for _, phi in metric.tiles()]).float()
    for memory in (2.0, 2 * 7 * 64 / 2**30):  # at once, and two latents at a time
        forth, back = best_matches(made(one), made(two), memory)
        for found, expected in ((forth, whole.topk(3)), (back, whole.T.topk(3))):
            apart = expected.values > 0  # those that never or always fire tie at 0
            assert torch.equal(found.phi, expected.values) and torch.equal(found.latent[apart], expected.indices[apart])
        assert forth.latent[1, 0] == 4 and back.latent[4, 0] == 1 and forth.phi[1, 0] == 1
    assert forth.live.tolist() == [True, True, True, True, False] and back.live.tolist()[-1] is False
    assert forth.figures()["above_0.7"] == 0.25


# S fires where A or B does, which never fire together: no split could be cleaner. C and D fire wherever S does, and a little more.
def test_a_split_is_found_with_what_it_forces_between_its_parts():
    left, right, other = fired([0.05], 0)[:, 0], fired([0.05], 1)[:, 0], fired([0.1], 2)[:, 0]
    right = right * (1 - left)
    parent, extra = ((left + right) > 0).float(), fired([0.002, 0.002], 3)
    twins = ((parent[:, None] + extra) > 0).float()
    one, parts, copies = torch.stack([other, parent], 1), torch.stack([left, right], 1), torch.cat([twins, other[:, None]], 1)
    forth, _ = best_matches(made(one), made(parts), 2.0)
    (found,) = splits(forth, made(parts))
    assert found["latent"] == 1 and sorted(found["into"]) == [0, 1]
    # Two that never fire together and make up a third lie on the bound.
    assert found["bound"] == pytest.approx(found["phi_between"], abs=1e-6) and found["phi_between"] < 0
    forth, _ = best_matches(made(one), made(copies), 2.0)
    (doubled,) = [split for split in splits(forth, made(copies)) if split["latent"] == 1]
    assert sorted(doubled["into"]) == [0, 1] and 0.8 < doubled["bound"] <= doubled["phi_between"]


@given(st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_no_correlations_lie_below_the_bound(seed: int):
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(60, 1, generator=generator)
    dense = (torch.rand(60, 3, generator=generator) * 0.5 + base > 0.8).double()
    correlations = torch.corrcoef(dense.T)
    if correlations.isfinite().all():
        bound = functional.cofiring_bound(correlations[0, 1], correlations[0, 2])
        assert bound <= correlations[1, 2] + 1e-9


def test_matching_undoes_a_permutation_and_a_wide_one_finds_what_the_whole_matrix_does():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(80, 16, generator=generator)
    order = torch.randperm(80, generator=generator)
    one, other, cosines = match_decoder_rows(rows, 3 * rows[order])
    assert torch.equal(order[other[one.argsort()]], torch.arange(80)) and cosines.min() > 0.999
    noisy = rows[order][:70] + 0.3 * torch.randn(70, 16, generator=generator)
    whole = match_decoder_rows(noisy, rows)
    sparse = match_decoder_rows(noisy, rows, dense=10)
    assert torch.equal(whole[1][whole[0].argsort()], sparse[1][sparse[0].argsort()])
    assert sparse[2].sum().item() == pytest.approx(whole[2].sum().item(), rel=1e-6)
    # A row whose nearest all went to others has no match.
    few = match_decoder_rows(torch.ones(3, 4), torch.eye(4)[:2] + 1, dense=1, nearest=2)
    assert len(few[0]) == 2


def clustered(documents: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Independent latents, but for documents: a latent is on in some documents and off in others."""
    generator = torch.Generator().manual_seed(seed)
    on = (torch.rand(documents, 40, generator=generator) < 0.5).float().repeat_interleave(20, 0)
    dense = (torch.rand(documents * 20, 40, generator=generator) < 0.2 * on).float()
    return dense, torch.arange(documents).repeat_interleave(20)


# Two SAEs of the same kind differ by nothing but chance: intervals of their difference hold 0 in 95 of 100 seeds or more, and are no
# wider than the differences of the seeds make them but for a half.
def test_intervals_of_a_difference_in_cofiring_hold_what_they_say():
    inside, points, widths = 0, list[float](), list[float]()
    for seed in range(100):
        whole, without = list[float](), list[torch.Tensor]()
        for half in (0, 1):
            dense, group = clustered(60, 2 * seed + half)
            counts = PhiByGroup(40, 60, matchings=8)
            counts.update(Codes.from_dense(dense), group)
            whole.append(counts.excess(torch.ones(1, 60, dtype=torch.float64)).item())
            without.append(counts.without_each())
        low, high = jackknife_interval(whole[1] - whole[0], without[1] - without[0])
        inside += low <= 0 <= high
        points.append(whole[1] - whole[0])
        widths.append((high - low) / (2 * 1.96))
    spread = torch.tensor(points).std().item()
    print(f"{inside} of 100 intervals hold 0; standard error {sum(widths) / 100:.2e}, spread over seeds {spread:.2e}")
    assert inside >= 88
    # The jackknife of a mean of absolute values errs on the wide side.
    assert 0.9 * spread < sum(widths) / 100 < 1.8 * spread


def test_swapping_tells_a_difference_from_chance():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, generator=generator)
    assert permutation_p(noise + 0.5, 999) == 0.001
    scores = torch.tensor([permutation_p(torch.randn(50, generator=generator), 199, seed) for seed in range(200)])
    assert (scores <= 0.05).float().mean().item() == pytest.approx(0.05, abs=0.04)
    assert scores.mean().item() == pytest.approx(0.5, abs=0.07)


def test_an_sae_compared_with_itself_differs_in_nothing(tmp_path: Path):
    one, two = run(tmp_path, "one"), run(tmp_path, "two")
    a, b = evaluate([load_sae(str(one)), load_sae(str(two))], data_of(one / "config.yaml"), Settings(**QUICK))
    found = compare(a, b, Settings(**QUICK))
    for name in ("fvu", "l0", "cosine", "ce_sae", "kl"):
        of = found["differences"][name]
        assert of["difference"] == 0 and of["interval"] == [0, 0] and of["p"] == 1, name
    assert found["cross_phi"]["a_in_b"]["above_0.7"] == 1
    assert found["cross_phi"]["a_in_b_by_chance"]["q90"] < 0.5
    assert found["matching"]["a"] == found["matching"]["b"] and found["matching"]["mean_cosine"] == pytest.approx(1)


# What swapping swaps is a document's share of the figure that is reported.
def test_shares_of_documents_add_up_to_the_figures(tmp_path: Path):
    (found,) = evaluate([load_sae(str(run(tmp_path, "one")))], data_of(tmp_path / "one" / "config.yaml"), Settings(**QUICK))
    _, sums, total = found.collected.by_document
    tokens, spread = sums[:, 0].sum(), sums[:, 1].sum() - total.sum(0).square().sum() / sums[:, 0].sum()
    figures = found.entry["figures"]
    for name, place in FIGURES.items():
        share = sums[:, place].sum() / (spread if name == "fvu" else tokens)
        assert share.item() == pytest.approx(figures["reconstruction"][name], rel=1e-6), name
    assert found.spliced is not None
    for name, place in LOSSES.items():
        share = found.spliced.sums[:, place].sum() / found.spliced.sums[:, 0].sum()
        assert share.item() == pytest.approx(figures["splice"][name], rel=1e-6), name


def test_the_command_shows_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    one, two = run(tmp_path, "one"), run(tmp_path, "two", seed=1, d_sae=64)
    args = [f"--{name}={value}" for name, value in QUICK.items()]
    assert main(["compare", str(one), str(two), *args]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "runs" / "compare-one-two.json").read_text())
    assert found["a"]["rule"]["rule"] == found["b"]["rule"]["rule"] == "rate"
    fvu = found["differences"]["fvu"]
    assert fvu["interval"][0] <= fvu["difference"] <= fvu["interval"][1]
    assert [fvu["a"], fvu["b"]] == [found[side]["figures"]["reconstruction"]["fvu"] for side in ("a", "b")]
    assert fvu["difference"] == fvu["b"] - fvu["a"]
    assert len(found["best"]["a_in_b"]["latent"]) == 48 and len(found["best"]["b_in_a"]["latent"]) == 64
    assert found["splits"] and all(split["bound"] <= split["phi_between"] + 1e-6 for split in found["splits"])
    assert "two less one" in out and "one splits:" in out and "«" in out and "by chance" in out
    # What `metasae test` said of each alone is not written over.
    assert not (one / "evaluation.json").exists() and not (two / "evaluation.json").exists()


def test_matches_of_nothing_that_lives_are_none():
    figures = Matches(torch.zeros(2, 1), torch.zeros(2, 1).long(), torch.zeros(2).bool()).figures()
    assert list(figures) == ["median"] and figures["median"] != figures["median"]
