"""Collected text as flat arrays of tokens, with documents grouped by their text, and windows that do not cut words."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int

from metasae_lightning.evaluation.result_cache import Entry
from metasae_lightning.evaluation.top_contexts import Spelling
from metasae_lightning.step import Codes

Tokens = Int[np.ndarray, " token"]
Positions = Int[np.ndarray, " window"]


@runtime_checkable
class Collected(Protocol):
    """Codes of an SAE on text, passage by passage, such as `CollectedCodes`."""

    def codes(self) -> Iterator[tuple[Codes, Entry]]:
        """The codes of each passage, with an entry that holds `tokens`, `counted` and `owner` (document ids)."""
        ...


@dataclass(frozen=True)
class FlatText:
    """The text of all passages, token after token. A segment is the part of a document that lies in one context."""

    tokens: Tokens
    """Token ids."""
    counted: Bool[np.ndarray, " token"]
    """Whether the SAE was run on each token."""
    document: Tokens
    """Document id of each token."""
    group: Tokens
    """Number of the group of each token's document. Documents with the same text are one group."""
    hashes: tuple[bytes, ...]
    """Hash of the text of each group."""
    begins: Tokens
    """First position of each token's segment."""
    ends: Tokens
    """Position after the last of each token's segment."""
    continues_word: Bool[np.ndarray, " token"]
    """Whether each token continues a word: it begins with a letter, and the token before it in its segment ends with one."""
    spelling: Spelling
    """Texts of tokens."""

    @classmethod
    def of(cls, collected: Collected, tokenizer: Any) -> "FlatText":
        """The text that codes were collected on."""
        # An entry holds the codes too, which are much larger than the text.
        kept = ("tokens", "counted", "owner")
        return cls.of_entries([{name: entry[name] for name in kept} for _, entry in collected.codes()], tokenizer)

    @classmethod
    def of_entries(cls, entries: Sequence[Entry], tokenizer: Any) -> "FlatText":
        """The text of the entries of all passages."""
        tokens, counted, document = (
            np.concatenate([entry[name].flatten().numpy() for entry in entries]) for name in ("tokens", "counted", "owner")
        )
        widths = np.concatenate([np.full(entry["tokens"].numel(), entry["tokens"].shape[1]) for entry in entries])
        offsets = np.concatenate([np.arange(entry["tokens"].numel()) for entry in entries])
        is_first = offsets % widths == 0
        is_first[1:] |= document[1:] != document[:-1]
        firsts, segment = np.flatnonzero(is_first), np.cumsum(is_first) - 1
        spelling = Spelling(tokenizer)
        group, hashes = group_by_text(tokens, document, spelling.special)
        return cls(
            tokens=tokens.astype(np.int64),
            counted=counted.astype(bool),
            document=document.astype(np.int64),
            group=group,
            hashes=hashes,
            begins=firsts[segment],
            ends=np.append(firsts[1:], len(tokens))[segment],
            continues_word=_continues_word(tokens, is_first, spelling),
            spelling=spelling,
        )

    def is_explaining(self, seed: int) -> Bool[np.ndarray, " group"]:
        """Whether each group of documents is used for explanations, with probability 1/2; the other groups are used for scores."""
        digests = [hashlib.blake2b(text_hash, digest_size=1, key=str(seed).encode()).digest() for text_hash in self.hashes]
        return np.array([digest[0] % 2 == 1 for digest in digests], dtype=bool)

    def windows(self, positions: Positions, before: int, after: int) -> tuple[Positions, Positions]:
        """First position of the window around each position, and the position after its last.

        A window ends at the borders of its segment. A word that the window would cut is left out, unless the position is inside that word.
        """
        preceding, following = self._word_begins
        start = np.maximum(self.begins[positions], positions - before)
        start = np.where(following[start] <= positions, following[start], start)
        stop = np.minimum(self.ends[positions], positions + after + 1)
        # At the end of a segment the token after the window begins a word, because words do not continue over borders.
        whole = np.where(stop < len(preceding), preceding[stop.clip(max=len(preceding) - 1)], stop)
        return start, np.where(whole > positions, whole, stop)

    def shortened(self, start: int, stop: int, size: int, *, keep: int) -> int:
        """The first position of a window cut to about `size` tokens at its start: where a word begins, and not after `keep`."""
        cut = stop - size
        if cut <= start:
            return start
        preceding, following = self._word_begins
        begin = int(following[cut])
        return begin if begin <= keep else max(start, int(preceding[keep]))

    @cached_property
    def _word_begins(self) -> tuple[Tokens, Tokens]:
        """For each position, the last at or before it, and the first at or after it, whose token does not continue a word."""
        places, size = np.arange(len(self.tokens)), len(self.tokens)
        preceding = np.maximum.accumulate(np.where(self.continues_word, 0, places))
        return preceding, np.minimum.accumulate(np.where(self.continues_word, size, places)[::-1])[::-1]

    def window_texts(self, start: int, stop: int) -> tuple[str, ...]:
        """The texts of the tokens from `start` up to `stop`."""
        return tuple(self.spelling.token_texts(self.tokens[start:stop].tolist()))

    def segments(self) -> Iterator[tuple[int, int]]:
        """First position of each segment, and the position after its last."""
        firsts = np.flatnonzero(self.begins == np.arange(len(self.tokens)))
        yield from zip(firsts.tolist(), self.ends[firsts].tolist(), strict=True)


