"""Documents, and readers that can be left at one and gone on with at the next."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

from metasae_lightning.errors import InputError, did_you_mean

Document = str | list[int]
"""A text, or the tokens of one."""


class Reader(Iterator[Document]):
    """The documents of one epoch, with a place to go on from."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Where the next document is, for `Corpus.reader`: plain values only, `documents` of them says how many were given."""


class Counted(Reader):
    """Documents whose place is their number.

    >>> reader = Counted(iter(["c", "d"]), given=2)
    >>> next(reader), reader.state()
    ('c', {'documents': 3})
    """

    def __init__(self, documents: Iterator[Document], *, given: int = 0):
        self._documents = documents
        self._given = given

    def __next__(self) -> Document:
        document = next(self._documents)
        self._given += 1
        return document

    def state(self) -> dict[str, Any]:
        return {"documents": self._given}


def mix(*numbers: int) -> int:
    """One seed for an order; neighbouring runs do not share neighbouring epochs.

    >>> mix(0, 1) != mix(1, 0)
    True
    """
    return int.from_bytes(hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=4).digest(), "big")


def check_column(column: str, existing: Iterable[str], where: str) -> None:
    """Refuse a column that is not there, naming those that are, the nearest first."""
    names = list(existing)
    if column not in names:
        near = sorted(names, key=lambda name: did_you_mean(column, [name]) == "")
        raise InputError(f"column: {where} has no {column!r}, it has {', '.join(near)}")


def document_in(row: Any, column: str, where: str) -> Document:
    """The document in a row."""
    check_column(column, row, where)
    return checked(row[column], column, where)


def checked(value: Any, column: str, where: str) -> Document:
    """What is a document, or an error."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(token, int) for token in value):
        return value
    raise InputError(f"column: {column!r} of {where} must be text or a list of token ids, it is {type(value).__name__}")


def one_line(error: BaseException) -> str:
    """An error as part of another's line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
