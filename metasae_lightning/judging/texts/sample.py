"""The latents that are judged: a stratified sample over density, and pairs of latents of two SAEs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.compare import match_decoder_rows

# Number of quantile bins of density, with equal numbers of live latents.
DENSITY_BINS = 10


def sample_latents(density: Float[Tensor, " d_sae"], count: int, *, seed: int | tuple[int, ...] = 0, bins: int = DENSITY_BINS) -> list[int]:
    """A random sample of live latents with equal numbers from each of `bins` quantile bins of log density, sorted by index.

    A latent with density 0 is not live. If `count` is no multiple of the number of bins, random bins give one more. If there are at
    most `count` live latents, all are in the sample.

    >>> import torch
    >>> sample_latents(torch.tensor([0.0, 0.1, 0.1, 0.0]), 5)
    [1, 2]
    """
    if count < 1:
        raise InputError(f"count: at least 1 latent, not {count}")
    live = density.nonzero().flatten()
    order = live[density[live].argsort(stable=True)].numpy()
    generator = np.random.default_rng(seed)
    # Order and quantiles of the logarithm of density are those of density.
    parts = np.array_split(order, max(1, min(bins, count, len(order))))
    of_part = np.full(len(parts), count // len(parts))
    of_part[generator.permutation(len(parts))[: count % len(parts)]] += 1
    if len(order) <= count:
        return sorted(order.tolist())
    return sorted(
        int(latent) for part, n in zip(parts, _within_sizes(of_part, parts), strict=True) for latent in generator.permutation(part)[:n]
    )


def _within_sizes(of_part: np.ndarray, parts: list[np.ndarray]) -> list[int]:
    """How many latents to take from each part: as wanted, but where a part is too small, the rest comes from the other parts."""
    wanted, sizes = of_part.tolist(), [len(part) for part in parts]
    excess = sum(max(0, n - size) for n, size in zip(wanted, sizes, strict=True))
    wanted = [min(n, size) for n, size in zip(wanted, sizes, strict=True)]
    for index, size in enumerate(sizes):
        more = min(excess, size - wanted[index])
        wanted[index], excess = wanted[index] + more, excess - more
    return wanted


@dataclass(frozen=True)
class LatentPairs:
    """One-to-one pairs of latents of two SAEs."""

    a: list[int]
    """Latents of the first SAE, sorted."""
    b: list[int]
    """Their partners in the second SAE."""
    cosine: list[float]
    """Cosine of the decoder rows of each pair."""


def paired_latents(
    W_dec_a: Float[Tensor, "d_a d_in"],
    W_dec_b: Float[Tensor, "d_b d_in"],
    *,
    live_a: Bool[Tensor, " d_a"],
    live_b: Bool[Tensor, " d_b"],
    threshold: float = 0.7,
) -> LatentPairs:
    """The one-to-one pairs of live latents with the largest sum of cosines of decoder rows, without pairs below `threshold`.

    >>> import torch
    >>> rows, live = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([True, True])
    >>> paired_latents(rows, torch.tensor([[0.0, 2.0], [1.0, -1.0]]), live_a=live, live_b=live, threshold=0.9)
    LatentPairs(a=[1], b=[0], cosine=[1.0])
    """
    latents_a, latents_b = live_a.nonzero().flatten().cpu(), live_b.nonzero().flatten().cpu()
    rows, columns, cosines = match_decoder_rows(W_dec_a.cpu()[latents_a], W_dec_b.cpu()[latents_b])
    is_kept = cosines >= threshold
    rows, columns, cosines = rows[is_kept], columns[is_kept], cosines[is_kept]
    order = rows.argsort()
    return LatentPairs(*(side[order].tolist() for side in (latents_a[rows], latents_b[columns], cosines)))


@dataclass(frozen=True)
class SampledLatents:
    """The latents of one arm that are judged."""

    own_sample: list[int]
    """A stratified sample of this arm's latents, or the latents that the user's file explains."""
    partners: Mapping[int, int] = field(default_factory=dict)
    """The partner in this arm of each latent in the first arm's sample that has one. Empty for the first arm."""
    cosines: Mapping[int, float] = field(default_factory=dict)
    """The cosine of each such pair, by the first arm's latent."""

    @property
    def latents(self) -> list[int]:
        """All latents of this arm that are judged, sorted."""
        return sorted({*self.own_sample, *self.partners.values()})


def sample_arms(
    decoders: Mapping[str, Float[Tensor, "d_sae d_in"]],
    densities: Mapping[str, Float[Tensor, " d_sae"]],
    count: int,
    *,
    seed: int = 0,
    threshold: float = 0.7,
) -> dict[str, SampledLatents]:
    """A stratified sample of each arm's latents, and in every arm but the first the partners of the first arm's sample.

    The samples of the arms are independent. A latent with density 0 is neither sampled nor a partner.
    """
    sampled, first = dict[str, SampledLatents](), next(iter(decoders))
    for index, (name, W_dec) in enumerate(decoders.items()):
        own_sample = sample_latents(densities[name], count, seed=(seed, index))
        if name == first:
            sampled[name] = SampledLatents(own_sample)
            continue
        live = {"live_a": densities[first] > 0, "live_b": densities[name] > 0}
        pairs, wanted = paired_latents(decoders[first], W_dec, **live, threshold=threshold), set(sampled[first].own_sample)
        chosen = [pair for pair in zip(pairs.a, pairs.b, pairs.cosine, strict=True) if pair[0] in wanted]
        sampled[name] = SampledLatents(own_sample, {a: b for a, b, _ in chosen}, {a: cosine for a, _, cosine in chosen})
    return sampled