def group_by_text(tokens: Tokens, document: Tokens, special: frozenset[int]) -> tuple[Tokens, tuple[bytes, ...]]:
    """The group of each token's document, where documents with the same text are one group, and the hash of each group's text.

    Special tokens are not compared, because a document that is cut into two contexts may have some in its middle.

    >>> group_by_text(np.array([5, 6, 0, 5, 6]), np.array([0, 0, 1, 1, 1]), frozenset({0}))[0].tolist()
    [0, 0, 0, 0, 0]
    """
    order = np.argsort(document, kind="stable")
    ids, begins = np.unique(document[order], return_index=True)
    is_text = ~np.isin(tokens, list(special))
    groups: dict[bytes, int] = {}
    group_of_document = np.zeros(len(ids), dtype=np.int64)
    for index, places in enumerate(np.split(order, begins[1:])):
        text = tokens[places[is_text[places]]].astype(np.int64).tobytes()
        group_of_document[index] = groups.setdefault(hashlib.blake2b(text, digest_size=16).digest(), len(groups))
    return group_of_document[np.searchsorted(ids, document)], tuple(groups)


def is_letter(character: str) -> bool:
    """Whether a character is one of the letters of words: A to Z and a to z."""
    return character.isascii() and character.isalpha()


def _continues_word(tokens: Tokens, is_first: Bool[np.ndarray, " token"], spelling: Spelling) -> Bool[np.ndarray, " token"]:
    ids, places = np.unique(tokens, return_inverse=True)
    texts = [spelling.token_texts([token])[0] for token in ids.tolist()]
    begins, ends = (np.array([is_letter(text[index]) for text in (t or " " for t in texts)])[places] for index in (0, -1))
    continues = np.append(False, ends[:-1] & begins[1:])
    return continues & ~is_first


def document_counts(collected: Collected, text: FlatText, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each latent the share of tokens on which it fires, and the number of documents for explanations and for scores in which it fires.

    Documents with the same text count once.
    """
    parts, firings, begin, width = [np.zeros(0, np.int64)], list[torch.Tensor](), 0, 0
    n_groups = max(1, len(text.hashes))
    for codes, entry in collected.codes():
        width = codes.shape[1]
        firings.append(codes.firings())
        position = begin + entry["counted"].flatten().nonzero().flatten()[codes.rows].numpy()
        parts.append(np.unique(codes.latents.numpy() * n_groups + text.group[position]))
        begin += entry["tokens"].numel()
    seen, counts = np.unique(np.concatenate(parts)), sum(firings, start=torch.zeros(width, dtype=torch.long))
    latent, is_explaining = seen // n_groups, text.is_explaining(seed)[seen % n_groups]
    explaining, scoring = (torch.from_numpy(np.bincount(latent[part], minlength=width)) for part in (is_explaining, ~is_explaining))
    return counts.double() / max(1, int(text.counted.sum())), explaining, scoring
