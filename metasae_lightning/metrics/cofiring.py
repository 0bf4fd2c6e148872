"""Co-firing of latents (phi): exact counts of all pairs in bounded memory, and an estimate from random pairs during training."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from metasae_lightning import functional
from metasae_lightning.compute.row_chunks import is_blocked
from metasae_lightning.errors import InputError
from metasae_lightning.metrics.firings import FIRING_BYTES, PAIR_BYTES, Firings
from metasae_lightning.step import Codes

QUANTILES = (0.5, 0.9, 0.99, 0.999)
TAILS = (0.1, 0.3)
# Bins of |phi|, equal in its square root: a bin is 5e-6 wide at 1e-4, where most pairs are, and 5e-4 at 1.
BINS = 4096


@dataclass(frozen=True)
class PairSums:
    """Sums of phi over all pairs of live latents, which are active on some tokens but not on all."""

    total: float
    """Sum of |phi|."""
    positive: int
    """Pairs whose phi is positive."""
    bins: Float[Tensor, " bin"]
    """Histogram of |phi|; bins are equal steps of its square root from 0 to 1."""
    partners: Int[Tensor, "latent partner"]
    """The latents that each latent has the largest phi with, largest first."""
    partner_phi: Float[Tensor, "latent partner"]
    """Their phi; -inf where a latent, or its partner, is not live."""

    def by_decade(self, edges: Float[Tensor, " edge"]) -> Float[Tensor, " bin"]:
        """Number of pairs between edges of log10 |phi|; pairs beyond the first or last edge count in the first or last bin."""
        middles = ((torch.arange(len(self.bins), dtype=torch.float64) + 0.5) / len(self.bins)).square().log10()
        edge_bins = (torch.bucketize(middles, edges) - 1).clamp(0, len(edges) - 2)
        return torch.zeros(len(edges) - 1, dtype=torch.float64).index_add(0, edge_bins, self.bins)


def pair_sums(phi: Float[Tensor, "row other"], counted: Bool[Tensor, "row other"]) -> tuple[Float[Tensor, " 2"], Float[Tensor, " bin"]]:
    """Over the counted pairs: the sum of |phi| and the number of positive phi, and the histogram of |phi| as in `PairSums`.

    On a GPU the number of counted pairs shapes no tensor, because the host would wait for it.

    >>> pair_sums(torch.tensor([[-1.0, 0.25]]).double(), torch.tensor([[True, True]]))[0].tolist()
    [1.25, 1.0]
    """
    if is_blocked(phi):
        values = phi[counted]
        positive = (values > 0).count_nonzero()
        total = values.abs_().sum()
        roots = values.sqrt_().clamp_(max=1)
    else:
        positive = ((phi > 0) & counted).count_nonzero()
        total = torch.where(counted, phi.abs(), 0.0).sum()
        # `histc` ignores values outside of its range.
        roots = torch.where(counted, phi.abs().sqrt_().clamp_(max=1), -1.0)
    return torch.stack([total, positive.to(total)]), torch.histc(roots, BINS, 0.0, 1.0)


class Phi(Metric):
    """Phi of every pair of latents, of one SAE or between two on the same tokens, from exact integer counts.

    `phi = (n n11 - n_i n_j) / sqrt(n_i (n - n_i) n_j (n - n_j))` is the correlation of two latents' firings, from -1 to 1: of `n` tokens,
    latent i fired on `n_i` and both latents on `n11`. `compute` returns the mean of |phi| over all pairs of live latents (active on some
    tokens but not on all), its value under independence with the same counts (`floor`), their difference (`excess`) with its standard
    error under independence, the share of positive pairs, and quantiles and tails of |phi|. It counts pairs in tiles of latents, so
    memory is bounded by `memory_gib` and not by the square of the width.

    Args:
        d_sae: Latents of the SAE.
        other: Latents of a second SAE, for phi between two SAEs; None computes phi within one SAE.
        memory_gib: Memory for counting, beside the firings.

    >>> metric = Phi(d_sae=3)
    >>> metric.update(Codes.from_dense(torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])))
    >>> figures = metric.compute()
    >>> round(figures["mean_abs"].item(), 4), int(figures["pairs"]), int(figures["live"])
    (0.7182, 3, 3)
    """

    full_state_update = False
    latents: list[Tensor]
    lengths: list[Tensor]
    other_latents: list[Tensor]
    other_lengths: list[Tensor]

    def __init__(self, d_sae: int, other: int | None = None, *, memory_gib: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if memory_gib <= 0:
            raise InputError(f"memory_gib must be more than 0, got {memory_gib}")
        self.d_sae, self.other, self.memory_gib = d_sae, other, memory_gib
        for name in ("latents", "lengths", "other_latents", "other_lengths"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, codes: Codes, other: Codes | None = None) -> None:
        """Add a batch: the codes of the SAE, or of both SAEs on the same tokens."""
        if (other is None) != (self.other is None):
            raise InputError("Phi takes both SAEs' codes between two, and the one's alone within one")
        if other is not None and other.shape[0] != codes.shape[0]:
            raise InputError(f"Phi: both SAEs' codes must be of the same tokens, got {codes.shape[0]} and {other.shape[0]}")
        self._append_firings(codes, self.d_sae, self.latents, self.lengths)
        if other is not None and self.other is not None:
            self._append_firings(other, self.other, self.other_latents, self.other_lengths)

    @staticmethod
    def _append_firings(codes: Codes, width: int, latents: list[Tensor], lengths: list[Tensor]) -> None:
        if codes.shape[1] != width:
            raise InputError(f"Phi: codes of {codes.shape[1]} latents, expected {width}")
        latents.append(codes.latents.to(torch.int32))
        lengths.append(codes.lengths().to(torch.int32))

    def firings(self) -> tuple[Firings, Firings]:
        """Firings of the SAE and of the second SAE; within one SAE, its firings twice. An `InputError` before any update."""
        if not len(self.latents):  # a tensor after ranks were gathered
            raise InputError("Phi: nothing was seen yet")
        firings = Firings.of(dim_zero_cat(self.latents), dim_zero_cat(self.lengths), self.d_sae)
        if self.other is None:
            return firings, firings
        return firings, Firings.of(dim_zero_cat(self.other_latents), dim_zero_cat(self.other_lengths), self.other)

    @property
    def rows(self) -> int:
        """Number of latents that are counted at a time."""
        return max(1, min(self.d_sae, int(self.memory_gib * 2**30 / PAIR_BYTES) // (self.other or self.d_sae)))

    def plan(self) -> str:
        """One line about the time and memory of counting."""
        tiles = -(-self.d_sae // self.rows)
        width, firing_bytes = self.other or self.d_sae, sum(len(part) * FIRING_BYTES for part in (*self.latents, *self.other_latents))
        return (
            f"phi of {self.d_sae:,} x {width:,} latents: {tiles} tile{'s' if tiles > 1 else ''} of {self.rows:,} latents, "
            f"{self.rows * width * PAIR_BYTES / 2**30:.2f} GiB each, beside {firing_bytes / 2**30:.2f} GiB of firings"
        )

    def tiles(self) -> Iterator[tuple[int, Float[Tensor, "row other"]]]:
        """Yield the index of a tile's first latent, and phi of the tile's latents with all latents of the second (or same) SAE."""
        firings, other = self.firings()
        yield from self._tiles(firings, other, firings.counts, other.counts)

    def _tiles(self, firings: Firings, other: Firings, n_i: Tensor, n_j: Tensor) -> Iterator[tuple[int, Tensor]]:
        for start, n11 in firings.cofirings(other, self.rows):
            yield start, functional.phi(n11, n_i[start : start + len(n11), None], n_j[None], float(firings.tokens))

    def compute(self) -> dict[str, Tensor]:
        """The figures named in the class, and the numbers of `live` latents (of the first SAE), `pairs` and `tokens`."""
        return self.results(self.count())

    def count(self, partners: int = 0) -> "PairSums":
        """Count all pairs of live latents, and find each latent's `partners` largest phi."""
        firings, other = self.firings()
        n, n_i, n_j = float(firings.tokens), firings.counts, other.counts
        live_i, live_j = self._live(n_i, n), self._live(n_j, n)
        sums, bins, latents = n_i.new_zeros(2), n_i.new_zeros(BINS), torch.arange(max(len(n_i), len(n_j)), device=n_i.device)
        best: list[tuple[Tensor, Tensor]] = []
        for start, phi in self._tiles(firings, other, n_i, n_j):
            counted = live_i[start : start + len(phi), None] & live_j[None]
            if partners:
                is_pair = counted & (latents[: len(n_j)] != latents[start : start + len(phi), None]) if self.other is None else counted
                best.append(phi.where(is_pair, -torch.inf).topk(min(partners, len(n_j))))
            if self.other is None:  # each pair once, without self-pairs
                counted &= latents[: len(n_j)] > latents[start : start + len(phi), None]
            tile_sums, tile_bins = pair_sums(phi, counted)
            sums += tile_sums
            bins += tile_bins
        total, positive = sums.tolist()
        phi, partner = (torch.cat(side).cpu() for side in zip(*best, strict=True)) if best else (n_i.new_zeros(len(n_i), 0),) * 2
        return PairSums(total, int(positive), bins.cpu(), partner.long(), phi)

    @staticmethod
    def _live(counts: Tensor, n: float) -> Tensor:
        return (counts > 0) & (counts < n)

    def results(self, counted: "PairSums") -> dict[str, Tensor]:
        """The results of `compute` from counted pairs."""
        firings, other = self.firings()
        n = float(firings.tokens)
        n_i, n_j = (counts[self._live(counts, n)] for counts in (firings.counts, other.counts))
        pairs = len(n_i) * (len(n_i) - 1) // 2 if self.other is None else len(n_i) * len(n_j)
        floor, error = mean_phi_by_chance(n_i, n_j, n, within=self.other is None)
        mean, positive, bins = counted.total / max(pairs, 1), counted.positive / max(pairs, 1), counted.bins
        figures = {"mean_abs": mean, "floor": floor, "excess": mean - floor, "standard_error": error, "positive": positive}
        upper = bins.cumsum(0) / max(pairs, 1)
        figures |= {f"q{100 * q:g}": histogram_quantile(upper, q) for q in QUANTILES}
        figures |= {f"above_{tail:g}": (bins[round(BINS * tail**0.5) :].sum() / max(pairs, 1)).item() for tail in TAILS}
        figures |= {"live": len(n_i), "pairs": pairs, "tokens": n}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}


