"""Planted latents: made-up latents with a known concept, on the same text as an SAE's latents. They measure how reliable a judge is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.evaluation.result_cache import Entry
from metasae_lightning.judging.texts.concepts import (
    Concept,
    Kind,
    concept_of,
    suffix_explanation,
    topic_explanation,
    word_explanation,
)
from metasae_lightning.judging.texts.flat_text import Collected, FlatText
from metasae_lightning.judging.texts.text_words import Words
from metasae_lightning.step import Codes

# Suffixes that may be planted, the first ones first.
SUFFIXES = ("ing", "ed", "tion", "ly", "ment", "able", "ity", "ness", "ous", "ive", "est", "er")
# A planted word has at least this many letters, and is in at most this share of the documents.
LETTERS, MOST_DOCUMENTS = 4, 0.5
# Words of a topic, the smallest number of documents that have each, and the largest share of them.
TOPIC_WORDS, TOPIC_DOCUMENTS, MOST_TOPIC_DOCUMENTS = 6, 5, 0.1
# Topics are searched among this many words, the most frequent ones. Memory grows with the square.
TOPIC_CANDIDATES = 2000
Firings = tuple[Int[np.ndarray, " _"], Float[np.ndarray, " _"]]
# Width of the random decoder rows.
D_IN = 64


@dataclass(frozen=True)
class PlantSettings:
    """How many latents of each kind are planted, at most: a text may have fewer such concepts."""

    words: int = 8
    """Latents that fire on one word."""
    suffixes: int = 6
    """Latents that fire on words with one suffix."""
    topics: int = 4
    """Latents that fire on the words of one topic."""
    mixtures: int = 4
    """Latents that fire on two unrelated words."""
    fewest_documents: int = 24
    """Smallest number of documents of different text that have the concept of a planted latent."""
    seed: int = 0
    """Seed of the choice of words, of the activations and of the decoder rows."""


@dataclass(frozen=True)
class PlantedLatent:
    """A latent that fires on exactly the tokens on which its concept holds."""

    kind: Kind
    """What it fires on: a word; words that end in a suffix; the words of a topic; or two unrelated words."""
    explanation: str
    """Its explanation. The explanation of a mixture names only the more frequent of its two words."""
    concept: Concept
    """The words on which it fires."""
    unnamed: str = ""
    """The word of a mixture that the explanation does not name."""


@dataclass(frozen=True)
class PlantedTruth:
    """The explanations and kinds of planted latents."""

    latents: Sequence[PlantedLatent]
    """The latents, in the order of their indices."""

    @property
    def explanations(self) -> dict[int, str]:
        """The explanation of each latent."""
        return {index: latent.explanation for index, latent in enumerate(self.latents)}

    @property
    def kinds(self) -> dict[int, Kind]:
        """The kind of each latent."""
        return {index: latent.kind for index, latent in enumerate(self.latents)}

    @staticmethod
    def concept_mask(explanation: str, tokens: Sequence[str]) -> Bool[np.ndarray, " token"]:
        """Whether the concept of an explanation holds on each token of a text; nowhere if it is no explanation of a planted latent.

        >>> PlantedTruth.concept_mask('the word "cat"', ["A", " cat", "."]).tolist()
        [False, True, False]
        """
        concept = concept_of(explanation)
        return np.zeros(len(tokens), dtype=bool) if concept is None else concept.mask(tokens)


@dataclass(frozen=True)
class PlantedLatents:
    """Planted latents with their codes, in the form of an SAE's collected codes."""

    truth: PlantedTruth
    """What the latents fire on."""
    text: FlatText
    """The text. All its tokens are counted, because the concepts are known on each."""
    W_dec: Float[Tensor, "latent d_in"]
    """Random unit rows. They only decide which planted latent is the nearest of each."""
    entries: Sequence[Entry]
    """Tokens and document ids of each passage."""
    firings: Sequence[Firings]
    """Position in the text and activation of each firing, by latent."""

    def codes(self) -> Iterator[tuple[Codes, Entry]]:
        """The codes of each passage, with its entry."""
        begin = 0
        for entry in self.entries:
            end = begin + entry["tokens"].numel()
            parts = [np.searchsorted(positions, [begin, end]) for positions, _ in self.firings]
            rows = [positions[a:b] - begin for (positions, _), (a, b) in zip(self.firings, parts, strict=True)]
            values = [acts[a:b] for (_, acts), (a, b) in zip(self.firings, parts, strict=True)]
            row, value = np.concatenate([[], *rows]).astype(np.int64), np.concatenate([[], *values]).astype(np.float32)
            latent = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
            order = np.lexsort((latent, row))
            row, latent, value = (torch.from_numpy(side[order]) for side in (row, latent, value))
            yield Codes(row, latent, value, (end - begin, len(self.firings))), entry
            begin = end


