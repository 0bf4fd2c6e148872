"""Firing thresholds for inference, where no batch is there to rank latents against."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.compute.topk import largest
from metasae_lightning.errors import InputError

PreActivations = Callable[[Tensor], Float[Tensor, "batch d_sae"]]
Rule = Literal["global", "rate", "eer"]
# A rate known from fewer firings than this is hardly known: such a latent takes the one threshold of all.
FEW = 5
# Of each latent's own range, for equal error rates.
BINS = 1024


@dataclass(frozen=True)
class Calibration:
    """Thresholds, and what they were found on."""

    threshold: Float[Tensor, " d_sae"]
    """A latent fires above its own."""
    rule: Rule
    """How they were found."""
    l0: float
    """Mean number of latents that fire on a token of the sample, by these thresholds."""
    few: int
    """How many latents fired too rarely for a threshold of their own and took the one of all."""
    tokens: int
    """Tokens of the sample."""


@torch.no_grad()
def calibrate(pre_activations: PreActivations, samples: Sequence[Tensor], k: float, rule: Rule = "rate") -> Calibration:
    """Thresholds at which latents fire as BatchTopK has them fire on batches of held-out activations.

    `global`: one threshold, at which `k` latents fire on a token. `rate`: each latent's own, at which it fires on as many tokens as
    under BatchTopK. `eer`: each latent's own, at which as large a share of its firings is missed as of its silences is broken; a latent
    is silent so much oftener than not that this makes it fire more often than BatchTopK does, and L0 with it.

    >>> scores = torch.tensor([[3.0, 0.1], [2.0, 0.2], [0.0, 1.0], [0.0, 0.3]])
    >>> calibrate(lambda x: x, [scores], k=0.75, rule="global").l0
    0.75
    """
    one, _ = global_threshold(pre_activations, samples, k)
    width = pre_activations(samples[0][:1]).shape[1]
    threshold, few = torch.full((width,), one, dtype=torch.float64), torch.zeros(width, dtype=torch.bool)
    if rule != "global":
        found, firings = (_rates if rule == "rate" else _equal_errors)(pre_activations, samples, k, width)
        few = firings < FEW
        # What never fired must not begin to: its largest value is not above what BatchTopK asked for in that batch.
        threshold = torch.where(few, torch.maximum(threshold, found) if rule == "rate" else threshold, found)
    active = sum(int((pre_activations(x).relu() > threshold.to(x)).count_nonzero()) for x in samples)
    tokens = sum(len(x) for x in samples)
    return Calibration(threshold.float(), rule, active / tokens, int(few.sum()), tokens)


def kept(values: Float[Tensor, "batch d_sae"], k: float) -> Float[Tensor, "batch d_sae"]:
    """Which pre-activations BatchTopK keeps of a batch, as ones."""
    flat = values.relu().flatten()
    mask = torch.zeros_like(flat)
    mask[largest(flat, int(k * len(values)))] = 1
    return (mask * (flat > 0)).view_as(values)


def _rates(pre_activations: PreActivations, samples: Sequence[Tensor], k: float, width: int) -> tuple[Tensor, Tensor]:
    """Between each latent's last value that its rate lets fire and the next."""
    firings, lowest = torch.zeros(width, dtype=torch.int64), float("inf")
    for x in samples:
        values = pre_activations(x).relu()
        mask = kept(values, k) > 0
        firings += mask.sum(0).cpu()
        lowest = min(lowest, values[mask].min().item() if mask.any() else lowest)
    # Every value that any batch kept is at least the lowest of them: what lies above it is enough to count from the top.
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
    # Where all that was offered may fire, the next value is not known, but that it is less than what any batch kept.
    less = lowest * (1 - 2**-20) if lowest < float("inf") else 0.0
    following = torch.where(counts > firings, value[(begins + firings).clamp(max=len(value) - 1)], torch.where(firings > 0, less, 0.0))
    return torch.where(firings > 0, (last + following) / 2, following), firings


def _equal_errors(pre_activations: PreActivations, samples: Sequence[Tensor], k: float, width: int) -> tuple[Tensor, Tensor]:
    """From histograms of each latent's kept and other values over its own range."""
    top = torch.stack([pre_activations(x).relu().amax(0).double().cpu() for x in samples]).amax(0).clamp(min=1e-12)
    histograms = torch.zeros(2, width * BINS, dtype=torch.float64)
    for x in samples:
        values = pre_activations(x).relu()
        mask = (kept(values, k) > 0).cpu().flatten()
        place = (values.double().cpu() / top * BINS).long().clamp(max=BINS - 1) + torch.arange(width) * BINS
        for histogram, chosen in zip(histograms, (mask, ~mask), strict=True):
            histogram += torch.bincount(place.flatten()[chosen], minlength=width * BINS)
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
    """The one threshold at which latents fire `target_l0` times a token on these samples, exactly but for ties; and L0 at the one of `now`.

    It is the `target_l0 * tokens`-th largest pre-activation of the sample. Each batch offers what lies above a cut, which the first
    batch's largest few set; where that was too little, they set it anew with twice as many.

    >>> global_threshold(lambda x: x, [torch.tensor([[3.0, 1.0], [2.0, 0.5]])], target_l0=1.0)
    (1.5, 2.0)
    """
    tokens = sum(len(x) for x in samples)
    wanted, share = max(1, round(target_l0 * tokens)), 2.0
    while True:
        offers: list[Tensor] = []
        cut, active = 0.0, 0
        for x in samples:
            values = pre_activations(x).relu().flatten()
            if not values.isfinite().all():
                raise InputError("the SAE has diverged: its activations are not finite, and no threshold can be set")
            active += int((values.view(len(x), -1) > now).count_nonzero())
            few = int(share * target_l0 * len(x)) + 1
            if not offers and few < int(values.count_nonzero()):
                cut = values[largest(values, few)].min().item()
            offers.append(values[values > cut])
        pooled = torch.cat(offers)
        if pooled.numel() > wanted:
            kept, dropped = pooled.topk(wanted + 1).values[-2:].tolist()
            return (kept + dropped) / 2, active / tokens
        if cut == 0:
            return 0.0, active / tokens
        share *= 2
