"""The strongest firings of each latent: on a CPU by numpy, passage by passage; on a GPU by sorting many passages at once."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasae_lightning.compute.row_chunks import is_blocked
from metasae_lightning.evaluation.collect import CollectedCodes

# Number of collected firings from which a GPU sorts them.
SORTED_AT_ONCE = 2**22


@dataclass(frozen=True)
class Hits:
    """Firings: tokens on which latents are active."""

    values: Float[np.ndarray, " hit"]
    """Activation of each firing."""
    places: Int[np.ndarray, "hit 4"]
    """Latent, document, passage, and position in the passage of each firing."""

    def best(self, count: int) -> "Hits":
        """The strongest firing of each latent in each of its `count` best documents, sorted by latent, then strongest first."""
        latent, document = self.places[:, 0], self.places[:, 1]
        order = np.lexsort((-self.values, document, latent))
        latent, document = latent[order], document[order]
        first = np.append(True, (np.diff(latent) != 0) | (np.diff(document) != 0))[: len(order)]
        order = order[first]
        order = order[np.lexsort((-self.values[order], self.places[order, 0]))]
        best = order[rank_in_group(self.places[order, 0]) < count]
        return Hits(self.values[best], self.places[best])


def rank_in_group(groups: Int[np.ndarray, " item"]) -> Int[np.ndarray, " item"]:
    """Index of each item within its group; the items of a group are adjacent.

    >>> rank_in_group(np.array([3, 3, 3, 5, 7, 7])).tolist()
    [0, 1, 2, 0, 0, 1]
    """
    starts = np.append(True, np.diff(groups) != 0)[: len(groups)]
    places = np.arange(len(groups))
    return places - np.maximum.accumulate(np.where(starts, places, 0))


def strongest_hits(collected: CollectedCodes, chosen: Bool[Tensor, " d_sae"], count: int) -> Hits:
    """The strongest firing of each chosen latent in each of its `count` best documents.

    Of equal firings the first counts. On a GPU they are found there, and the host waits once.
    """
    if not is_blocked(collected.subject.W_dec):
        return _strongest_hits_on_device(collected, chosen, count)
    best = Hits(np.zeros(0, np.float32), np.zeros((0, 4), np.int64))
    threshold = torch.zeros(len(chosen))
    for number, (codes, entry) in enumerate(collected.codes()):
        # Once a latent has `count` documents, only stronger firings matter.
        stronger = (chosen[codes.latents] & (codes.values > threshold[codes.latents])).nonzero().flatten()
        position = entry["counted"].flatten().nonzero().flatten()[codes.rows[stronger]]
        document = entry["owner"].flatten()[position]
        places = torch.stack([codes.latents[stronger], document, torch.full_like(position, number), position], 1).numpy()
        values = np.concatenate([best.values, codes.values[stronger].numpy()])
        best = Hits(values, np.concatenate([best.places, places])).best(count)
        full = np.flatnonzero(rank_in_group(best.places[:, 0]) == count - 1)
        threshold[best.places[full, 0]] = torch.from_numpy(best.values[full])
    return best


def _strongest_hits_on_device(collected: CollectedCodes, chosen: Bool[Tensor, " d_sae"], count: int) -> Hits:
    """`strongest_hits`, on the SAE's device; firings of many passages are sorted together."""
    device = collected.device
    is_chosen, latents = chosen.to(device), torch.arange(len(chosen), device=device).repeat_interleave(count)
    best = torch.full((len(latents),), -torch.inf, device=device), torch.stack([latents, *[torch.zeros_like(latents)] * 3], 1)
    waiting, n_waiting = [best], 0
    for number, (codes, entry) in enumerate(collected.codes(device)):
        owner, positions = entry["owner"].flatten(), entry["counted"].flatten().nonzero().flatten()
        document_and_position = torch.stack([owner[positions], torch.full_like(positions, number), positions], 1)
        of_firing = document_and_position.to(device, non_blocking=True)[codes.rows]
        values = codes.values.where(is_chosen[codes.latents], -torch.inf)
        waiting.append((values, torch.cat([codes.latents[:, None], of_firing], 1)))
        n_waiting += len(values)
        if n_waiting >= SORTED_AT_ONCE:
            waiting, n_waiting = [_best_of_parts(waiting, len(chosen), count)], 0
    values, places = (side.cpu() for side in _best_of_parts(waiting, len(chosen), count))
    is_hit = values > -torch.inf
    return Hits(values[is_hit].numpy(), places[is_hit].numpy())


def _best_of_parts(parts: list[tuple[Tensor, Tensor]], d_sae: int, count: int) -> tuple[Tensor, Tensor]:
    """`best_by_latent` of the values and places of several parts."""
    values, places = (torch.cat(side) for side in zip(*parts, strict=True))
    return best_by_latent(values, places, d_sae, count)


def best_by_latent(
    values: Float[Tensor, " hit"], places: Int[Tensor, "hit 4"], d_sae: int, count: int
) -> tuple[Float[Tensor, " best"], Int[Tensor, "best 4"]]:
    """The strongest firing of each latent in each of its `count` best documents: `count` places for each latent, strongest first.

    `places` has columns as in `Hits`, with document ids below 2^31. The value of a free place is -inf. Shapes do not depend on the values.
    """
    order = values.sort(descending=True, stable=True).indices
    group = places[:, 0] * 2**31 + places[:, 1]
    order = order[group[order].sort(stable=True).indices]
    group = group[order]
    is_first = torch.cat([torch.ones_like(group[:1], dtype=torch.bool), group[1:] != group[:-1]])
    values = values[order].where(is_first, -torch.inf)
    by_value = values.sort(descending=True, stable=True).indices
    by_latent = by_value[places[order[by_value], 0].sort(stable=True).indices]
    values, places = values[by_latent], places[order[by_latent]]
    latents = torch.arange(d_sae, device=values.device)
    begin = torch.searchsorted(places[:, 0].contiguous(), latents)
    chosen = (begin[:, None] + torch.arange(count, device=values.device)).clamp(max=len(values) - 1)
    is_own = places[chosen, 0] == latents[:, None]
    best = places[chosen]
    best[..., 0] = latents[:, None]
    return values[chosen].where(is_own, -torch.inf).flatten(), best.flatten(0, 1)
