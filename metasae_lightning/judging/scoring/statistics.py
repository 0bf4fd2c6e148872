"""Means of scores over latents and differences between arms, with their intervals."""

from dataclasses import dataclass
from math import nan

import torch
from jaxtyping import Float, Int
from scipy.stats import binomtest
from torch import Tensor

from metasae_lightning.evaluation.bootstrap import bootstrap_weights, interval

Scores = Float[Tensor, "seed latent"]


@dataclass(frozen=True)
class Mean:
    """A mean over latents, each latent's score averaged over seeds."""

    value: float
    """The mean; NaN without latents."""
    low: float
    """Lower end of the 95 % bootstrap interval over latents."""
    high: float
    """Upper end of the interval."""
    latents: int
    """Number of latents."""
    seed_deviation: float
    """Standard deviation over seeds of the mean over latents; NaN for a single seed."""


@dataclass(frozen=True)
class Difference(Mean):
    """A mean difference between two arms, the second minus the first. `latents` counts the pairs, or the latents of the smaller arm."""

    sign_p: float = nan
    """Two-sided p value of the sign test over pairs without ties; NaN for arms that are not paired."""


def mean_over_latents(scores: Scores, *, resamples: int, seed: int = 0) -> Mean:
    """The mean score and its interval. A latent with a NaN in some seed is left out.

    >>> mean_over_latents(torch.tensor([[0.5, 1.0, torch.nan]]), resamples=10).value
    0.75
    """
    known = scores.double()[:, scores.isfinite().all(0)]
    if not known.shape[1]:
        return Mean(nan, nan, nan, 0, nan)
    by_latent = known.mean(0)
    low, high = interval(_resampled_means(by_latent, resamples, seed))
    deviation = known.mean(1).std().item() if len(known) > 1 else nan
    return Mean(by_latent.mean().item(), low, high, len(by_latent), deviation)


def paired_difference(first: Scores, second: Scores, *, resamples: int, seed: int = 0) -> Difference:
    """The mean of second minus first over pairs of latents: column i of `first` and column i of `second` are a pair.

    >>> paired_difference(torch.zeros(1, 6), torch.ones(1, 6), resamples=10).sign_p
    0.03125
    """
    change = second.double() - first.double()
    mean = mean_over_latents(change, resamples=resamples, seed=seed)
    by_latent = change[:, change.isfinite().all(0)].mean(0)
    higher, lower = int((by_latent > 0).sum()), int((by_latent < 0).sum())
    p = float(binomtest(higher, higher + lower).pvalue) if higher + lower else nan
    return Difference(**vars(mean), sign_p=p)


def unpaired_difference(
    first: Float[Tensor, "seed latent"], second: Float[Tensor, "seed other"], *, resamples: int, seed: int = 0
) -> Difference:
    """The mean of `second` minus the mean of `first`. The latents of the two arms are resampled independently.

    >>> unpaired_difference(torch.zeros(1, 3), torch.ones(1, 4), resamples=10).value
    1.0
    """
    sides = [mean_over_latents(side, resamples=resamples, seed=seed) for side in (first, second)]
    if not min(side.latents for side in sides):
        return Difference(nan, nan, nan, 0, nan)
    by_latent = [side.double()[:, side.isfinite().all(0)].mean(0) for side in (first, second)]
    resampled = [_resampled_means(values, resamples, seed + number) for number, values in enumerate(by_latent)]
    low, high = interval(resampled[1] - resampled[0])
    by_seed = [side.double()[:, side.isfinite().all(0)].mean(1) for side in (first, second)]
    deviation = (by_seed[1] - by_seed[0]).std().item() if len(by_seed[0]) > 1 else nan
    return Difference(sides[1].value - sides[0].value, low, high, min(side.latents for side in sides), deviation)


def best_threshold(probabilities: Float[Tensor, " answer"], is_true: Int[Tensor, " answer"]) -> float:
    """The smallest probability of "yes" that counts as yes, chosen for the largest balanced accuracy; 0.5 if all truths are equal.

    It lies in the middle between two neighbouring probabilities.

    >>> round(best_threshold(torch.tensor([0.1, 0.2, 0.6]), torch.tensor([0, 1, 1])), 3)
    0.15
    """
    values, order = probabilities.double().sort()
    truth = is_true[order].double()
    positives, negatives = truth.sum(), (1 - truth).sum()
    if not (positives and negatives):
        return 0.5
    # Cut i leaves the i smallest probabilities below the threshold.
    below = torch.cat([torch.zeros(1), (1 - truth).cumsum(0)]) / negatives
    missed = torch.cat([torch.zeros(1), truth.cumsum(0)]) / positives
    accuracy = (below + 1 - missed) / 2
    # Equal probabilities cannot be told apart by a threshold.
    accuracy[1:-1][values[1:] == values[:-1]] = -1.0
    cut = int(accuracy.argmax())
    ends = torch.cat([values[:1] - 1, values, values[-1:] + 1])
    return float((ends[cut] + ends[cut + 1]) / 2)


def _resampled_means(values: Float[Tensor, " latent"], resamples: int, seed: int) -> Float[Tensor, " resample"]:
    """The mean over the latents of each resample; NaN for a single latent, because it has no spread."""
    if len(values) < 2:
        return torch.full((resamples,), torch.nan, dtype=torch.float64)
    return bootstrap_weights(len(values), resamples, seed) @ values / len(values)
