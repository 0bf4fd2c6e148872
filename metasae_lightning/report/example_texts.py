"""Texts of the page's examples. Texts that overlap are stored once, also those of two arms that were evaluated on the same text."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Example:
    """A token that a latent fires on, in a text."""

    tokens: list[str]
    """Texts of the tokens around it."""
    start: int | None
    """Position of the first of them in all text; None if the record does not tell it."""
    at: int
    """Index of the token that the latent fires on."""
    quantile: float | None
    """Share of the latent's firings that are at most as strong; None if the record does not tell it."""
    fired: list[tuple[int, float]]
    """Index and activation of each of the tokens that the latent fires on."""


def examples_of(latents: Mapping[str, Any], latent: int) -> list[Example]:
    """The examples of a latent in the content of `latents.json.gz`; those of older runs are its top contexts."""
    if "examples" in latents:
        return [
            Example(
                latents["texts"][example["text"]],
                latents["starts"][example["text"]],
                example["at"],
                example["quantile"],
                [(index, value) for index, value in example["fired"] if value],
            )
            for example in latents["examples"].get(str(latent), [])
        ]
    return [
        Example(context["tokens"], None, context["at"], None, [(index, value) for index, value in enumerate(context["values"]) if value])
        for context in latents["contexts"].get(str(latent), [])
    ]


class TextPool:
    """The texts of some examples. Texts that overlap are joined, since windows overlap only within a document."""

    def __init__(self, examples: Iterable[Example]) -> None:
        self.texts: list[list[str]] = []
        self._starts: list[int] = []
        self._others: dict[tuple[str, ...], int] = {}
        placed = {(example.start, len(example.tokens)): example.tokens for example in examples if example.start is not None}
        for (start, length), tokens in sorted(placed.items(), key=lambda item: item[0]):
            end = self._starts[-1] + len(self.texts[-1]) if self.texts else -1
            overlap = end - start
            if overlap <= 0:
                self._starts.append(start)
                self.texts.append(list(tokens))
            elif overlap < length:
                self.texts[-1] += tokens[overlap:]

    def place(self, example: Example) -> tuple[int, int]:
        """Index of the example's text, and of the token that the latent fires on in it."""
        if example.start is not None:
            index = bisect_right(self._starts, example.start) - 1
            offset = example.start - self._starts[index] if index >= 0 else 0
            if index >= 0 and self.texts[index][offset : offset + len(example.tokens)] == example.tokens:
                return index, offset + example.at
        # A text without a position, or one of an arm that was evaluated on another text.
        key = tuple(example.tokens)
        if key not in self._others:
            self._others[key] = len(self.texts)
            self.texts.append(example.tokens)
        return self._others[key], example.at


def packed_example(pool: TextPool, example: Example, maximum: float) -> list[Any]:
    """An example for `page.js`: text, index in it, quantile, and offset and activation, in percent of the maximum, of all that fired."""
    text, at = pool.place(example)
    fired = [
        number for index, value in example.fired for number in (index - example.at, max(1, round(100 * value / maximum)) if maximum else 1)
    ]
    return [text, at, example.quantile, fired]
