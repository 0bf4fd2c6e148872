"""Phi: against another implementation, in tiles, on two ranks, by chance and beyond it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom
from sklearn.metrics import matthews_corrcoef

from metasae_lightning import functional
from metasae_lightning.errors import InputError
from metasae_lightning.metrics import Phi, PhiSample
from metasae_lightning.metrics.cofiring import mean_phi_by_chance
from metasae_lightning.metrics.firings import PAIR_BYTES
from metasae_lightning.step import Codes
from tests.helpers.ranks import on_two_ranks


def fired(tokens: int, rates: torch.Tensor, seed: int) -> torch.Tensor:
    return (torch.rand(tokens, len(rates), generator=torch.Generator().manual_seed(seed)) < rates).float()


def matrix(metric: Phi) -> torch.Tensor:
    return torch.cat([phi for _, phi in metric.tiles()])


def seen(dense: torch.Tensor, other: torch.Tensor | None = None, batch: int = 100, **kw: Any) -> Phi:
    metric = Phi(dense.shape[1], None if other is None else other.shape[1], **kw)
    for begin in range(0, len(dense), batch):
        more = () if other is None else (Codes.from_dense(other[begin : begin + batch]),)
        metric.update(Codes.from_dense(dense[begin : begin + batch]), *more)
    return metric


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(st.integers(2, 300), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_phi_is_sklearns_matthews_correlation(tokens: int, seed: int):
    # The first latent never fires, the last always.
    dense = fired(tokens, torch.tensor([0.0, 0.02, 0.3, 0.5, 0.9, 1.0]), seed)
    found = matrix(seen(dense))
    for i in range(6):
        for j in range(6):
            assert found[i, j].item() == pytest.approx(matthews_corrcoef(dense[:, i], dense[:, j]), abs=1e-9)


def test_counts_are_exact_where_float16_and_float32_are_not():
    # 70,001 co-firings overflow float16; float32 stops counting at 2^24, which 32-bit integers do not.
    metric = seen(torch.ones(70_001, 2), batch=10_000)
    firings, other = metric.firings()
    ((_, counts),) = firings.cofirings(other, 2)
    assert counts.tolist() == [[70_001.0] * 2] * 2
    assert firings.matrix.dtype == "int32" and counts.dtype == torch.float64
    whole = torch.tensor(2.0**24 + 1, dtype=torch.float64)
    assert functional.phi(whole - 1, whole - 1, whole, float(whole) + 1) != functional.phi(whole, whole, whole, float(whole) + 1)


def test_tiles_cover_all_pairs_and_phi_within_equals_phi_with_itself():
    dense = fired(500, torch.linspace(0, 0.3, 23), 0)
    whole = seen(dense)
    tiled = seen(dense, memory_gib=5 * 23 * PAIR_BYTES / 2**30)
    assert (whole.rows, tiled.rows) == (23, 5)
    assert torch.equal(matrix(whole), matrix(tiled))
    assert torch.equal(matrix(whole), matrix(seen(dense, dense)))
    assert {k: v.item() for k, v in whole.compute().items()} == pytest.approx({k: v.item() for k, v in tiled.compute().items()}, rel=1e-12)
    assert tiled.plan().startswith("phi of 23 x 23 latents: 5 tiles of 5 latents")


def test_results_equal_those_of_the_dense_matrix():
    dense = fired(800, torch.linspace(0, 0.4, 40), 1)
    dense[:, 7] = dense[:, 8]
    figures = seen(dense).compute()
    live = (dense.sum(0) > 0) & (dense.sum(0) < 800)
    values = torch.corrcoef(dense[:, live].T.double())[tuple(torch.triu_indices(int(live.sum()), int(live.sum()), 1))]
    assert figures["pairs"] == len(values) and figures["live"] == live.sum() and figures["tokens"] == 800
    assert figures["mean_abs"].item() == pytest.approx(values.abs().mean().item(), abs=1e-12)
    assert figures["positive"].item() == pytest.approx((values > 0).double().mean().item())
    assert figures["above_0.1"].item() == pytest.approx((values.abs() > 0.1).double().mean().item(), abs=3e-3)
    for share in (0.5, 0.9, 0.99):
        assert figures[f"q{100 * share:g}"].item() == pytest.approx(values.abs().quantile(share).item(), abs=2e-3)


def test_the_floor_is_the_hypergeometric_mean_deviation():
    for n, a, b in ((2, 1, 1), (10, 3, 4), (10, 6, 7), (10, 10, 3), (10, 0, 3), (1000, 999, 3), (1000, 500, 500), (100_000, 30, 20)):
        x = np.arange(min(a, b) + 1)
        spread = (a * (n - a)) ** 0.5 * (b * (n - b)) ** 0.5
        expected = n * (hypergeom.pmf(x, n, a, b) * abs(x - a * b / n)).sum() / spread if spread else 0.0
        found = functional.phi_by_chance(torch.tensor(float(a)).double(), torch.tensor(float(b)).double(), float(n))
        assert found.item() == pytest.approx(float(expected), rel=1e-8, abs=1e-12)


def rates(d: int) -> torch.Tensor:
    """As dictionaries have them: from one token in a thousand to one in five."""
    return torch.logspace(-3, -0.7, d)


# Of 100 seeds 95 lie within 1.96 standard errors: a stated error that is too wide is wrong too.
def test_independent_latents_exceed_the_floor_by_nothing_but_its_error():
    scores, sampled = [], []
    for seed in range(100):
        dense = fired(1500, rates(60), seed)
        figures = seen(dense, batch=1500).compute()
        scores.append((figures["excess"] / figures["standard_error"]).item())
        estimate = PhiSample(60, matchings=20, seed=seed)
        estimate.update(Codes.from_dense(dense))
        figures = estimate.compute()
        sampled.append((figures["excess"] / figures["standard_error"]).item())
    for found in (torch.tensor(scores), torch.tensor(sampled)):
        inside = int((found.abs() < 1.96).sum())
        print(f"{inside} of 100 seeds within 1.96 standard errors, mean {found.mean():.2f}, spread {found.std():.2f}")
        assert 90 <= inside <= 99
        assert abs(found.mean()) < 0.3


def test_planted_correlation_is_recovered():
    dense = fired(20_000, rates(60), 0)
    both = torch.rand(20_000, generator=torch.Generator().manual_seed(1)) < 0.1
    for pair in range(0, 20, 2):  # ten pairs of 1,770 that fire together on a tenth of the tokens
        dense[both, pair] = dense[both, pair + 1] = 1
        both = both.roll(997)
    figures = seen(dense, batch=5000).compute()
    independent = torch.corrcoef(dense.T.double())
    planted = independent[tuple(torch.tensor([(i, i + 1) for i in range(0, 20, 2)]).T)].sum() / 1770
    assert figures["excess"] > 20 * figures["standard_error"]
    # The other pairs stand on the floor.
    assert figures["excess"].item() == pytest.approx(planted.item(), abs=3 * figures["standard_error"].item() + 1e-3)


def test_phi_sample_equals_phi_on_its_own_pairs():
    dense = fired(2000, torch.linspace(0.01, 0.5, 31), 3)
    estimate = PhiSample(31, matchings=4)
    for part in dense.split(300):
        estimate.update(Codes.from_dense(part))
    pairs = (estimate.partner >= 0).nonzero()
    assert len(pairs) == 4 * 15
    for matching, low in pairs.tolist():
        assert estimate.together[matching, low] == (dense[:, low] * dense[:, estimate.partner[matching, low]]).sum()
    whole = seen(dense).compute()
    found = estimate.compute()
    assert abs(found["mean_abs"] - whole["mean_abs"]) < 4 * found["standard_error"]


def test_mean_phi_by_chance_between_saes_is_the_mean_over_all_pairs():
    n_i, n_j = torch.tensor([3.0, 5.0, 5.0]).double(), torch.tensor([2.0, 9.0]).double()
    expected = functional.phi_by_chance(n_i[:, None], n_j[None], 20.0)
    mean, error = mean_phi_by_chance(n_i, n_j, 20.0, within=False)
    assert mean == pytest.approx(expected.mean().item())
    assert error == pytest.approx(((1 / 19 - expected.square()).sum().sqrt() / 6).item())


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (lambda: Phi(3, memory_gib=0), "memory_gib must be more than 0"),
        (lambda: Phi(3).update(Codes.from_dense(torch.ones(2, 4))), "codes of 4 latents, expected 3"),
        (lambda: Phi(3, 2).update(Codes.from_dense(torch.ones(2, 3))), "takes both SAEs' codes between two"),
        (
            lambda: Phi(3, 2).update(Codes.from_dense(torch.ones(2, 3)), Codes.from_dense(torch.ones(1, 2))),
            "of the same tokens, got 2 and 1",
        ),
        (lambda: Phi(3).compute(), "nothing was seen yet"),
        (lambda: PhiSample(1), "two latents and a matching"),
    ],
)
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_invalid_arguments_are_errors(what: Any, says: str):
    with pytest.raises(InputError, match=says):
        what()


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    dense = fired(600, torch.linspace(0, 0.3, 20), 5)
    metrics = {"phi": Phi(20), "sample": PhiSample(20)}
    share = dense[:250] if rank == 0 else dense[250:]  # ranks may hold unequal shares
    for metric in metrics.values():
        metric.update(Codes.from_dense(share))
    torch.save({name: metric.compute() for name, metric in metrics.items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_results_of_one(tmp_path: Path):
    dense = fired(600, torch.linspace(0, 0.3, 20), 5)
    alone = {"phi": seen(dense).compute(), "sample": PhiSample(20)}
    alone["sample"].update(Codes.from_dense(dense))
    alone["sample"] = alone["sample"].compute()
    on_two_ranks(on_rank, tmp_path)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found == alone
