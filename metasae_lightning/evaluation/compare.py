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
from metasae_lightning.metrics.firings import PAIR_BYTES, Firings

# With more latents than this, only the nearest rows of each are candidates: a match over the whole matrix would take hours.
DENSE = 6000


def match_decoder_rows(
    W_a: Float[Tensor, "d_a d_in"], W_b: Float[Tensor, "d_b d_in"], *, dense: int = DENSE, nearest: int = 32
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Float[Tensor, " pair"]]:
    """The one-to-one match of decoder rows with the largest sum of cosines (the Hungarian method).

    Returns the rows of `W_a`, the rows of `W_b` and their cosines. If either decoder has more than `dense` rows, a row of `W_a` may match
    only its `nearest` rows of `W_b`, and some rows may have no match.

    >>> match_decoder_rows(torch.eye(2), torch.tensor([[0.0, 3.0], [1.0, 1.0]]))
    (tensor([0, 1]), tensor([1, 0]), tensor([0.7071, 1.0000]))
    """
    a, b = functional.unit_rows(W_a.float()), functional.unit_rows(W_b.float())
    if max(len(a), len(b)) <= dense:
        cosines = a @ b.T
        rows, columns = (torch.as_tensor(side) for side in linear_sum_assignment(cosines.cpu().numpy(), maximize=True))
        return rows, columns, cosines.cpu()[rows, columns]
    return _match_nearest(a, b, nearest)


def _match_nearest(a: Tensor, b: Tensor, nearest: int) -> tuple[Tensor, Tensor, Tensor]:
    """The one-to-one match of least cost, where a row of `a` may match only its `nearest` rows of `b`.

    A match costs 2 less its cosine. A row of `a` without a match costs 10, more than any match, so few rows stay without one.
    Returns the rows of `a`, the rows of `b` and their cosines.
    """
    rows, columns, values = list[Tensor](), list[Tensor](), list[Tensor]()
    for begin in range(0, len(a), 1024):
        top = (a[begin : begin + 1024] @ b.T).topk(min(nearest, len(b)))
        rows.append(torch.arange(begin, begin + len(top.values))[:, None].expand_as(top.indices).flatten())
        columns.append(top.indices.flatten().cpu())
        values.append(top.values.flatten().cpu())
    row, column, value = torch.cat(rows), torch.cat(columns), torch.cat(values)
    # Each row has an extra column that costs more than any cosine, so that a full match always exists. Costs must not be 0.
    extra = np.arange(len(a))
    costs = np.concatenate([2 - value.double().numpy(), np.full(len(a), 10.0)])
    places = np.concatenate([row.numpy(), extra]), np.concatenate([column.numpy(), len(b) + extra])
    matched_rows, matched_columns = min_weight_full_bipartite_matching(coo_matrix((costs, places), shape=(len(a), len(b) + len(a))).tocsr())
    real = matched_columns < len(b)
    rows_a, rows_b = torch.as_tensor(matched_rows[real]).long(), torch.as_tensor(matched_columns[real]).long()
    return rows_a, rows_b, (a[rows_a.to(a.device)] * b[rows_b.to(b.device)]).sum(1).cpu()


# Matches stored for each latent, splits stored for each SAE.
MATCHES, SPLITS = 3, 50
# Smallest phi at which two latents count as related.
RELATED = 0.2
# Column of each figure among the sums by document.
FIGURES = {"fvu": 2, "l0": 3, "cosine": 4}
LOSSES = {"ce_sae": 2, "kl": 5}


@dataclass(frozen=True)
class Matches:
    """Each latent's best matches in the other SAE by phi."""

    phi: Float[Tensor, "latent match"]
    """Phi of the matches, largest first."""
    latent: Int[Tensor, "latent match"]
    """Latents of the other SAE."""
    live: Tensor
    """Mask of latents that fired on some tokens but not on all."""

    def figures(self) -> dict[str, float]:
        """Quantiles of the phi of live latents with their best matches, and shares above some phi; without live latents, a NaN median."""
        best = self.phi[self.live, 0].double()
        if not len(best):
            return {"median": float("nan")}
        quantiles = {f"q{100 * q:g}": best.quantile(q).item() for q in (0.1, 0.9)}
        return {"median": best.median().item(), **quantiles, **{f"above_{x:g}": (best > x).double().mean().item() for x in (0.3, 0.5, 0.7)}}