def plant(collected: Collected, tokenizer: Any, settings: PlantSettings | None = None) -> PlantedLatents:
    """Plant latents in the text that codes were collected on. No two of them have a word in common.

    Activations are random between 0.5 and 1. A mixture must get lower scores than the others: it fires on two unrelated words, and its
    explanation names one of them, so a judge that follows the explanation misses the other. The unnamed word has the larger activations, so
    that the strengths contradict the explanation too.
    """
    settings = settings or PlantSettings()
    entries = [
        {"tokens": entry["tokens"], "owner": entry["owner"], "counted": torch.ones_like(entry["tokens"], dtype=torch.bool)}
        for _, entry in collected.codes()
    ]
    text = FlatText.of_entries(entries, tokenizer)
    words, generator = Words.of(text), np.random.default_rng(settings.seed)
    suffixes = _suffixes(words, settings)
    taken = [latent.concept for latent in suffixes]
    topics = _topics(words, taken, settings)
    taken += [latent.concept for latent in topics]
    single, mixtures = _words_and_mixtures(words, taken, settings, generator)
    latents = [*single, *suffixes, *topics, *mixtures]
    W_dec = torch.from_numpy(generator.standard_normal((len(latents), D_IN))).float()
    firings = [_firings(words, latent, np.random.default_rng([settings.seed, index])) for index, latent in enumerate(latents)]
    return PlantedLatents(PlantedTruth(latents), text, functional.unit_rows(W_dec), entries, firings)


def _suffixes(words: Words, settings: PlantSettings) -> list[PlantedLatent]:
    """Latents of suffixes: the first in `SUFFIXES` that enough documents have."""
    concepts = [Concept(suffix=suffix) for suffix in SUFFIXES]
    frequent = [concept for concept in concepts if words.n_documents_of(concept) >= settings.fewest_documents]
    return [PlantedLatent("suffix", suffix_explanation(concept.suffix), concept) for concept in frequent[: settings.suffixes]]


def _topics(words: Words, taken: Sequence[Concept], settings: PlantSettings) -> list[PlantedLatent]:
    """Latents of topics: a word, and the words with the largest phi with it over documents. Topics with the largest mean phi come first."""
    most = MOST_TOPIC_DOCUMENTS * words.n_texts
    candidates = words.candidates(taken, LETTERS, TOPIC_DOCUMENTS, most)[:TOPIC_CANDIDATES]
    if len(candidates) < TOPIC_WORDS:
        return []
    phi = words.phi(candidates)
    np.fill_diagonal(phi, np.inf)  # a topic begins with its own word
    members = np.argsort(-phi, axis=1, kind="stable")[:, :TOPIC_WORDS]
    strength = np.take_along_axis(phi, members[:, 1:], 1).mean(1)
    topics, used = list[PlantedLatent](), set[str]()
    for row in np.argsort(-strength, kind="stable").tolist():
        names = [words.names[word] for word in candidates[members[row]].tolist()]
        concept = Concept(frozenset(names))
        if len(topics) == settings.topics or used & {*names} or words.n_documents_of(concept) < settings.fewest_documents:
            continue
        topics.append(PlantedLatent("topic", topic_explanation(names), concept))
        used |= {*names}
    return topics


def _words_and_mixtures(
    words: Words, taken: Sequence[Concept], settings: PlantSettings, generator: np.random.Generator
) -> tuple[list[PlantedLatent], list[PlantedLatent]]:
    """Latents of single words, from frequent to rare, and mixtures of two unrelated words of similar frequency."""
    candidates = words.candidates(taken, LETTERS, settings.fewest_documents, MOST_DOCUMENTS * words.n_texts)
    parts = [part for part in np.array_split(candidates, settings.words) if len(part)] if settings.words else []
    chosen = [int(generator.choice(part)) for part in parts]
    single = [PlantedLatent("word", word_explanation(words.names[word]), Concept(frozenset({words.names[word]}))) for word in chosen]
    rest = np.setdiff1d(candidates, chosen)
    phi, count = words.phi(rest), np.bincount(words.word, minlength=len(words.names))[rest]
    mixtures, is_free = list[PlantedLatent](), np.ones(len(rest), dtype=bool)
    for named in generator.permutation(len(rest)).tolist():
        is_partner = is_free & (count <= count[named]) & (2 * count >= count[named])
        is_partner[named] = False
        if len(mixtures) == settings.mixtures or not is_free[named] or not is_partner.any():
            continue
        unnamed = int(np.argmin(np.where(is_partner, np.abs(phi[named]), np.inf)))
        is_free[[named, unnamed]] = False
        name, other = (words.names[int(rest[index])] for index in (named, unnamed))
        mixtures.append(PlantedLatent("mixture", word_explanation(name), Concept(frozenset({name, other})), other))
    return single, mixtures


def _firings(words: Words, latent: PlantedLatent, generator: np.random.Generator) -> Firings:
    """Positions and activations of a latent's firings."""
    positions = words.positions(latent.concept)
    activations = generator.uniform(0.5, 1.0, len(positions))
    if latent.unnamed:
        is_unnamed = np.isin(positions, words.positions(Concept(frozenset({latent.unnamed}))))
        activations = np.where(is_unnamed, 0.5 + activations / 2, 0.25 + activations / 2)
    return positions, activations.astype(np.float32)
