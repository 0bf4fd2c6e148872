"""Draw the contexts of many latents from collected codes: for their explanations, and for their scores."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.judging.texts.contexts import Context, LatentContexts
from metasae_lightning.judging.texts.flat_text import Collected, FlatText
from metasae_lightning.judging.texts.windows import Candidates, ContextSettings, LatentFirings, Picker

# Random positions that are tried in each document to find a context in which a latent does not fire.
SILENT_TRIES = 16


@dataclass(frozen=True)
class DrawnContexts:
    """The contexts of some latents of one SAE."""

    latents: list[LatentContexts]
    """The contexts of each latent, in the order asked for."""
    left_out: Mapping[int, str]
    """For each latent without contexts, the reason."""


class ContextDrawer:
    """Draws the contexts of latents, one latent at a time, from the same text."""

    def __init__(self, text: FlatText, settings: ContextSettings):
        self._text, self._settings = text, settings
        self._is_explaining = text.is_explaining(settings.seed)
        # Counted tokens of the documents for scores, sorted by document.
        scoring = np.flatnonzero(text.counted & ~self._is_explaining[text.group])
        self._scoring = scoring[np.argsort(text.group[scoring], kind="stable")]
        _, self._begins, self._sizes = np.unique(text.group[self._scoring], return_index=True, return_counts=True)

    def draw(
        self, latent: int, firings: LatentFirings, density: float, *, nearest: int | None, nearest_firings: LatentFirings | None
    ) -> LatentContexts | str:
        """The contexts of a latent, or the reason why it has too few."""
        settings, picker = self._settings, Picker(self._text)
        generator = np.random.default_rng([settings.seed, settings.draw, latent])
        candidates = Candidates.of(firings, self._text, settings)
        for_explaining = self._is_explaining[candidates.group]
        explaining = self._explaining(picker, candidates.select(for_explaining), generator)
        scoring = candidates.select(~for_explaining)
        firing = picker.pick_evenly(scoring, generator, settings.scoring)
        near = [] if nearest_firings is None else self._near(picker, firings, nearest_firings, generator)
        silent = picker.pick(self._silent(firings, generator), settings.silent)
        firing, silent = self._alike_in_length(firing, silent, firings)
        for found, wanted, reason in (
            (explaining, settings.explaining, "fires in too few documents for explanations"),
            (firing, settings.scoring, "fires in too few documents for scores"),
            (silent, settings.silent, "is silent in too few documents"),
        ):
            if len(found) < min(settings.fewest, wanted):
                return reason
        return LatentContexts(
            latent,
            density,
            explaining=self._strongest_first(explaining, firings),
            firing=self._strongest_first(firing, firings),
            silent=[self._context(window, firings) for window in silent],
            near=[self._context(window, firings, nearest_firings) for window in near],
            nearest=nearest,
        )

    def _explaining(self, picker: Picker, candidates: Candidates, generator: np.random.Generator) -> list[tuple[int, int]]:
        """Windows for the explanation: a third are the strongest, and the others are from all quantile bins."""
        strongest = picker.pick(candidates.windows(candidates.strongest_first()), self._settings.explaining // 3)
        count = self._settings.explaining - len(strongest)
        return strongest + picker.pick_evenly(candidates, generator, count)

    def _near(
        self, picker: Picker, firings: LatentFirings, nearest: LatentFirings, generator: np.random.Generator
    ) -> list[tuple[int, int]]:
        """Windows of the documents for scores around firings of the nearest latent, in which this latent does not fire."""
        candidates = Candidates.of(nearest, self._text, self._settings)
        candidates = candidates.select(~self._is_explaining[candidates.group] & firings.is_silent(candidates.start, candidates.stop))
        return picker.pick_evenly(candidates, generator, self._settings.near)

    def _silent(self, firings: LatentFirings, generator: np.random.Generator) -> Iterator[tuple[int, int]]:
        """Windows in which a latent does not fire, each around a random token of a random document for scores."""
        for _ in range(SILENT_TRIES):
            documents = generator.permutation(len(self._begins))
            chosen = (generator.random(len(documents)) * self._sizes[documents]).astype(np.int64)
            positions = self._scoring[self._begins[documents] + chosen]
            start, stop = self._text.windows(positions, self._settings.before, self._settings.after)
            is_silent = firings.is_silent(start, stop)
            yield from zip(start[is_silent].tolist(), stop[is_silent].tolist(), strict=True)

    def _alike_in_length(
        self, firing: list[tuple[int, int]], silent: list[tuple[int, int]], firings: LatentFirings
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Both kinds of windows, the longer of each two of equal rank cut to the length of the shorter: lengths must not tell them apart.

        Windows in which a frequent latent is silent are mostly short. A window loses tokens at its start, up to a word and up to the
        token that the latent fires on most.
        """
        firing, silent = (sorted(windows, key=lambda window: window[1] - window[0]) for windows in (firing, silent))
        for index in range(min(len(firing), len(silent))):
            (a, b), (c, d) = firing[index], silent[index]
            size = min(b - a, d - c)
            firing[index] = self._text.shortened(a, b, size, keep=firings.strongest(a, b)), b
            silent[index] = self._text.shortened(c, d, size, keep=d - 1), d
        return firing, silent

    def _strongest_first(self, windows: list[tuple[int, int]], firings: LatentFirings) -> list[Context]:
        return sorted((self._context(window, firings) for window in windows), key=lambda context: -context.peak)

    def _context(self, window: tuple[int, int], firings: LatentFirings, nearest: LatentFirings | None = None) -> Context:
        document, tokens = int(self._text.document[window[0]]), self._text.window_texts(*window)
        return Context(document, tokens, firings.activations(*window), () if nearest is None else nearest.activations(*window))