def compare(a: Evaluation, b: Evaluation, settings: Settings) -> dict[str, Any]:
    """Differences (second SAE minus first), matches, splits and merges of two SAEs that were evaluated together."""
    firings_a, firings_b = (firings(evaluation.collected) for evaluation in (a, b))
    check_same_rows(a.collected, b.collected)
    forward, backward = best_matches(firings_a, firings_b, settings.pairs_gib)
    # Tokens shifted by half of the text: the firing rates stay, and every real relation is lost.
    chance, _ = best_matches(firings_a, firings_b.shifted(firings_b.tokens // 2), settings.pairs_gib)
    rows, columns, cosines = match_decoder_rows(a.collected.subject.W_dec, b.collected.subject.W_dec)
    return {
        "differences": differences(a, b, settings),
        "cross_phi": {"a_in_b": forward.figures(), "b_in_a": backward.figures(), "a_in_b_by_chance": chance.figures()},
        "splits": splits(forward, firings_b),
        "merges": splits(backward, firings_a),
        "matching": {
            **{"pairs": len(rows), "mean_cosine": cosines.double().mean().item(), "median_cosine": cosines.double().median().item()},
            **{f"above_{x:g}": (cosines > x).double().mean().item() for x in (0.7, 0.9)},
            **{"a": rows.tolist(), "b": columns.tolist(), "cosine": [round(value, 4) for value in cosines.tolist()]},
        },
        "best": {"a_in_b": matches_record(forward), "b_in_a": matches_record(backward)},
    }


def firings(collected: CollectedCodes) -> Firings:
    """The firings of all latents on all tokens, on the SAE's device."""
    parts = [(entry["latents"], entry["lengths"]) for entry in collected.entries()]
    latents, lengths = (torch.cat(side).to(collected.subject.sae.device) for side in zip(*parts, strict=True))
    return Firings.of(latents, lengths, len(collected.subject.W_dec))


def check_same_rows(a: CollectedCodes, b: CollectedCodes) -> None:
    """Raise an `InputError` unless both SAEs were run on the same tokens: tokenizer or text may have changed between their runs."""
    for entry_a, entry_b in zip(a.entries(), b.entries(), strict=True):
        if not all(torch.equal(entry_a[name], entry_b[name]) for name in ("tokens", "counted")):
            raise InputError(
                f"{a.subject.source} and {b.subject.source} were not seen on the same tokens: remove {b.subject.result_cache.folder}"
            )


def best_matches(a: Firings, b: Firings, memory_gib: float) -> tuple[Matches, Matches]:
    """The best matches by phi of a's latents in b, and of b's latents in a, from exact counts; computed in chunks of latents."""
    n, n_i, n_j = float(a.tokens), a.counts, b.counts
    count = min(MATCHES, len(n_i), len(n_j))
    rows = max(1, int(memory_gib * 2**30 / PAIR_BYTES) // len(n_j))
    back = n_j.new_full((count, len(n_j)), -torch.inf, dtype=torch.float32), n_j.new_zeros(count, len(n_j), dtype=torch.long)
    forth = list[tuple[Tensor, Tensor]]()
    for start, together in a.cofirings(b, rows):
        phi = functional.phi(together, n_i[start : start + len(together), None], n_j[None], n).float()
        top = phi.topk(count)
        forth.append((top.values, top.indices))
        values, latents = phi.topk(min(count, len(phi)), dim=0)
        values, latents = torch.cat([back[0], values]), torch.cat([back[1], start + latents])
        best = values.topk(count, dim=0)
        back = best.values, latents.gather(0, best.indices)
    values, latents = (torch.cat(side).cpu() for side in zip(*forth, strict=True))
    live_i, live_j = (((counts > 0) & (counts < n)).cpu() for counts in (n_i, n_j))
    return Matches(values, latents, live_i), Matches(back[0].T.cpu().contiguous(), back[1].T.cpu().contiguous(), live_j)


def splits(matches: Matches, other: Firings) -> list[dict[str, Any]]:
    """Latents that the other SAE splits: each latent has a phi of at least `RELATED` with both of its two best matches.

    There are at most `SPLITS` entries, those with the largest phi of the second match first. An entry has the phi of the latent with
    either match (`phi`), the phi between the matches (`phi_between`), and the lower bound of `phi_between` given `phi` (`bound`).
    """
    if matches.phi.shape[1] < 2:
        return []
    second = torch.where(matches.live & (matches.phi[:, 1] >= RELATED), matches.phi[:, 1], -torch.inf)
    chosen = [latent for latent in second.argsort(descending=True)[:SPLITS].tolist() if second[latent].isfinite()]
    into = matches.latent[chosen, :2].tolist()
    together = other.pair_cofirings([left for left, _ in into], [right for _, right in into])
    n, n_j = float(other.tokens), other.counts.cpu()
    entries: list[dict[str, Any]] = []
    for number, latent in enumerate(chosen):
        (left, right), n_x, n_y = matches.phi[latent, :2].double(), n_j[into[number][0]], n_j[into[number][1]]
        phi_between = functional.phi(together[number], n_x, n_y, n).item()
        bound = functional.cofiring_bound(left, right).item()
        entries.append(
            {"latent": latent, "into": into[number], "phi": [left.item(), right.item()], "bound": bound, "phi_between": phi_between}
        )
    return entries


def matches_record(matches: Matches) -> dict[str, list[Any]]:
    """Matches as JSON values, with phi rounded to four places."""
    return {"latent": matches.latent.tolist(), "phi": [[round(value, 4) for value in row] for row in matches.phi.tolist()]}


def differences(a: Evaluation, b: Evaluation, settings: Settings) -> dict[str, dict[str, Any]]:
    """Figures of the second SAE minus the first's, with intervals and p values.

    Reconstruction and splice figures have bootstrap intervals over documents, and permutation p values. `phi_excess` has a jackknife
    interval over groups of documents, and no p value. `documents` has the number of documents.
    """
    resampled_a, resampled_b = (resampled_reconstruction(evaluation.collected, settings) for evaluation in (a, b))
    ids, sums, _ = a.collected.by_document
    _, sums_b, _ = b.collected.by_document
    figures = [evaluation.entry["figures"]["reconstruction"] for evaluation in (a, b)]
    changes = {name: sums_b[:, column] - sums[:, column] for name, column in FIGURES.items()}
    by_figure = paired_differences(resampled_a, resampled_b, figures, changes, settings)
    if a.spliced is not None and b.spliced is not None:
        losses = [resampled_losses(evaluation.spliced, settings) for evaluation in (a, b) if evaluation.spliced is not None]
        points = [evaluation.entry["figures"]["splice"] for evaluation in (a, b)]
        changes = {name: b.spliced.sums[:, column] - a.spliced.sums[:, column] for name, column in LOSSES.items()}
        by_figure |= paired_differences(losses[0], losses[1], points, changes, settings)
    by_figure["phi_excess"] = excess_difference(a, b)
    by_figure["documents"] = {"count": len(ids)}
    return by_figure


def excess_difference(a: Evaluation, b: Evaluation) -> dict[str, Any]:
    """Excess mean |phi| of both SAEs over all pairs, b minus a, and the jackknife interval of this difference from random pairs."""
    without_a, without_b = (excess_without_each(evaluation.collected) for evaluation in (a, b))
    points = [evaluation.entry["figures"]["phi"]["excess"] for evaluation in (a, b)]
    point = points[1] - points[0]
    return {"a": points[0], "b": points[1], "difference": point, "interval": jackknife_interval(point, without_b - without_a)}


def paired_differences(
    resampled_a: Mapping[str, Tensor],
    resampled_b: Mapping[str, Tensor],
    points: Sequence[Mapping[str, float]],
    changes: Mapping[str, Float[Tensor, " document"]],
    settings: Settings,
) -> dict[str, dict[str, Any]]:
    """Differences of figures, b minus a, each with its bootstrap interval and permutation p value.

    `points` are the figures of a and of b. `changes` are the differences by document of the sums behind each figure, for the p value.
    """
    by_figure: dict[str, dict[str, Any]] = {}
    for name, change in changes.items():
        low, high = interval(resampled_b[name] - resampled_a[name])
        p = permutation_p(change, settings.resamples, settings.seed)
        a, b = (point[name] for point in points)
        by_figure[name] = {"a": a, "b": b, "difference": b - a, "interval": [low, high], "p": p}
    return by_figure


def permutation_p(change: Float[Tensor, " document"], resamples: int, seed: int = 0) -> float:
    """Two-sided permutation p value of a sum of differences by document. A negative random sign swaps the SAEs on that document.

    >>> permutation_p(torch.ones(20), 999), permutation_p(torch.tensor([1.0, -1.0]), 999)
    (0.001, 1.0)
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (resamples, len(change)), generator=generator).double() * 2 - 1
    sums, observed = (signs @ change.double()).abs(), change.double().sum().abs()
    return (1 + int((sums >= observed - 1e-12 * change.double().abs().sum()).sum())) / (1 + resamples)
