"""Concepts that are sets of words: a word, a suffix, or the words of a topic. Each has an explanation from which it can be recovered."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool

Kind = Literal["word", "suffix", "topic", "mixture"]

# A word is a run of these letters; upper and lower case are the same.
WORD = re.compile(r"[A-Za-z]+")
# The explanation of each kind of concept, with its words or its suffix in quotation marks.
WORD_EXPLANATION, SUFFIX_EXPLANATION, TOPIC_EXPLANATION = 'the word "{}"', 'words that end in "-{}"', "words of one topic: {}"


@dataclass(frozen=True)
class Concept:
    """A set of words: those in `words`, and those that end in `suffix` and are longer than it."""

    words: frozenset[str] = frozenset()
    """The words in lower case."""
    suffix: str = ""
    """The suffix, or empty. A concept with a suffix holds on the last token of a word, any other on all tokens of a word."""

    def holds_for(self, word: str) -> bool:
        """Whether a word in lower case is in the set."""
        return word in self.words or (bool(self.suffix) and len(word) > len(self.suffix) and word.endswith(self.suffix))

    def mask(self, tokens: Sequence[str]) -> Bool[np.ndarray, " token"]:
        """Whether the concept holds on each token of a text.

        >>> Concept(suffix="ing").mask(["I", " am", " sing", "ing", " a", " thing", "y"]).tolist()
        [False, False, False, True, False, False, False]
        >>> Concept(frozenset({"array"})).mask([" Arr", "ay", " arrays"]).tolist()
        [True, True, False]
        """
        mask = np.zeros(len(tokens), dtype=bool)
        for word, first, last in words_of_tokens(tokens):
            if self.holds_for(word):
                mask[last if self.suffix else first : last + 1] = True
        return mask


def words_of_tokens(tokens: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Each word of a text in lower case, with the indices of its first and its last token.

    >>> list(words_of_tokens(["Some", "thing", " (is)"]))
    [('something', 0, 1), ('is', 2, 2)]
    """
    ends = np.cumsum([len(token) for token in tokens])
    matches = list(WORD.finditer("".join(tokens)))
    firsts = np.searchsorted(ends, [match.start() for match in matches], side="right")
    lasts = np.searchsorted(ends, [match.end() - 1 for match in matches], side="right")
    for match, first, last in zip(matches, firsts.tolist(), lasts.tolist(), strict=True):
        yield match.group().lower(), first, last


def word_explanation(word: str) -> str:
    """The explanation of a latent that fires on one word."""
    return WORD_EXPLANATION.format(word)


def suffix_explanation(suffix: str) -> str:
    """The explanation of a latent that fires on words with a suffix."""
    return SUFFIX_EXPLANATION.format(suffix)


def topic_explanation(words: Sequence[str]) -> str:
    """The explanation of a latent that fires on the words of a topic."""
    return TOPIC_EXPLANATION.format(", ".join(f'"{word}"' for word in words))


def concept_of(explanation: str) -> Concept | None:
    """The concept that an explanation of this module names; None for any other explanation.

    >>> concept_of('words that end in "-ing"').suffix, concept_of("words about food")
    ('ing', None)
    """
    quoted = re.findall(r'"([^"]*)"', explanation)
    if len(quoted) == 1 and explanation == SUFFIX_EXPLANATION.format(quoted[0].removeprefix("-")):
        return Concept(suffix=quoted[0].removeprefix("-"))
    if quoted and explanation in (WORD_EXPLANATION.format(quoted[0]), topic_explanation(quoted)):
        return Concept(frozenset(quoted))
    return None
