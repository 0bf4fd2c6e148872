"""Thresholds that replace BatchTopK's ranking of a batch at inference, where each token is encoded without a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.compute.topk import largest_indices
from metasae_lightning.errors import InputError

PreActivations = Callable[[Tensor], Float[Tensor, "batch d_sae"]]
Rule = Literal["global", "rate", "eer"]
# A latent that fires less often than this on the sample gets the global threshold: its own rate is too uncertain. Under `rate` it keeps
# its own threshold if that is higher.
MIN_FIRINGS = 5
# Histogram bins over each latent's range, for the rule `eer`.
BINS = 1024


@dataclass(frozen=True)
class Calibration:
    """The thresholds of all latents, and the sample they were computed on."""

    threshold: Float[Tensor, " d_sae"]
    """A latent fires where its pre-activation exceeds its threshold."""
    rule: Rule
    """The rule they were computed by."""
    l0: float
    """Mean number of latents that fire per token of the sample, with these thresholds."""
    n_rare: int
    """Number of latents that got the global threshold (under `rate`, their own if higher), because they fired too rarely."""
    tokens: int
    """Number of tokens in the sample."""


@torch.no_grad()
def calibrate(pre_activations: PreActivations, samples: Sequence[Tensor], k: float, rule: Rule = "rate") -> Calibration:
    """Thresholds with which latents fire like under BatchTopK, computed on batches of held-out activations.

    `global`: one threshold for all latents, with which `k` of them fire per token. `rate`: a threshold per latent, with which it fires on
    as many tokens as under BatchTopK. `eer`: a threshold per latent with equal error rates, the fraction of its BatchTopK firings that it
    misses and the fraction of the other tokens on which it fires. Because a latent is silent on most tokens, `eer` makes it fire more
    often than BatchTopK does, and raises L0. Under `rate` and `eer` a latent with fewer than 5 firings gets the `global` threshold; under
    `rate` its own stays if that is higher.

    >>> scores = torch.tensor([[3.0, 0.1], [2.0, 0.2], [0.0, 1.0], [0.0, 0.3]])
    >>> calibrate(lambda x: x, [scores], k=0.75, rule="global").l0
    0.75
    """
    shared_threshold, _ = global_threshold(pre_activations, samples, k)
    width = pre_activations(samples[0][:1]).shape[1]
    threshold, is_rare = torch.full((width,), shared_threshold, dtype=torch.float64), torch.zeros(width, dtype=torch.bool)
    if rule != "global":
        own_threshold, firings = (_equal_rates if rule == "rate" else _equal_errors)(pre_activations, samples, k, width)
        is_rare = firings < MIN_FIRINGS
        # A latent that never fired must not start to: for it `own_threshold` is its largest value, which BatchTopK did not keep.
        rare_threshold = torch.maximum(threshold, own_threshold) if rule == "rate" else threshold
        threshold = torch.where(is_rare, rare_threshold, own_threshold)
    active = sum(int((pre_activations(x).relu() > threshold.to(x)).count_nonzero()) for x in samples)
    tokens = sum(len(x) for x in samples)
    return Calibration(threshold.float(), rule, active / tokens, int(is_rare.sum()), tokens)


def batchtopk_mask(values: Float[Tensor, "batch d_sae"], k: float) -> Float[Tensor, "batch d_sae"]:
    """Ones where BatchTopK keeps a pre-activation of the batch, zeros elsewhere."""
    flat = values.relu().flatten()
    mask = torch.zeros_like(flat)
    mask[largest_indices(flat, int(k * len(values)))] = 1
    return (mask * (flat > 0)).view_as(values)


def _equal_rates(pre_activations: PreActivations, samples: Sequence[Tensor], k: float, width: int) -> tuple[Tensor, Tensor]:
    """Per latent: the threshold that gives it its rate under BatchTopK, and its number of firings.

    The threshold lies midway between the latent's lowest kept value and the next lower one. A latent that never fired gets its largest
    collected value, or 0 without one.
    """
    firings, lowest = torch.zeros(width, dtype=torch.int64), float("inf")
    for x in samples:
        values = pre_activations(x).relu()
        mask = batchtopk_mask(values, k) > 0
        firings += mask.sum(0).cpu()
        lowest = min(lowest, values[mask].min().item() if mask.any() else lowest)
    # No batch keeps a value below `lowest`, so the values from `lowest` up are enough to find the n-th largest of each latent.
    latents, tops = list[Tensor](), list[Tensor]()
    for x in samples:
        values = pre_activations(x).relu()
        rows, columns = (values >= lowest).nonzero(as_tuple=True) if lowest < float("inf") else (torch.empty(0).long(),) * 2
        latents.append(columns.cpu())
        tops.append(values[rows, columns].double().cpu())
    latent, value = torch.cat(latents), torch.cat(tops)
    order = value.argsort(descending=True)
    order = order[latent[order].argsort(stable=True)]
    counts = torch.bincount(latent, minlength=width)
    begins = counts.cumsum(0) - counts
    value = torch.cat([value[order], torch.zeros(1, dtype=torch.float64)])
    last = torch.where(firings > 0, value[(begins + firings - 1).clamp(0, len(value) - 1)], float("inf"))
    # A latent all of whose collected values fire: its next value was not collected, but is below `lowest`.
    below_lowest = lowest * (1 - 2**-20) if lowest < float("inf") else 0.0
    uncollected = torch.where(firings > 0, below_lowest, 0.0)
    next_value = torch.where(counts > firings, value[(begins + firings).clamp(max=len(value) - 1)], uncollected)
    return torch.where(firings > 0, (last + next_value) / 2, next_value), firings


def _equal_errors(pre_activations: PreActivations, samples: Sequence[Tensor], k: float, width: int) -> tuple[Tensor, Tensor]:
    """Per latent: the threshold of equal error rates, from histograms of the values that BatchTopK keeps and drops; and its firings."""
    top = torch.stack([pre_activations(x).relu().amax(0).double().cpu() for x in samples]).amax(0).clamp(min=1e-12)
    histograms = torch.zeros(2, width * BINS, dtype=torch.float64)
    for x in samples:
        values = pre_activations(x).relu()
        mask = (batchtopk_mask(values, k) > 0).cpu().flatten()
        bins = (values.double().cpu() / top * BINS).long().clamp(max=BINS - 1) + torch.arange(width) * BINS
        for histogram, chosen in zip(histograms, (mask, ~mask), strict=True):
            histogram += torch.bincount(bins.flatten()[chosen], minlength=width * BINS)
    hits, others = histograms.view(2, width, BINS)
    at = functional.equal_error_bin(hits, others)
    return top * at / BINS, hits.sum(1).long()


@torch.no_grad()
def global_threshold(
    pre_activations: PreActivations,
    samples: Sequence[Tensor],
    target_l0: float,
    *,
    now: Tensor | float = 0.0,
) -> tuple[float, float]:
    """The threshold for all latents with which L0 is `target_l0` on these samples, up to ties; and the L0 with the thresholds `now`.

    The threshold lies midway between the `target_l0 * tokens`-th largest pre-activation of the sample and the next. If the next is
    not positive, the threshold is 0, and L0 is at or below the target. Only values above a cut are collected. The cut is set by the
    largest `margin * target_l0` values per token of the first batch; where too few values exceed it, the pass is repeated with twice the
    margin. A NaN or infinity is an error.

    >>> global_threshold(lambda x: x, [torch.tensor([[3.0, 1.0], [2.0, 0.5]])], target_l0=1.0)
    (1.5, 2.0)
    """
    tokens = sum(len(x) for x in samples)
    count, margin = max(1, round(target_l0 * tokens)), 2.0
    while True:
        collected: list[Tensor] = []
        cut, active = 0.0, 0
        for x in samples:
            values = pre_activations(x).relu().flatten()
            if not values.isfinite().all():
                raise InputError("the SAE has diverged: its activations are not finite, and no threshold can be set")
            active += int((values.view(len(x), -1) > now).count_nonzero())
            n_largest = int(margin * target_l0 * len(x)) + 1
            if not collected and n_largest < int(values.count_nonzero()):
                cut = values[largest_indices(values, n_largest)].min().item()
            collected.append(values[values > cut])
        pooled = torch.cat(collected)
        if pooled.numel() > count:
            last_kept, first_dropped = pooled.topk(count + 1).values[-2:].tolist()
            return (last_kept + first_dropped) / 2, active / tokens
        if cut == 0:
            return 0.0, active / tokens
        margin *= 2
