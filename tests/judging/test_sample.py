"""The stratified sample of latents, and pairs of latents between arms."""

import pytest
import torch

from metasae_lightning.errors import InputError
from metasae_lightning.judging.texts.sample import paired_latents, sample_arms, sample_latents

# 300 live latents with densities from 1e-4 to 0.1, evenly on a logarithmic scale, in random places among 400.
PLACES = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:300]
DENSITY = torch.zeros(400).index_put((PLACES,), torch.logspace(-4, -1, 300))


def test_a_sample_has_equal_numbers_from_each_bin_of_density():
    sample = sample_latents(DENSITY, 50)
    assert len(set(sample)) == 50 and sample == sorted(sample)
    # 300 latents on 3 decades in 10 bins: a bin is 0.3 decades.
    bins = ((DENSITY[sample].log10() + 4) / 0.3).floor().clamp(0, 9).long()
    assert bins.bincount(minlength=10).tolist() == [5] * 10
    # Without bins the numbers differ.
    plain = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:50] // 30
    assert plain.bincount(minlength=10).tolist() != [5] * 10


@pytest.mark.parametrize("count", [1, 7, 23, 299])
def test_a_count_that_is_no_multiple_of_the_bins_is_kept(count: int):
    sample = sample_latents(DENSITY, count)
    assert len(set(sample)) == count and (DENSITY[sample] > 0).all()
    bins = ((DENSITY[sample].log10() + 4) / 0.3).floor().clamp(0, 9).long().bincount(minlength=10)
    assert bins.max() - bins.min() <= 1


def test_a_sample_is_reproducible_and_depends_on_the_seed():
    assert sample_latents(DENSITY, 50, seed=1) == sample_latents(DENSITY, 50, seed=1)
    assert sample_latents(DENSITY, 50, seed=1) != sample_latents(DENSITY, 50, seed=2)


def test_a_sample_of_all_live_latents_and_of_none():
    assert sample_latents(DENSITY, 1000) == sorted(PLACES.tolist())
    assert sample_latents(torch.zeros(5), 3) == []
    with pytest.raises(InputError, match="count: at least 1 latent, not 0"):
        sample_latents(DENSITY, 0)


# The second decoder has the rows of the first in another order, with noise that differs from row to row.
def shuffled(noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    W = torch.nn.functional.normalize(torch.randn(40, 64, generator=generator), dim=1)
    order = torch.randperm(40, generator=generator)
    other = torch.nn.functional.normalize(torch.randn(40, 64, generator=generator), dim=1)
    return W, (W + noise[:, None] * other)[order], order


def test_pairs_are_the_same_rows_in_another_order_and_weak_ones_are_dropped():
    # Noise of length 0.1 gives a cosine of about 1 / sqrt(1.01); of length 3, of about 1 / sqrt(10).
    noise = torch.where(torch.arange(40) < 30, 0.1, 3.0)
    W, other, order = shuffled(noise)
    everything = torch.ones(40, dtype=torch.bool)
    pairs = paired_latents(W, other, live_a=everything, live_b=everything, threshold=0.7)
    assert pairs.a == list(range(30)) and order[pairs.b].tolist() == pairs.a
    assert min(pairs.cosine) > 0.95
    cosines = torch.nn.functional.cosine_similarity(W[pairs.a], other[pairs.b])
    assert pairs.cosine == pytest.approx(cosines.tolist(), abs=1e-6)
    all_pairs = paired_latents(W, other, live_a=everything, live_b=everything, threshold=-1)
    assert len(all_pairs.a) == 40 == len(set(all_pairs.b))


def test_dead_latents_have_no_partner():
    W, other, order = shuffled(torch.full((40,), 0.1))
    live_a, live_b = torch.arange(40) != 3, order != 5
    pairs = paired_latents(W, other, live_a=live_a, live_b=live_b, threshold=0.7)
    assert pairs.a == [latent for latent in range(40) if latent not in (3, 5)] and order[pairs.b].tolist() == pairs.a


def test_arms_have_the_partners_of_the_first_arms_sample_and_a_sample_of_their_own():
    W, other, order = shuffled(torch.full((40,), 0.1))
    density = torch.linspace(0.01, 0.1, 40)
    density[7] = 0
    arms = sample_arms({"solo": W, "joint": other}, {"solo": density, "joint": density[order]}, 10, seed=4)
    solo, joint = arms["solo"], arms["joint"]
    assert len(solo.own_sample) == len(joint.own_sample) == 10 and not solo.partners and 7 not in solo.own_sample
    assert list(joint.partners) == solo.own_sample and [int(order[b]) for b in joint.partners.values()] == solo.own_sample
    assert min(joint.cosines.values()) > 0.9 and joint.cosines.keys() == joint.partners.keys()
    assert joint.latents == sorted({*joint.own_sample, *joint.partners.values()})
    # The samples are independent: the same density under another arm's place gives another sample.
    both = sample_arms({"a": W, "b": W}, {"a": density, "b": density}, 10, seed=4)
    assert both["a"].own_sample == solo.own_sample != both["b"].own_sample
