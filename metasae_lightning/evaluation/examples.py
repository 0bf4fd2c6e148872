"""Examples of each latent's firings, from the strongest to the weakest, with the text around them, and histograms of activations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from metasae_lightning.evaluation.collect import CollectedCodes
from metasae_lightning.evaluation.result_cache import Entry
from metasae_lightning.evaluation.strongest_hits import Hits, rank_in_group, strongest_hits
from metasae_lightning.evaluation.top_contexts import Spelling
from metasae_lightning.step import Codes

# An example is wanted at each of these quantiles of a latent's activations, beside the strongest.
QUANTILES = (0.95, 0.85, 0.7, 0.5, 0.3, 0.15, 0.05)
# Equal steps from 0 to a latent's largest activation.
BINS = 256
# Tokens of the document before and after the one that a latent fires on.
BEFORE, AFTER = 64, 32


@dataclass(frozen=True)
class Activations:
    """Histograms of the activations of all latents."""

    maximum: Float[Tensor, " d_sae"]
    """Largest activation of each latent."""
    counts: Int[Tensor, "d_sae bin"]
    """Number of firings in each of `BINS` equal steps from 0 to the maximum."""

    @classmethod
    def of(cls, collected: CollectedCodes, maximum: Float[Tensor, " d_sae"]) -> "Activations":
        """The histograms of collected codes, whose largest activations are `maximum`."""
        counts = torch.zeros(len(maximum) * BINS, dtype=torch.long)
        for codes, _ in collected.codes():
            counts += torch.bincount(bin_indices(codes, maximum), minlength=len(counts))
        return cls(maximum, counts.view(-1, BINS))

    def at_most(self) -> Float[Tensor, "d_sae bin"]:
        """Share of each latent's firings up to the end of each bin."""
        return self.counts.cumsum(1).double() / self.counts.sum(1, keepdim=True).clamp(min=1)

    def wanted(self) -> Int[Tensor, " cell"]:
        """Number of examples wanted from each bin of each latent, so that there is one at each quantile."""
        ends = self.counts.cumsum(1)
        ranks = (torch.tensor(QUANTILES, dtype=torch.float64) * ends[:, -1:]).ceil().long()
        bins = torch.searchsorted(ends, ranks).clamp(max=BINS - 1)
        return torch.zeros_like(self.counts).scatter_add(1, bins, torch.ones_like(bins)).flatten()


def bin_indices(codes: Codes, maximum: Float[Tensor, " d_sae"]) -> Int[Tensor, " nnz"]:
    """The bin of each activation, as an index into the flattened histograms of all latents."""
    share = codes.values / maximum.clamp(min=1e-30)[codes.latents]
    return codes.latents * BINS + (share * BINS).long().clamp(0, BINS - 1)


def examples_record(collected: CollectedCodes, activations: Activations, tokenizer: Any, *, strongest: int) -> dict[str, Any]:
    """Examples of all live latents, and the texts that they are in.

    `texts` has the texts of tokens, `starts` the position of each text in all passages, and `examples` those of each latent, strongest
    first. An example has the index of its text (`text`), the index of the token that the latent fires on (`at`), the share of the latent's
    firings that are at most as strong (`quantile`), and pairs of a token's index and the latent's activation there (`fired`).
    """
    is_live = activations.counts.sum(1) > 0
    hits = join_hits(strongest_hits(collected, is_live, strongest), hits_at_quantiles(collected, activations))
    bins = bin_indices(
        Codes(
            torch.zeros(len(hits.values), dtype=torch.long),
            torch.from_numpy(hits.places[:, 0]),
            torch.from_numpy(hits.values),
            (1, len(is_live)),
        ),
        activations.maximum,
    )
    quantiles = activations.at_most().flatten()[bins].tolist()
    spelling, texts, starts, example_of_hit = Spelling(tokenizer), list[list[str]](), list[int](), dict[int, dict[str, Any]]()
    begin = 0
    for number, (codes, entry) in enumerate(collected.codes() if len(hits.values) else ()):
        in_passage, tokens = np.flatnonzero(hits.places[:, 2] == number), entry["tokens"].flatten().tolist()
        windows = Windows.around(hits.places[in_passage, 3], entry)
        fired = windows.activations(codes, entry, hits.places[in_passage, 0])
        for hit, text, at, pairs in zip(in_passage.tolist(), windows.text.tolist(), windows.at.tolist(), fired, strict=True):
            quantile = round(quantiles[hit], 3)
            example_of_hit[hit] = {"text": len(texts) + text, "at": at, "quantile": quantile, "fired": pairs}
        texts += [spelling.token_texts(tokens[start:stop]) for start, stop in windows.texts]
        starts += [begin + start for start, _ in windows.texts]
        begin += len(tokens)
    examples: dict[str, list[dict[str, Any]]] = {}
    for hit, example in sorted(example_of_hit.items()):
        examples.setdefault(str(hits.places[hit, 0]), []).append(example)
    return {"texts": texts, "starts": starts, "examples": examples}


