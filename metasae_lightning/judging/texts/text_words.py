"""The words of a text: their positions, their documents, and the phi of pairs of words over documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from metasae_lightning.judging.texts.concepts import Concept, words_of_tokens
from metasae_lightning.judging.texts.flat_text import FlatText


@dataclass(frozen=True)
class Words:
    """All words of a text, and the documents that they are in."""

    names: list[str]
    """The different words, in lower case, sorted."""
    word: Int[np.ndarray, " occurrence"]
    """Index of the word of each occurrence."""
    first: Int[np.ndarray, " occurrence"]
    """Position of its first token."""
    last: Int[np.ndarray, " occurrence"]
    """Position of its last token."""
    documents: Any
    """Sparse matrix [group, word]: 1 if the documents of a group (see `FlatText.group`) have the word."""

    @classmethod
    def of(cls, text: FlatText) -> "Words":
        """The words of a text. A word ends where its segment ends."""
        ids, places = np.unique(text.tokens, return_inverse=True)
        # A token alone has the same letters as in the text: only characters that span several tokens differ, and those are not A to Z.
        texts = [text.spelling.token_texts([token])[0] for token in ids.tolist()]
        found = [
            (word, begin + first, begin + last)
            for begin, end in text.segments()
            for word, first, last in words_of_tokens([texts[index] for index in places[begin:end].tolist()])
        ]
        names, word = np.unique(np.array([name for name, _, _ in found], dtype=object).astype(str), return_inverse=True)
        first, last = (np.array([occurrence[side] for occurrence in found], dtype=np.int64) for side in (1, 2))
        pairs = np.unique(np.stack([text.group[first], word], 1), axis=0)
        shape = (len(text.hashes), len(names))
        documents = sparse.csc_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=shape)
        return cls(names.tolist(), word, first, last, documents)

    @property
    def n_texts(self) -> int:
        """Number of documents of different text."""
        return self.documents.shape[0]

    def n_documents(self) -> Int[np.ndarray, " word"]:
        """Number of documents that have each word."""
        return np.diff(self.documents.indptr)

    def candidates(self, taken: Sequence[Concept], letters: int, fewest: float, most: float) -> Int[np.ndarray, " word"]:
        """Words of at least `letters` letters in `fewest` to `most` documents, most frequent first, without those of `taken` concepts."""
        n_documents = self.n_documents()
        by_frequency = np.argsort(-n_documents, kind="stable")
        inside = by_frequency[(n_documents[by_frequency] >= fewest) & (n_documents[by_frequency] <= most)]
        free = [len(self.names[w]) >= letters and not any(concept.holds_for(self.names[w]) for concept in taken) for w in inside.tolist()]
        return inside[np.array(free, dtype=bool)]

    def n_documents_of(self, concept: Concept) -> int:
        """Number of documents in which a concept holds."""
        chosen = [index for index, name in enumerate(self.names) if concept.holds_for(name)]
        return int((np.asarray(self.documents[:, chosen].sum(1)) > 0).sum())

    def positions(self, concept: Concept) -> Int[np.ndarray, " firing"]:
        """The positions of the tokens on which a concept holds, sorted."""
        chosen = np.array([concept.holds_for(name) for name in self.names], dtype=bool)[self.word]
        last = self.last[chosen]
        first = last if concept.suffix else self.first[chosen]
        lengths = last - first + 1
        starts = np.repeat(first - np.cumsum(lengths) + lengths, lengths)
        return np.unique(starts + np.arange(len(starts)))

    def phi(self, words: Int[np.ndarray, " word"]) -> Float[np.ndarray, "word word"]:
        """Phi of each two of some words: the correlation, over documents, of having the one and having the other."""
        part, n = self.documents[:, words], self.n_texts
        share = np.asarray(part.mean(0)).ravel()
        deviation = np.sqrt(share * (1 - share)).clip(1e-12)
        return ((part.T @ part).toarray() / n - np.outer(share, share)) / np.outer(deviation, deviation)
