"""How far figures move when other documents had been drawn: the bootstrap over documents, of sums and of co-firing. Pure but for counts."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.cofiring import PhiSample
from metasae_lightning.step import Codes


def draws(documents: int, resamples: int, seed: int = 0) -> Float[Tensor, "resample document"]:
    """How often each document is drawn when as many are drawn again, with replacement.

    >>> draws(3, 5).sum(1).tolist()
    [3.0, 3.0, 3.0, 3.0, 3.0]
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(documents, (resamples, documents), generator=generator)
    return torch.zeros(resamples, documents, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))


def interval(values: Float[Tensor, " resample"], level: float = 0.95, *, around: float | None = None) -> tuple[float, float]:
    """The middle `level` of resampled values; `around` moves them to have their mean there.

    Documents drawn twice co-fire with themselves, so that a mean of |phi| is larger in a resample than in the sample: what is wanted of it
    is its spread, and not its place.

    >>> interval(torch.arange(101.0), level=0.9)
    (5.0, 95.0)
    >>> interval(torch.arange(101.0), level=0.9, around=0.0)
    (-45.0, 45.0)
    """
    values = values.double()[values.isfinite()]
    if not len(values):
        return (float("nan"), float("nan"))
    moved = values if around is None else values - values.mean() + around
    low, high = moved.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return round(low, 9), round(high, 9)


def merged(
    documents: Int[Tensor, " entry"], sums: Float[Tensor, "entry figure"]
) -> tuple[Int[Tensor, " document"], Float[Tensor, "document figure"]]:
    """Entries of the same document as one.

    >>> merged(torch.tensor([4, 2, 4]), torch.tensor([[1.0], [5.0], [2.0]]))
    (tensor([2, 4]), tensor([[5.],
            [3.]]))
    """
    ids, place = documents.unique(return_inverse=True)
    return ids, torch.zeros(len(ids), sums.shape[1], dtype=sums.dtype).index_add_(0, place, sums)


class PhiByGroup:
    """Counts of random pairs of latents in each group of documents, from which the excess of |phi| over its floor can be resampled.

    Args:
        d_sae: Latents.
        groups: Groups that documents are dealt to.
        matchings: Random pairings of all latents.
    """

    def __init__(self, d_sae: int, groups: int, *, matchings: int = 8):
        partner = PhiSample(d_sae, matchings=matchings).partner
        self.low = [(row >= 0).nonzero().flatten() for row in partner]
        self.high = [row[low] for row, low in zip(partner, self.low, strict=True)]
        self.partner = partner
        self.together = torch.zeros(matchings, groups, d_sae, dtype=torch.int32)
        self.firings = torch.zeros(groups, d_sae, dtype=torch.int32)
        self.tokens = torch.zeros(groups, dtype=torch.float64)

    def update(self, codes: Codes, group: Int[Tensor, " row"]) -> None:
        """Add a batch, and which group each of its tokens is of."""
        groups, width = self.firings.shape
        fired = codes.rows * width + codes.latents  # in order already
        place = group[codes.rows] * width + codes.latents
        for partner, together in zip(self.partner, self.together, strict=True):
            other = partner[codes.latents]
            wanted = codes.rows * width + other
            found = fired[torch.searchsorted(fired, wanted).clamp(max=len(fired) - 1)] if len(fired) else fired
            hits = place[(other >= 0) & (found == wanted)]
            together += torch.bincount(hits, minlength=groups * width).view(groups, width).int()
        self.firings += torch.bincount(place, minlength=groups * width).view(groups, width).int()
        self.tokens += torch.bincount(group, minlength=groups)

    def excess(self, weights: Float[Tensor, "resample group"]) -> Float[Tensor, " resample"]:
        """Mean of |phi| less its floor over the pairs of live latents, with groups counted so often."""
        n = (weights @ self.tokens)[:, None]
        fired = weights @ self.firings.double()
        total, pairs = torch.zeros(len(weights), dtype=torch.float64), torch.zeros(len(weights), dtype=torch.float64)
        for together, low, high in zip(self.together, self.low, self.high, strict=True):
            n11, n_i, n_j = weights @ together[:, low].double(), fired[:, low], fired[:, high]
            live = (n_i > 0) & (n_i < n) & (n_j > 0) & (n_j < n)
            over = functional.phi(n11, n_i, n_j, n).abs() - functional.phi_by_chance(n_i, n_j, n)
            total += torch.where(live, over, 0.0).sum(1)
            pairs += live.sum(1)
        return total / pairs
