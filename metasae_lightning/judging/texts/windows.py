"""Windows of text around firings of a latent, and the choice among them: from which documents, and how strong."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from metasae_lightning.judging.texts.flat_text import FlatText, Positions

# Bins with equal numbers of a latent's firings, by activation.
QUANTILE_BINS = 5


@dataclass(frozen=True)
class ContextSettings:
    """How many contexts a latent gets, and their size."""

    explaining: int = 10
    """Contexts for the explanation."""
    scoring: int = 10
    """Contexts for the scores in which the latent fires."""
    silent: int = 10
    """Contexts for the scores in which it does not fire."""
    near: int = 5
    """Contexts for the scores in which the latent with the nearest decoder row fires and this one does not."""
    fewest: int = 5
    """A latent is left out if it has fewer contexts than this, and fewer than asked for, in `explaining`, `scoring` or `silent`."""
    before: int = 24
    """Tokens of a context before the one that the latent fires on."""
    after: int = 7
    """Tokens of a context after it."""
    seed: int = 0
    """Seed of the documents' split and of all random choices."""
    draw: int = 0
    """Number of the draw. Each draws other contexts from the same split."""


@dataclass(frozen=True)
class LatentFirings:
    """The firings of one latent, in the order of the text: positions of tokens, and activations (`values`)."""

    positions: Int[np.ndarray, " firing"]
    values: Float[np.ndarray, " firing"]

    def activations(self, start: int, stop: int) -> tuple[float, ...]:
        """The latent's activation on each token from `start` up to `stop`."""
        begin, end = np.searchsorted(self.positions, [start, stop])
        dense = np.zeros(stop - start)
        dense[self.positions[begin:end] - start] = self.values[begin:end]
        return tuple(dense.tolist())

    def strongest(self, start: int, stop: int) -> int:
        """The token of a window with the latent's largest activation."""
        begin, end = np.searchsorted(self.positions, [start, stop])
        return int(self.positions[begin + int(np.argmax(self.values[begin:end]))])

    def is_silent(self, start: Positions, stop: Positions) -> Bool[np.ndarray, " window"]:
        """Whether the latent fires on no token of each window."""
        return np.searchsorted(self.positions, start) == np.searchsorted(self.positions, stop)


@dataclass(frozen=True)
class Candidates:
    """Windows of a latent, each around a firing that is the strongest in it: activation, first position, position after the last."""

    values: Float[np.ndarray, " window"]
    start: Positions
    stop: Positions
    group: Positions
    """Number of each window's document (see `FlatText.group`)."""
    quantile_bin: Positions
    """Quantile bin of each window's activation among all firings of the latent, of `QUANTILE_BINS`; 0 has the weakest."""

    @classmethod
    def of(cls, firings: LatentFirings, text: FlatText, settings: ContextSettings) -> "Candidates":
        """The candidates of one latent."""
        positions, values = firings.positions, firings.values
        start, stop = text.windows(positions, settings.before, settings.after)
        if len(positions):
            ranges = np.searchsorted(positions, np.stack([start, stop], 1))
            # `reduceat` gives the maximum from each index to the next; every second one is that of a window.
            largest = np.maximum.reduceat(np.append(values, -np.inf), ranges.ravel())[::2]
        else:
            largest = values
        edges = np.quantile(values, np.arange(1, QUANTILE_BINS) / QUANTILE_BINS) if len(values) else np.zeros(0)
        chosen = np.flatnonzero(values >= largest)
        bins = np.searchsorted(edges, values[chosen], side="right")
        return cls(values[chosen], start[chosen], stop[chosen], text.group[positions[chosen]], bins)

    def select(self, chosen: Bool[np.ndarray, " window"]) -> "Candidates":
        """The candidates that a mask chooses."""
        fields = (self.values, self.start, self.stop, self.group, self.quantile_bin)
        return Candidates(*(field[chosen] for field in fields))

    def windows(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """The first position of some windows, and the position after their last."""
        return list(zip(self.start[indices].tolist(), self.stop[indices].tolist(), strict=True)) if indices else []

    def strongest_first(self) -> list[int]:
        """The strongest candidate of each document, strongest first."""
        order = np.argsort(-self.values, kind="stable")
        _, first = np.unique(self.group[order], return_index=True)
        return order[np.sort(first)].tolist()

    def random_by_bin(self, generator: np.random.Generator) -> list[list[int]]:
        """The candidates of each bin in random order, the bin of the strongest first."""
        order = generator.permutation(len(self.values))
        # One candidate is enough for each bin of each document.
        _, first = np.unique(self.group[order] * QUANTILE_BINS + self.quantile_bin[order], return_index=True)
        order = order[np.sort(first)]
        return [order[self.quantile_bin[order] == number].tolist() for number in reversed(range(QUANTILE_BINS))]


class Picker:
    """Picks windows for one latent: at most one from each document, and none with the same tokens as another."""

    def __init__(self, text: FlatText):
        self._text = text
        self._groups, self._windows = set[int](), set[bytes]()

    def pick(self, windows: Iterable[tuple[int, int]], count: int) -> list[tuple[int, int]]:
        """The first `count` windows that may be picked."""
        picked: list[tuple[int, int]] = []
        for start, stop in windows if count > 0 else ():
            group, tokens = int(self._text.group[start]), self._text.tokens[start:stop].tobytes()
            if group in self._groups or tokens in self._windows:
                continue
            self._groups.add(group)
            self._windows.add(tokens)
            picked.append((start, stop))
            if len(picked) == count:
                break
        return picked

    def pick_evenly(self, candidates: Candidates, generator: np.random.Generator, count: int) -> list[tuple[int, int]]:
        """`count` random candidates: one from each bin in turn, as long as the bins have candidates that may be picked."""
        bins = [iter(candidates.windows(order)) for order in candidates.random_by_bin(generator)]
        picked: list[tuple[int, int]] = []
        while bins and len(picked) < count:
            bins_and_windows = [(part, self.pick(part, 1)) for part in bins[: count - len(picked)]]
            bins = [*(part for part, windows in bins_and_windows if windows), *bins[len(bins_and_windows) :]]
            picked += [window for _, windows in bins_and_windows for window in windows]
        return picked