def hits_at_quantiles(collected: CollectedCodes, activations: Activations) -> Hits:
    """For each latent the first firings in the bins of `QUANTILES`."""
    remaining = activations.wanted()
    values, places = [np.zeros(0, np.float32)], [np.zeros((0, 4), np.int64)]
    for number, (codes, entry) in enumerate(collected.codes()):
        bins = bin_indices(codes, activations.maximum)
        candidates = (remaining[bins] > 0).nonzero().flatten()
        candidates = candidates[bins[candidates].argsort(stable=True)]
        rank = torch.from_numpy(rank_in_group(bins[candidates].numpy()))
        chosen = candidates[rank < remaining[bins[candidates]]]
        remaining.index_add_(0, bins[chosen], torch.full_like(chosen, -1))
        position = entry["counted"].flatten().nonzero().flatten()[codes.rows[chosen]]
        document = entry["owner"].flatten()[position]
        places.append(torch.stack([codes.latents[chosen], document, torch.full_like(position, number), position], 1).numpy())
        values.append(codes.values[chosen].numpy())
    return Hits(np.concatenate(values), np.concatenate(places))


def join_hits(first: Hits, second: Hits) -> Hits:
    """The firings of both, each once, sorted by latent, then strongest first."""
    values, places = np.concatenate([first.values, second.values]), np.concatenate([first.places, second.places])
    _, unique = np.unique(places, axis=0, return_index=True)
    order = unique[np.lexsort((-values[unique], places[unique, 0]))]
    return Hits(values[order], places[order])


@dataclass(frozen=True)
class Windows:
    """Tokens around positions in a passage. Windows that overlap are in one text; a text ends at the borders of context and document."""

    start: NDArray[Any]
    """First position of each window."""
    stop: NDArray[Any]
    """Position after the last of each window."""
    text: NDArray[Any]
    """Index of each window's text."""
    at: NDArray[Any]
    """Index of each window's position in its text."""
    texts: list[tuple[int, int]]
    """First position of each text, and the position after its last."""

    @classmethod
    def around(cls, positions: NDArray[Any], entry: Entry) -> "Windows":
        """The windows around some positions in a passage with this cached entry."""
        owner, length = entry["owner"].flatten().numpy(), entry["owner"].shape[1]
        places = np.arange(len(owner))
        is_border = places % length == 0
        is_border[1:] |= owner[1:] != owner[:-1]
        begins = np.flatnonzero(is_border)
        part = (np.cumsum(is_border) - 1)[positions]
        start = np.maximum(begins[part], positions - BEFORE)
        stop = np.minimum(np.append(begins[1:], len(owner))[part], positions + AFTER + 1)
        change = np.bincount(start, minlength=len(owner) + 1) - np.bincount(stop, minlength=len(owner) + 1)
        is_shown = np.cumsum(change)[:-1] > 0
        is_first = is_shown & (is_border | ~np.append(False, is_shown[:-1]))
        text_of, firsts = np.cumsum(is_first) - 1, np.flatnonzero(is_first)
        lengths = np.bincount(text_of[is_shown], minlength=len(firsts))
        text = text_of[positions]
        spans = list(zip(firsts.tolist(), (firsts + lengths).tolist(), strict=True))
        return cls(start, stop, text, positions - firsts[text], spans)

    def activations(self, codes: Codes, entry: Entry, latents: NDArray[Any]) -> list[list[list[float]]]:
        """For each window, pairs of a token's index in the text and the activation of the window's latent there, where it fires."""
        counted = entry["counted"].flatten().numpy().astype(bool)
        lengths, width = self.stop - self.start, codes.shape[1]
        window = np.repeat(np.arange(len(lengths)), lengths)
        position = np.arange(len(window)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + self.start[window]
        token = np.cumsum(counted) - 1
        keys, wanted = (codes.rows * width + codes.latents).numpy(), token[position] * width + latents[window]
        order = np.argsort(keys, kind="stable")
        nearest = order[np.searchsorted(keys, wanted, sorter=order).clip(max=len(keys) - 1)]
        fires = np.flatnonzero((keys[nearest] == wanted) & counted[position])
        firsts = np.array([first for first, _ in self.texts])
        index = position[fires] - firsts[self.text[window[fires]]]
        values = [float(f"{value:.3g}") for value in codes.values.numpy()[nearest[fires]].tolist()]
        pairs = [list(pair) for pair in zip(index.tolist(), values, strict=True)]
        ends = np.searchsorted(window[fires], np.arange(len(lengths) + 1))
        return [pairs[begin:end] for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


def shown_histograms(activations: Activations, bins: int) -> Mapping[str, list[int]]:
    """The histograms of live latents in fewer bins, by latent."""
    counts = activations.counts.view(len(activations.counts), bins, -1).sum(2)
    return {str(latent): counts[latent].tolist() for latent in (counts.sum(1) > 0).nonzero().flatten().tolist()}
