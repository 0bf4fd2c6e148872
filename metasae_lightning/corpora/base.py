"""The base class of text sources, and the split of documents into train, validation and test."""

import hashlib
import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any, Literal

from metasae_lightning.corpora.documents import CountingReader, Document, Reader
from metasae_lightning.corpora.prefetch import Producer, heartbeat
from metasae_lightning.errors import InputError

Split = Literal["train", "validation", "test"]


def split_of(document: Document, held_out: float) -> Split:
    """The split of a document, chosen by a hash of its content.

    A fraction `held_out` of all documents is in validation and an equal fraction in test. Equal documents are in the same split,
    on every rank and in every run.

    >>> split_of("some text", 0.0), split_of("some text", 0.5) in ("validation", "test")
    ('train', True)
    """
    content = document if isinstance(document, str) else " ".join(map(str, document))
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    fraction = int.from_bytes(digest, "big") / 2**64
    return "validation" if fraction < held_out else "test" if fraction < 2 * held_out else "train"


class Corpus(ABC):
    """A source of documents. Their order is a function of a seed and of the epoch."""

    @abstractmethod
    def documents(self, *, seed: int = 0, epoch: int = 0) -> Iterator[Document]:
        """All documents of one epoch, each exactly once."""

    def reader(self, *, seed: int = 0, epoch: int = 0, state: dict[str, Any] | None = None) -> Reader:
        """An iterator over `documents(seed=seed, epoch=epoch)` in the same order, whose position can be saved.

        Without `state` the reader begins with the first document. With `state`, from an earlier reader's `state()`, it continues from
        there. `Corpus` itself reads the earlier documents again and drops them; a subclass may go directly to the position.
        """
        already_read = state["documents"] if state else 0
        documents = self.documents(seed=seed, epoch=epoch)
        for _ in itertools.islice(documents, already_read):
            heartbeat()
        return CountingReader(documents, already_read=already_read)

    @abstractmethod
    def description(self) -> str:
        """The corpus in a few words, for messages and for the metadata of a published SAE."""

    def settings(self) -> dict[str, Any]:
        """Further settings that decide which documents the corpus has.

        A checkpoint or an activation cache fits a corpus of the same `description()` and the same `settings()`.
        """
        return {}


def check_held_out(corpus: Corpus, held_out: float, *, seed: int, ranks: int, stall_seconds: float) -> None:
    """Raise an error before training if the corpus has fewer validation documents than ranks.

    Documents are read in the order of `seed` until there are enough. After `stall_seconds` seconds without a document, an error is raised.
    """
    missing = ranks
    with closing(Producer(corpus.documents(seed=seed), name=f"corpus {corpus.description()}", stall_seconds=stall_seconds)) as documents:
        for document in documents:
            missing -= split_of(document, held_out) == "validation"
            if not missing:
                return
    raise InputError(
        f"held_out: a fraction of {held_out} of the documents of {corpus.description()} is too small to validate on: "
        "raise it, or set it to 0 to train without validation"
    )


def shuffle_in_window(documents: Iterable[Document], size: int, order: random.Random) -> Iterator[Document]:
    """Shuffle a stream of documents: each yielded document is drawn at random from the at most `size` + 1 documents in memory."""
    window: list[Document] = []
    for document in documents:
        window.append(document)
        if len(window) > size:
            index = order.randrange(len(window))
            window[index], window[-1] = window[-1], window[index]
            yield window.pop()
    order.shuffle(window)
    yield from window
