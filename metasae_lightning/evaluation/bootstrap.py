"""Bootstrap and jackknife over documents: intervals of sums and of co-firing."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.compute.row_chunks import is_blocked
from metasae_lightning.metrics.cofiring import PhiSample, fires_with_partner
from metasae_lightning.metrics.reconstruction import sums_by_bin
from metasae_lightning.step import Codes


def bootstrap_weights(documents: int, resamples: int, seed: int = 0) -> Float[Tensor, "resample document"]:
    """Bootstrap weights: how often each document is in each resample of `documents` documents, drawn with replacement.

    >>> bootstrap_weights(3, 5).sum(1).tolist()
    [3.0, 3.0, 3.0, 3.0, 3.0]
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(documents, (resamples, documents), generator=generator)
    return torch.zeros(resamples, documents, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))


def interval(values: Float[Tensor, " resample"], level: float = 0.95) -> tuple[float, float]:
    """The central `level` interval of the finite values: quantiles `(1 - level) / 2` and `(1 + level) / 2`; NaN if none is finite.

    >>> interval(torch.arange(101.0), level=0.9)
    (5.0, 95.0)
    """
    values = values.double()[values.isfinite()]
    if not len(values):
        return (float("nan"), float("nan"))
    low, high = values.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return round(low, 9), round(high, 9)


def jackknife_interval(point: float, without: Float[Tensor, " group"]) -> tuple[float, float]:
    """95 % jackknife interval of a statistic around `point`, its value on all groups; NaN for fewer than two groups.

    It reaches `1.96 sqrt((g - 1) / g sum (f_i - mean f)^2)` to each side, where `f_i` (`without[i]`) is the statistic without group i of g.

    >>> jackknife_interval(2.0, torch.tensor([1.0, 3.0]))
    (0.04, 3.96)
    """
    groups = len(without)
    error = ((groups - 1) / groups * (without - without.mean()).square().sum()).sqrt().item() if groups > 1 else float("nan")
    return round(point - 1.96 * error, 12), round(point + 1.96 * error, 12)


def sum_by_document(
    documents: Int[Tensor, " entry"], sums: Float[Tensor, "entry figure"]
) -> tuple[Int[Tensor, " document"], Float[Tensor, "document figure"]]:
    """The ids of all documents, ascending, and the sum of the entries of each document; `documents` are on the CPU.

    On a GPU the sums are a product, because additions there would end in any order.

    >>> sum_by_document(torch.tensor([4, 2, 4]), torch.tensor([[1.0], [5.0], [2.0]]))
    (tensor([2, 4]), tensor([[5.],
            [3.]]))
    """
    ids, rows = documents.unique(return_inverse=True)
    if is_blocked(sums):
        return ids, torch.zeros(len(ids), sums.shape[1], dtype=sums.dtype).index_add_(0, rows, sums)
    return ids, sums_by_bin(rows.to(sums.device, non_blocking=True), sums, len(ids))


class PhiByGroup:
    """Co-firing of random pairs of latents, counted by groups of documents, for the jackknife of excess |phi|.

    The counts stay on one device; the host waits for none of them.

    Args:
        d_sae: Latents.
        groups: Number of document groups.
        matchings: Random pairings of all latents; by default as many as fit into 256 MiB, but at least 4 and at most 32.
        device: Device of the codes.
    """

    def __init__(self, d_sae: int, groups: int, *, matchings: int | None = None, device: torch.device | str = "cpu"):
        matchings = matchings or max(4, min(32, 2**26 // (d_sae * groups)))
        partner = PhiSample(d_sae, matchings=matchings).partner
        low = [(row >= 0).nonzero().flatten() for row in partner]
        self.high = [row[latents].to(device) for row, latents in zip(partner, low, strict=True)]
        self.low = [latents.to(device) for latents in low]
        self.partner = partner.to(device)
        self.together = torch.zeros(matchings, groups, d_sae, dtype=torch.int32, device=device)
        self.firings = torch.zeros(groups, d_sae, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(groups, dtype=torch.float64, device=device)

    def update(self, codes: Codes, group: Int[Tensor, " row"]) -> None:
        """Add a batch and the document group of each of its tokens."""
        cells = group[codes.rows] * self.firings.shape[1] + codes.latents
        for hits, together in zip(fires_with_partner(codes, self.partner), self.together, strict=True):
            together.view(-1).scatter_add_(0, cells, hits.to(together.dtype))
        self.firings.view(-1).scatter_add_(0, cells, torch.ones_like(cells, dtype=self.firings.dtype))
        self.tokens.scatter_add_(0, group, torch.ones_like(group, dtype=self.tokens.dtype))

    def excess(self, weights: Float[Tensor, "resample group"]) -> Float[Tensor, " resample"]:
        """Mean of |phi| less its floor (its mean by chance) over the sampled pairs of live latents, for each resample.

        The rows of `weights` are the resamples; they multiply the counts of each document group. A latent that fires on every token does
        not count as live.
        """
        n = (weights @ self.tokens)[:, None]
        fired = weights @ self.firings.double()
        total, pairs = weights.new_zeros(len(weights), dtype=torch.float64), weights.new_zeros(len(weights), dtype=torch.float64)
        for together, low, high in zip(self.together, self.low, self.high, strict=True):
            n11, n_i, n_j = weights @ together[:, low].double(), fired[:, low], fired[:, high]
            live = (n_i > 0) & (n_i < n) & (n_j > 0) & (n_j < n)
            over = functional.phi(n11, n_i, n_j, n).abs() - functional.phi_by_chance(n_i, n_j, n)
            total += torch.where(live, over, 0.0).sum(1)
            pairs += live.sum(1)
        return total / pairs

    def without_each(self) -> Float[Tensor, " group"]:
        """The excess without each group in turn.

        A bootstrap over groups would be biased: a group that is drawn twice repeats its co-firings, which the floor does not expect.
        """
        return self.excess(1 - torch.eye(len(self.tokens), dtype=torch.float64, device=self.tokens.device))
