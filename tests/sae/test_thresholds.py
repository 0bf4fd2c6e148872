"""Thresholds: each rule against what it promises, on pre-activations whose distribution is known."""

import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from metasae_lightning import functional
from metasae_lightning.sae.thresholds import batchtopk_mask, calibrate, global_threshold

K = 3.0


def scores(seed: int, batches: int = 40, rows: int = 256, latents: int = 64) -> list[torch.Tensor]:
    """Latents of very different rates and sizes; a token has a level of its own, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-0.5, 0.5, latents)
    shift = torch.linspace(-2.5, -0.5, latents)
    level = 1 + 0.3 * torch.randn(batches, rows, 1, generator=generator)
    x = level * (torch.randn(batches, rows, latents, generator=generator) + shift) * size
    return list(x)


def rates(batches: list[torch.Tensor], threshold: torch.Tensor) -> torch.Tensor:
    return sum((x.relu() > threshold).sum(0) for x in batches) / sum(map(len, batches))


def test_rate_fires_as_often_as_batchtopk_exactly_on_the_sample_and_nearly_on_fresh_tokens():
    sample, fresh = scores(0), scores(1)
    found = calibrate(lambda x: x, sample, K)
    wanted = sum(batchtopk_mask(x, K).sum(0) for x in sample)
    own = wanted >= 5
    assert torch.equal((rates(sample, found.threshold) * found.tokens).round()[own], wanted[own])
    assert found.n_rare == int((~own).sum()) and found.tokens == 40 * 256
    assert found.l0 == pytest.approx(K, rel=0.01)
    l0 = rates(fresh, found.threshold).sum().item()
    assert l0 == pytest.approx(K, rel=0.02)


def test_equal_error_rates_are_equal_and_inflate_l0():
    sample = scores(0, batches=1280, rows=8)  # small batches, whose cuts lie far apart
    found = calibrate(lambda x: x, sample, K, "eer")
    for latent in range(20, 64, 7):
        values = torch.cat([x[:, latent].relu() for x in sample])
        hits = torch.cat([batchtopk_mask(x, K)[:, latent] for x in sample]).bool()
        fires = values > found.threshold[latent]
        missed, false = (hits & ~fires).sum() / hits.sum(), (~hits & fires).sum() / (~hits).sum()
        assert missed.item() == pytest.approx(false.item(), abs=0.02)
    assert found.l0 > 1.05 * K


def test_the_crossing_of_two_normals_is_found():
    # Hits around 3, others around 0, of spread 1 and 1: equal errors half way, at 1.5.
    edges = torch.linspace(-4, 8, 2401, dtype=torch.float64)
    mass = [torch.from_numpy(norm.cdf(edges[1:], m) - norm.cdf(edges[:-1], m))[None] for m in (3.0, 0.0)]
    at = functional.equal_error_bin(*mass)
    expected = brentq(lambda t: norm.cdf(t, 3.0) - norm.sf(t, 0.0), 0, 3)
    assert edges[int(at)].item() == pytest.approx(expected, abs=0.01)


def test_global_is_one_threshold_and_k_a_token():
    found = calibrate(lambda x: x, scores(0), K, "global")
    assert found.threshold.unique().numel() == 1 and found.l0 == pytest.approx(K, rel=1e-3) and found.n_rare == 0


# A latent that never fired under BatchTopK stays silent; one with a handful takes the common threshold if its own is lower.
def test_latents_with_few_firings_are_counted_and_do_not_begin_to_fire():
    sample = [x.clone() for x in scores(0)]
    for x in sample:
        x[:, 0] = 0.9 * global_threshold(lambda y: y, [x], K)[0] * torch.rand(len(x), generator=torch.Generator().manual_seed(0))
        x[:, 1] = -1.0
    found = calibrate(lambda x: x, sample, K)
    assert found.n_rare >= 2
    assert rates(sample, found.threshold)[:2].tolist() == [0.0, 0.0]


def test_values_of_any_size_are_calibrated():
    # Histograms with fixed bins clip; activations of 35 and of 35,000 are the same up to their unit.
    small, large = (calibrate(lambda x, unit=unit: x * unit, scores(0), K, "eer") for unit in (1.0, 1000.0))
    assert large.l0 == pytest.approx(small.l0, rel=0.01)
    torch.testing.assert_close(large.threshold / 1000, small.threshold, rtol=0.02, atol=1e-3)


# One batch offers nothing below what it kept: a threshold must not lie half way down to 0.
@pytest.mark.parametrize(("batches", "rows"), [(1, 4096), (4, 1024)])
def test_rate_holds_on_a_few_large_batches(batches: int, rows: int):
    found = calibrate(lambda x: x, scores(0, batches, rows), K)
    assert found.l0 == pytest.approx(K, rel=0.01)
    assert rates(scores(1), found.threshold).sum().item() == pytest.approx(K, rel=0.03)
