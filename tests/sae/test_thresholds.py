"""Each threshold rule has its defining property, on pre-activations of a known distribution."""

import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from metasae_lightning import functional
from metasae_lightning.sae.thresholds import batchtopk_mask, calibrate, global_threshold

K = 3.0


def scores(seed: int, batches: int = 40, rows: int = 256, latents: int = 64) -> list[torch.Tensor]:
    """Batches of pre-activations: latents differ in rate and scale, and each token scales all of its values, as in real data."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-0.5, 0.5, latents)
    shift = torch.linspace(-2.5, -0.5, latents)
    level = 1 + 0.3 * torch.randn(batches, rows, 1, generator=generator)
    x = level * (torch.randn(batches, rows, latents, generator=generator) + shift) * size
    return list(x)


def rates(batches: list[torch.Tensor], threshold: torch.Tensor) -> torch.Tensor:
    """The firing rate of each latent with these thresholds."""
    return sum((x.relu() > threshold).sum(0) for x in batches) / sum(map(len, batches))


def test_rate_gives_the_firing_rates_of_batchtopk_exactly_on_the_sample_and_nearly_on_fresh_tokens():
    sample, fresh = scores(0), scores(1)
    result = calibrate(lambda x: x, sample, K)
    batchtopk_firings = sum(batchtopk_mask(x, K).sum(0) for x in sample)
    is_frequent = batchtopk_firings >= 5
    assert torch.equal((rates(sample, result.threshold) * result.tokens).round()[is_frequent], batchtopk_firings[is_frequent])
    assert result.n_rare == int((~is_frequent).sum()) and result.tokens == 40 * 256
    assert result.l0 == pytest.approx(K, rel=0.01)
    l0 = rates(fresh, result.threshold).sum().item()
    assert l0 == pytest.approx(K, rel=0.02)


def test_eer_gives_equal_error_rates_and_a_higher_l0():
    sample = scores(0, batches=1280, rows=8)  # BatchTopK's threshold varies much between small batches
    result = calibrate(lambda x: x, sample, K, "eer")
    for latent in range(20, 64, 7):
        values = torch.cat([x[:, latent].relu() for x in sample])
        hits = torch.cat([batchtopk_mask(x, K)[:, latent] for x in sample]).bool()
        fires = values > result.threshold[latent]
        missed, false = (hits & ~fires).sum() / hits.sum(), (~hits & fires).sum() / (~hits).sum()
        assert missed.item() == pytest.approx(false.item(), abs=0.02)
    assert result.l0 > 1.05 * K


def test_the_equal_error_bin_of_two_normals_is_half_way():
    # Values that BatchTopK keeps are around 3 and others around 0, both with standard deviation 1: error rates are equal at 1.5.
    edges = torch.linspace(-4, 8, 2401, dtype=torch.float64)
    mass = [torch.from_numpy(norm.cdf(edges[1:], m) - norm.cdf(edges[:-1], m))[None] for m in (3.0, 0.0)]
    bin_index = functional.equal_error_bin(*mass)
    expected = brentq(lambda t: norm.cdf(t, 3.0) - norm.sf(t, 0.0), 0, 3)
    assert edges[int(bin_index)].item() == pytest.approx(expected, abs=0.01)


def test_global_gives_all_latents_one_threshold_with_k_firings_per_token():
    result = calibrate(lambda x: x, scores(0), K, "global")
    assert result.threshold.unique().numel() == 1 and result.l0 == pytest.approx(K, rel=1e-3) and result.n_rare == 0


# A latent that never fired under BatchTopK stays silent; one with few firings gets the global threshold if its own is lower.
def test_rare_latents_are_counted_and_stay_silent():
    sample = [x.clone() for x in scores(0)]
    for x in sample:
        x[:, 0] = 0.9 * global_threshold(lambda y: y, [x], K)[0] * torch.rand(len(x), generator=torch.Generator().manual_seed(0))
        x[:, 1] = -1.0
    result = calibrate(lambda x: x, sample, K)
    assert result.n_rare >= 2
    assert rates(sample, result.threshold)[:2].tolist() == [0.0, 0.0]


def test_calibration_does_not_depend_on_the_unit_of_the_activations():
    # Histograms with fixed bins would clip activations of 35,000, which are 35 in another unit.
    small, large = (calibrate(lambda x, unit=unit: x * unit, scores(0), K, "eer") for unit in (1.0, 1000.0))
    assert large.l0 == pytest.approx(small.l0, rel=0.01)
    torch.testing.assert_close(large.threshold / 1000, small.threshold, rtol=0.02, atol=1e-3)


# With one batch, no value just below the active ones is collected: the threshold must not fall half way between them and 0.
@pytest.mark.parametrize(("batches", "rows"), [(1, 4096), (4, 1024)])
def test_rate_gives_the_target_l0_on_a_few_large_batches(batches: int, rows: int):
    result = calibrate(lambda x: x, scores(0, batches, rows), K)
    assert result.l0 == pytest.approx(K, rel=0.01)
    assert rates(scores(1), result.threshold).sum().item() == pytest.approx(K, rel=0.03)
