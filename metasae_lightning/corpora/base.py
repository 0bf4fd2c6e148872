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
    """Raise an error before training if the corpus has fewer training documents, or fewer validation documents, than ranks.

    Documents are read in the order of `seed` until there are enough; those without text do not count. The error says what the text lacks.
    After `stall_seconds` seconds without a document, an error is raised. With `held_out` 0, only training documents are needed.
    """
    missing: dict[Split, int] = {"train": ranks, "validation": ranks if held_out else 0, "test": 0}
    n_documents, different = 0, set[int]()
    with closing(Producer(corpus.documents(seed=seed), name=f"corpus {corpus.description()}", stall_seconds=stall_seconds)) as documents:
        for document in documents:
            if not (document.strip() if isinstance(document, str) else document):
                continue
            n_documents += 1
            different.add(hash(document if isinstance(document, str) else tuple(document)))
            missing[split_of(document, held_out)] -= 1
            if max(missing.values()) <= 0:
                return
    name = corpus.description()
    if not n_documents:
        raise InputError(f"corpus: there is no text in {name}")
    if len(different) == 1:
        problem = "is one document" if n_documents == 1 else f"is {n_documents:,} equal documents"
        raise InputError(
            f"corpus: all text of {name} {problem}, and documents are held out whole, equal ones together: "
            "divide it into different documents (in a .txt file by blank lines)"
        )
    if missing["train"] > 0:
        raise InputError(f"corpus: {name} has {len(different):,} different documents: too few to train on with held_out: {held_out}")
    raise InputError(
        f"held_out: a fraction of {held_out} of the documents of {name} is too small to validate on: "
        f"of {len(different):,} different documents {'none is' if missing['validation'] == ranks else 'too few are'} held out; "
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