class PhiSample(Metric):
    """An estimate of the mean of |phi| from random pairs of latents, cheap enough for use during training.

    Latents are paired at random `matchings` times. Pairs of one matching share no latent, so the spread over pairs gives the standard
    error of the mean. |phi| is as in `Phi`, from 0 to 1.

    >>> metric = PhiSample(d_sae=2)
    >>> metric.update(Codes.from_dense(torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]])))
    >>> round(metric.compute()["mean_abs"].item(), 9)
    1.0
    """

    full_state_update = False
    together: Tensor
    firings: Tensor
    tokens: Tensor
    partner: Tensor

    def __init__(self, d_sae: int, *, matchings: int = 8, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if d_sae < 2 or matchings < 1:
            raise InputError(f"PhiSample needs two latents and a matching at least, got {d_sae} and {matchings}")
        generator = torch.Generator().manual_seed(seed)
        orders = torch.stack([torch.randperm(d_sae, generator=generator)[: d_sae // 2 * 2] for _ in range(matchings)])
        lower, higher = orders.view(matchings, -1, 2).sort(-1).values.unbind(-1)
        # The partner of each latent, where the partner has the higher index; counts are stored with the lower one.
        self.register_buffer("partner", torch.full((matchings, d_sae), -1).scatter(1, lower, higher))
        self.add_state("together", torch.zeros(matchings, d_sae, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("firings", torch.zeros(d_sae, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: Codes) -> None:
        """Add a batch."""
        for hits, together in zip(fires_with_partner(codes, self.partner), self.together, strict=True):
            together.scatter_add_(0, codes.latents, hits.to(together.dtype))
        self.firings += codes.firings()
        self.tokens += codes.shape[0]

    def compute(self) -> dict[str, Tensor]:
        """Mean |phi| over the sample's live pairs, its floor by chance, the excess with its standard error, and the number of pairs."""
        n = float(self.tokens)
        matching, low = (self.partner >= 0).nonzero(as_tuple=True)
        n11, n_i, n_j = (x.double() for x in (self.together[matching, low], self.firings[low], self.firings[self.partner[matching, low]]))
        live = (n_i > 0) & (n_i < n) & (n_j > 0) & (n_j < n)
        phi = functional.phi(n11[live], n_i[live], n_j[live], n).abs()
        floor = functional.phi_by_chance(n_i[live], n_j[live], n)
        error = (phi - floor).std() / len(phi) ** 0.5 if len(phi) > 1 else torch.tensor(torch.nan)
        figures = {"mean_abs": phi.mean(), "floor": floor.mean(), "excess": (phi - floor).mean(), "standard_error": error}
        return {**figures, "pairs": live.sum()}


def fires_with_partner(codes: Codes, partners: Int[Tensor, "matching d_sae"]) -> Iterator[Bool[Tensor, " nnz"]]:
    """For each matching: which nonzeros belong to a latent whose partner fires on the same token. A partner of -1 means no partner.

    >>> codes = Codes.from_dense(torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 3.0]]))
    >>> [hits.tolist() for hits in fires_with_partner(codes, torch.tensor([[1, -1, -1]]))]
    [[True, False, False, False]]
    """
    width = codes.shape[1]
    fired = (codes.rows * width + codes.latents).sort().values
    for partner in partners:
        partners_of_nonzeros = partner[codes.latents]
        keys = codes.rows * width + partners_of_nonzeros
        nearest_keys = fired[torch.searchsorted(fired, keys).clamp(max=len(fired) - 1)] if len(fired) else fired
        yield (partners_of_nonzeros >= 0) & (nearest_keys == keys)


def mean_phi_by_chance(n_i: Float[Tensor, " live"], n_j: Float[Tensor, " other"], n: float, *, within: bool) -> tuple[float, float]:
    """Expected mean of |phi| over all pairs of independent latents with these counts, and the standard deviation of this mean.

    `within` is for one SAE, whose counts are given twice: each pair counts once, and no latent is paired with itself.
    Given the counts, two pairs that share a latent are as independent as two that do not, so variances add: `E phi^2 = 1 / (n - 1)`.

    >>> counts = torch.tensor([1.0, 1.0], dtype=torch.float64)
    >>> mean_phi_by_chance(counts, counts, 2.0, within=True)
    (1.0, 0.0)
    """
    (u, m), (v, w) = (torch.unique(counts, return_counts=True) for counts in (n_i, n_j))
    total, squares = n_i.new_zeros(()), n_i.new_zeros(())
    for counts, multiplicity in zip(u.split(512), m.double().split(512), strict=True):
        expected = functional.phi_by_chance(counts[:, None], v[None], n)
        total += multiplicity @ expected @ w.double()
        squares += multiplicity @ expected.square() @ w.double()
    pairs = float(len(n_i) * len(n_j))
    if within:
        self_pairs = functional.phi_by_chance(n_i, n_i, n)
        total, squares = (total - self_pairs.sum()) / 2, (squares - self_pairs.square().sum()) / 2
        pairs = (pairs - len(n_i)) / 2
    if not pairs:
        return 0.0, 0.0
    mean, squared = torch.stack([total / pairs, squares]).tolist()
    return mean, max(pairs / max(n - 1, 1) - squared, 0.0) ** 0.5 / pairs


def histogram_quantile(upper: Float[Tensor, " bin"], share: float) -> float:
    """Quantile of |phi|: the middle, in sqrt(|phi|), of the first bin at whose end the share of pairs so far (`upper`) is `share`."""
    index = min(int(torch.searchsorted(upper, share)), BINS - 1)
    return ((index + 0.5) / BINS) ** 2
