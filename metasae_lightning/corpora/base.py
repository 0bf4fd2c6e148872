"""The base class of text sources, and the split of documents into train, validation and test."""

import hashlib
import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any, Literal

from metasae_lightning.corpora.documents import Counted, Document, Reader
from metasae_lightning.corpora.prefetch import Producer, alive
from metasae_lightning.errors import InputError

Split = Literal["train", "validation", "test"]


def split_of(document: Document, held_out: float) -> Split:
    """The split a document belongs to, by a hash of its content: a share `held_out` is validation, as much again is test.

    Equal documents share a split, on every rank and in every run.

    >>> split_of("some text", 0.0), split_of("some text", 0.5) in ("validation", "test")
    ('train', True)
    """
    content = document if isinstance(document, str) else " ".join(map(str, document))
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    return "validation" if place < held_out else "test" if place < 2 * held_out else "train"


class Corpus(ABC):
    """Documents in an order that is a function of seed and epoch."""

    @abstractmethod
    def documents(self, *, seed: int = 0, epoch: int = 0) -> Iterator[Document]:
        """Every document once."""

    def reader(self, *, seed: int = 0, epoch: int = 0, state: dict[str, Any] | None = None) -> Reader:
        """The same documents in the same order, from the start or from where a reader's `state()` was taken."""
        given, documents = state["documents"] if state else 0, self.documents(seed=seed, epoch=epoch)
        for _ in itertools.islice(documents, given):
            alive()
        return Counted(documents, given=given)

    @abstractmethod
    def description(self) -> str:
        """What a published SAE tells of the text it was trained on."""

    def settings(self) -> dict[str, Any]:
        """What else decides which documents there are: with the identity, that by which a checkpoint or a cache knows the text again."""
        return {}


def check_held_out(corpus: Corpus, held_out: float, *, seed: int, ranks: int, stall_seconds: float) -> None:
    """Every rank needs a document to validate on: better to know it before training than after."""
    missing = ranks
    with closing(Producer(corpus.documents(seed=seed), name=f"corpus {corpus.description()}", stall_seconds=stall_seconds)) as documents:
        for document in documents:
            missing -= split_of(document, held_out) == "validation"
            if not missing:
                return
    raise InputError(
        f"held_out: of the documents of {corpus.description()} a share of {held_out} is too little to validate on: "
        "raise it, or set it to 0 to validate on nothing"
    )


def through_window(documents: Iterable[Document], size: int, order: random.Random) -> Iterator[Document]:
    """Documents shuffled among the next `size`, which are all that is held in memory."""
    window: list[Document] = []
    for document in documents:
        window.append(document)
        if len(window) > size:
            at = order.randrange(len(window))
            window[at], window[-1] = window[-1], window[at]
            yield window.pop()
    order.shuffle(window)
    yield from window
