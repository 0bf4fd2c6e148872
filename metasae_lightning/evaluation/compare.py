"""Compare two SAEs: matched latents, splits, merges and differences of their measures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.bootstrap import interval, jackknife_interval
from metasae_lightning.evaluation.collect import CollectedCodes
from metasae_lightning.evaluation.evaluate import Evaluation, excess_without_each, resampled_losses, resampled_reconstruction
from metasae_lightning.evaluation.settings import Settings
from metasae_lightning.metrics.cofiring import PAIR_BYTES, Firings

# Above so many latents only each one's nearest are candidates: the whole matrix would take hours.
DENSE = 6000


def matched(
    W_a: Float[Tensor, "d_a d_in"], W_b: Float[Tensor, "d_b d_in"], *, dense: int = DENSE, nearest: int = 32
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Float[Tensor, " pair"]]:
    """The one-to-one match of decoder rows with the largest sum of cosines (the Hungarian method), and its cosines.

    >>> matched(torch.eye(2), torch.tensor([[0.0, 3.0], [1.0, 1.0]]))
    (tensor([0, 1]), tensor([1, 0]), tensor([0.7071, 1.0000]))
    """
    a, b = functional.unit_rows(W_a.float()), functional.unit_rows(W_b.float())
    if max(len(a), len(b)) <= dense:
        cosines = a @ b.T
        rows, columns = (torch.as_tensor(side) for side in linear_sum_assignment(cosines.cpu().numpy(), maximize=True))
        return rows, columns, cosines[rows, columns]
    return _sparse(a, b, nearest)


def _sparse(a: Tensor, b: Tensor, nearest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Among each row's nearest; a row whose nearest all went to others is left without a match."""
    rows, columns, values = list[Tensor](), list[Tensor](), list[Tensor]()
    for begin in range(0, len(a), 1024):
        top = (a[begin : begin + 1024] @ b.T).topk(min(nearest, len(b)))
        rows.append(torch.arange(begin, begin + len(top.values))[:, None].expand_as(top.indices).flatten())
        columns.append(top.indices.flatten().cpu())
        values.append(top.values.flatten().cpu())
    row, column, value = torch.cat(rows), torch.cat(columns), torch.cat(values)
    # A column of its own for each row, dearer than any cosine: then a full match always exists. Costs must not be 0.
    own = np.arange(len(a))
    costs = np.concatenate([2 - value.double().numpy(), np.full(len(a), 10.0)])
    places = np.concatenate([row.numpy(), own]), np.concatenate([column.numpy(), len(b) + own])
    found_rows, found_columns = min_weight_full_bipartite_matching(coo_matrix((costs, places), shape=(len(a), len(b) + len(a))).tocsr())
    real = found_columns < len(b)
    one, other = torch.as_tensor(found_rows[real]).long(), torch.as_tensor(found_columns[real]).long()
    return one, other, (a[one.to(a.device)] * b[other.to(b.device)]).sum(1).cpu()


# Matches kept of each latent, splits kept of each side.
MATCHES, SPLITS = 3, 50
# Below it two latents are not said to be about the same thing.
RELATED = 0.2
# What a document's share of a figure is: its place among the sums that are kept by document.
FIGURES = {"fvu": 2, "l0": 3, "cosine": 4}
LOSSES = {"ce_sae": 2, "kl": 5}


@dataclass(frozen=True)
class Matches:
    """Each latent's best matches in the other SAE by phi."""

    phi: Float[Tensor, "latent match"]
    """How well they correlate, the best first."""
    latent: Int[Tensor, "latent match"]
    """Which they are."""
    live: Tensor
    """Which latents fired on some of the tokens."""

    def figures(self) -> dict[str, float]:
        """Of live latents' best matches."""
        best = self.phi[self.live, 0].double()
        if not len(best):
            return {"median": float("nan")}
        quantiles = {f"q{100 * q:g}": best.quantile(q).item() for q in (0.1, 0.9)}
        return {"median": best.median().item(), **quantiles, **{f"above_{x:g}": (best > x).double().mean().item() for x in (0.3, 0.5, 0.7)}}


