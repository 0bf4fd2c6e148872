"""Documents, readers that can be saved and resumed, and checks on the column that holds documents."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

from metasae_lightning.errors import InputError, did_you_mean

Document = str | list[int]
"""A text, or a list of token ids."""


class Reader(Iterator[Document]):
    """An iterator over the documents of one epoch. Its position can be saved, and `Corpus.reader` continues from it."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """The position of the next document, in plain values. The entry `documents` is the number of documents read so far."""


class CountingReader(Reader):
    """A reader whose position is the number of documents read so far.

    >>> reader = CountingReader(iter(["c", "d"]), already_read=2)
    >>> next(reader), reader.state()
    ('c', {'documents': 3})
    """

    def __init__(self, documents: Iterator[Document], *, already_read: int = 0):
        self._documents = documents
        self._n_read = already_read

    def __next__(self) -> Document:
        """Read one document and count it."""
        document = next(self._documents)
        self._n_read += 1
        return document

    def state(self) -> dict[str, Any]:
        """The number of documents read so far."""
        return {"documents": self._n_read}


def order_seed(*numbers: int) -> int:
    """One seed for a shuffle, from a hash of several numbers such as the run's seed and the epoch.

    A sum would not do: seed 0 in epoch 1 and seed 1 in epoch 0 must have different orders.

    >>> order_seed(0, 1) != order_seed(1, 0)
    True
    """
    return int.from_bytes(hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=4).digest(), "big")


def check_column(column: str, existing: Iterable[str], where: str) -> None:
    """Raise an error if `column` is not among the `existing` ones. The message lists these, those with a similar name first."""
    names = list(existing)
    if column not in names:
        similar_first = sorted(names, key=lambda name: did_you_mean(column, [name]) == "")
        raise InputError(f"column: {where} has no {column!r}, it has {', '.join(similar_first)}")


def document_from_row(row: Any, column: str, where: str) -> Document:
    """The document in one column of a row, or an error if there is none. `where` names the row's source in error messages."""
    check_column(column, row, where)
    return check_document(row[column], column, where)


def check_document(value: Any, column: str, where: str) -> Document:
    """Return the value if it is a text or a list of token ids, else raise an error."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(token, int) for token in value):
        return value
    raise InputError(f"column: {column!r} of {where} must be text or a list of token ids, it is {type(value).__name__}")