def draw_contexts(
    collected: Collected,
    latents: Sequence[int],
    *,
    text: FlatText,
    W_dec: Float[Tensor, "d_sae d_in"],
    settings: ContextSettings | None = None,
) -> DrawnContexts:
    """The contexts of some latents. They depend on the seed, and not on which other latents are drawn.

    A document is for explanations or for scores, by a hash of its text, and gives at most one context of a latent. Of the contexts for the
    explanation, a third are the strongest; the others, and the firing contexts for the scores, are drawn evenly from five bins
    of the latent's activations. A context is drawn around the firing that is the strongest in it. Silent contexts are drawn at random.
    """
    settings = settings or ContextSettings()
    counts = sum((codes.firings() for codes, _ in collected.codes()), start=torch.zeros(len(W_dec), dtype=torch.long))
    nearest = nearest_live(W_dec, latents, counts > 0)
    firings = _firings(collected, {*latents, *(other for other in nearest.values() if other is not None)}, len(W_dec))
    drawer, drawn, left_out = ContextDrawer(text, settings), list[LatentContexts](), dict[int, str]()
    for latent in latents:
        density = int(counts[latent]) / max(1, int(text.counted.sum()))
        other = nearest[latent]
        contexts = drawer.draw(latent, firings[latent], density, nearest=other, nearest_firings=None if other is None else firings[other])
        if isinstance(contexts, str):
            left_out[latent] = contexts
        else:
            drawn.append(contexts)
    return DrawnContexts(drawn, left_out)


def nearest_live(W_dec: Float[Tensor, "d_sae d_in"], latents: Sequence[int], is_live: Bool[Tensor, " d_sae"]) -> dict[int, int | None]:
    """For each latent the other live latent whose decoder row has the largest cosine with its own; None if there is none.

    >>> nearest_live(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5]]), [0], torch.tensor([True, False, True]))
    {0: 2}
    """
    directions, nearest = functional.unit_rows(W_dec.float().cpu()), dict[int, int | None]()
    for chunk in torch.tensor(list(latents), dtype=torch.long).split(1024) if len(latents) else ():
        cosines = (directions[chunk] @ directions.T).masked_fill_(~is_live, -torch.inf)
        cosines[torch.arange(len(chunk)), chunk] = -torch.inf
        largest = cosines.max(1)
        pairs = zip(chunk.tolist(), largest.indices.tolist(), largest.values.tolist(), strict=True)
        nearest |= {latent: other if cosine > -torch.inf else None for latent, other, cosine in pairs}
    return nearest


def _firings(collected: Collected, latents: set[int], d_sae: int) -> dict[int, LatentFirings]:
    """The firings of some latents."""
    is_wanted = torch.zeros(d_sae, dtype=torch.bool)
    is_wanted[list(latents)] = True
    owners, positions, values, begin = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)], 0
    for codes, entry in collected.codes():
        chosen = is_wanted[codes.latents].nonzero().flatten()
        row_positions = entry["counted"].flatten().nonzero().flatten()
        owners.append(codes.latents[chosen].numpy())
        positions.append(begin + row_positions[codes.rows[chosen]].numpy())
        values.append(codes.values[chosen].float().numpy())
        begin += entry["counted"].numel()
    owner, position, value = (np.concatenate(parts) for parts in (owners, positions, values))
    order = np.lexsort((position, owner))
    owner, position, value = owner[order], position[order], value[order]
    bounds = {latent: np.searchsorted(owner, [latent, latent + 1]) for latent in latents}
    return {latent: LatentFirings(position[begin:end], value[begin:end]) for latent, (begin, end) in bounds.items()}