def compare(a: Evaluation, b: Evaluation, settings: Settings) -> dict[str, Any]:
    """Everything about two SAEs that were evaluated together."""
    one, two = (firings(evaluation.seen) for evaluation in (a, b))
    check_same_rows(a.seen, b.seen)
    forth, back = best_matches(one, two, settings.memory_gib)
    # The other's tokens moved on by half of the text: the same rates, and nothing in common.
    apart = Firings(two.matrix[np.roll(np.arange(two.tokens), two.tokens // 2)])
    chance, _ = best_matches(one, apart, settings.memory_gib)
    rows, columns, cosines = matched(a.seen.subject.W_dec.cpu(), b.seen.subject.W_dec.cpu())
    return {
        "differences": differences(a, b, settings),
        "cross_phi": {"a_in_b": forth.figures(), "b_in_a": back.figures(), "a_in_b_by_chance": chance.figures()},
        "splits": splits(forth, two),
        "merges": splits(back, one),
        "matching": {
            **{"pairs": len(rows), "mean_cosine": cosines.double().mean().item(), "median_cosine": cosines.double().median().item()},
            **{f"above_{x:g}": (cosines > x).double().mean().item() for x in (0.7, 0.9)},
            **{"a": rows.tolist(), "b": columns.tolist(), "cosine": [round(value, 4) for value in cosines.tolist()]},
        },
        "best": {"a_in_b": kept(forth), "b_in_a": kept(back)},
    }


def firings(seen: CollectedCodes) -> Firings:
    """Which latents fired on which of all tokens."""
    parts = [(piece["latents"], piece["lengths"]) for piece in seen.entries()]
    latents, lengths = (torch.cat(side) for side in zip(*parts, strict=True))
    return Firings.of(latents, lengths, len(seen.subject.W_dec))


def check_same_rows(a: CollectedCodes, b: CollectedCodes) -> None:
    """Both must have been seen on the same tokens: a tokenizer or a text that changed between them would show here."""
    for one, two in zip(a.entries(), b.entries(), strict=True):
        if not (torch.equal(one["tokens"], two["tokens"]) and torch.equal(one["counted"], two["counted"])):
            raise InputError(
                f"{a.subject.place} and {b.subject.place} were not seen on the same tokens: remove {b.subject.result_cache.folder}"
            )


def best_matches(one: Firings, two: Firings, memory_gib: float) -> tuple[Matches, Matches]:
    """Each latent's best matches in the other SAE, both ways, from exact counts, some latents at a time."""
    n, n_i, n_j = float(one.tokens), one.counts, two.counts
    count = min(MATCHES, len(n_i), len(n_j))
    rows = max(1, int(memory_gib * 2**30 / PAIR_BYTES) // len(n_j))
    forth, back = list[tuple[Tensor, Tensor]](), (torch.full((count, len(n_j)), -torch.inf), torch.zeros(count, len(n_j), dtype=torch.long))
    for start, together in one.together(two, rows):
        phi = functional.phi(together, n_i[start : start + len(together), None], n_j[None], n).float()
        top = phi.topk(count)
        forth.append((top.values, top.indices))
        values, places = phi.topk(min(count, len(phi)), dim=0)
        values, places = torch.cat([back[0], values]), torch.cat([back[1], start + places])
        best = values.topk(count, dim=0)
        back = best.values, places.gather(0, best.indices)
    values, latents = (torch.cat(side) for side in zip(*forth, strict=True))
    live_i, live_j = ((counts > 0) & (counts < n) for counts in (n_i, n_j))
    return Matches(values, latents, live_i), Matches(back[0].T.contiguous(), back[1].T.contiguous(), live_j)


def splits(matches: Matches, other: Firings) -> list[dict[str, Any]]:
    """Latents that two of the other SAE's share, with how these must co-fire and how they do."""
    if matches.phi.shape[1] < 2:
        return []
    second = torch.where(matches.live & (matches.phi[:, 1] >= RELATED), matches.phi[:, 1], -torch.inf)
    chosen = [latent for latent in second.argsort(descending=True)[:SPLITS].tolist() if second[latent].isfinite()]
    found: list[dict[str, Any]] = []
    columns, n = other.matrix.tocsc(), float(other.tokens)
    for latent in chosen:
        (left, right), into = matches.phi[latent, :2].double(), matches.latent[latent, :2].tolist()
        x, y = (columns[:, [place]] for place in into)
        together = torch.tensor(float((x.multiply(y)).sum()), dtype=torch.float64)
        n_x, n_y = (torch.tensor(float(side.sum()), dtype=torch.float64) for side in (x, y))
        found.append(
            {
                **{"latent": latent, "into": into, "phi": [left.item(), right.item()]},
                **{"bound": functional.cofiring_bound(left, right).item(), "phi_between": functional.phi(together, n_x, n_y, n).item()},
            }
        )
    return found


def kept(matches: Matches) -> dict[str, list[Any]]:
    """For the record."""
    return {"latent": matches.latent.tolist(), "phi": [[round(value, 4) for value in row] for row in matches.phi.tolist()]}


def differences(a: Evaluation, b: Evaluation, settings: Settings) -> dict[str, dict[str, Any]]:
    """The second's figures less the first's: intervals from drawing the same documents again, p from swapping them by document."""
    one, two = (resampled_reconstruction(evaluation.seen, settings) for evaluation in (a, b))
    ids, sums, _ = a.seen.by_document
    (_, other, _) = b.seen.by_document
    figures = [evaluation.entry["figures"]["reconstruction"] for evaluation in (a, b)]
    found = paired(one, two, figures, {name: other[:, place] - sums[:, place] for name, place in FIGURES.items()}, settings)
    if a.lost is not None and b.lost is not None:
        losses = [resampled_losses(evaluation.lost, settings) for evaluation in (a, b) if evaluation.lost is not None]
        points = [evaluation.entry["figures"]["splice"] for evaluation in (a, b)]
        shares = {name: b.lost.sums[:, place] - a.lost.sums[:, place] for name, place in LOSSES.items()}
        found |= paired(losses[0], losses[1], points, shares, settings)
    found["phi_excess"] = excess(a, b)
    found["documents"] = {"count": len(ids)}
    return found


def excess(a: Evaluation, b: Evaluation) -> dict[str, Any]:
    """The difference of mean |phi| in excess of its floor: of all pairs, its spread of random pairs without each group of documents."""
    one, two = (excess_without_each(evaluation.seen) for evaluation in (a, b))
    points = [evaluation.entry["figures"]["phi"]["excess"] for evaluation in (a, b)]
    point = points[1] - points[0]
    return {"a": points[0], "b": points[1], "difference": point, "interval": jackknife_interval(point, two - one)}


def paired(
    one: Mapping[str, Tensor],
    two: Mapping[str, Tensor],
    points: Sequence[Mapping[str, float]],
    shares: Mapping[str, Float[Tensor, " document"]],
    settings: Settings,
) -> dict[str, dict[str, Any]]:
    """Figures that are sums over documents: their difference, its interval, and how often swapping gives as large a one."""
    found: dict[str, dict[str, Any]] = {}
    for name, share in shares.items():
        low, high = interval(two[name] - one[name])
        p = swapped(share, settings.resamples, settings.seed)
        a, b = (point[name] for point in points)
        found[name] = {"a": a, "b": b, "difference": b - a, "interval": [low, high], "p": p}
    return found


def swapped(share: Float[Tensor, " document"], resamples: int, seed: int = 0) -> float:
    """How often a sum of documents' differences is as large when which SAE is which is a coin's choice for each: its permutation p.

    >>> swapped(torch.ones(20), 999), swapped(torch.tensor([1.0, -1.0]), 999)
    (0.001, 1.0)
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (resamples, len(share)), generator=generator).double() * 2 - 1
    sums, seen = (signs @ share.double()).abs(), share.double().sum().abs()
    return (1 + int((sums >= seen - 1e-12 * share.double().abs().sum()).sum())) / (1 + resamples)
