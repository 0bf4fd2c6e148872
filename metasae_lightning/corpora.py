"""Where text comes from: the hub, local files, saved datasets, the documentation of the installed packages."""

import ast
import hashlib
import itertools
import random
import sys
import sysconfig
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal

from metasae_lightning.documents import Counted, Document, Reader, check_column, document_in, mix, one_line
from metasae_lightning.errors import InputError
from metasae_lightning.files import documents_of, expand
from metasae_lightning.hub import HubDataset, Windows
from metasae_lightning.producer import Producer, alive

Split = Literal["train", "validation", "test"]
# How a docstring of some length is quoted, and where statements hold statements.
TRIPLE = (b'"""', b"'''")
BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")


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
    def identity(self) -> str:
        """What a published SAE tells of the text it was trained on."""

    def settings(self) -> dict[str, Any]:
        """What else decides which documents there are: with the identity, that by which a checkpoint or a cache knows the text again."""
        return {}


def check_held_out(corpus: Corpus, held_out: float, *, seed: int, ranks: int, stall_seconds: float) -> None:
    """Every rank needs a document to validate on: better to know it before training than after."""
    missing = ranks
    with closing(Producer(corpus.documents(seed=seed), name=f"corpus {corpus.identity()}", stall_seconds=stall_seconds)) as documents:
        for document in documents:
            missing -= split_of(document, held_out) == "validation"
            if not missing:
                return
    raise InputError(
        f"held_out: of the documents of {corpus.identity()} a share of {held_out} is too little to validate on: "
        "raise it, or set it to 0 to validate on nothing"
    )


class HubText(Corpus):
    """A column of a hub dataset: streamed as it comes through shuffled windows, or downloaded and shuffled whole.

    Streaming goes on inside a shard by reading that shard again up to there, which a name of the dataset that moves to other files
    would spoil: `revision` pins it.

    Args:
        path: The dataset's name on the hub.
        name: Which of its configurations.
        split: Which of its splits; validation and test documents are held out of that one.
        column: Where the text is, or the token ids.
        revision: A branch, tag or commit.
        streaming: Whether to read over the network while training, or to download first.
        shuffle_window: How many streamed documents are shuffled among each other, and held in memory.
        retries: How often in a row to try again after a connection that broke.
        retry_seconds: How long to wait before the first retry; each waits twice as long as the one before.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        split: str = "train",
        column: str = "text",
        revision: str | None = None,
        streaming: bool = True,
        shuffle_window: int = 10_000,
        retries: int = 3,
        retry_seconds: float = 5.0,
    ):
        for argument, value, least in (("shuffle_window", shuffle_window, 1), ("retries", retries, 0), ("retry_seconds", retry_seconds, 0)):
            if value < least:
                raise InputError(f"{argument} must be at least {least}, got {value}")
        self.dataset = HubDataset(path, name, split, column, revision, streaming, retries, retry_seconds)
        self.shuffle_window = shuffle_window

    def documents(self, *, seed: int = 0, epoch: int = 0) -> Iterator[Document]:
        return self.reader(seed=seed, epoch=epoch)

    def reader(self, *, seed: int = 0, epoch: int = 0, state: dict[str, Any] | None = None) -> Reader:
        rows = partial(self.dataset.rows, mix(seed, epoch))
        if self.dataset.streaming:
            return Windows(rows, size=self.shuffle_window, order=(seed, epoch), state=state)
        given = state["documents"] if state else 0
        return Counted((text for text, _ in rows({"row": given}, given=given)), given=given)

    def identity(self) -> str:
        return "/".join(filter(None, [self.dataset.path, self.dataset.name]))

    def settings(self) -> dict[str, Any]:
        return {"split of it": self.dataset.split, "column": self.dataset.column, "revision": self.dataset.revision}


class SavedDataset(Corpus):
    """A folder that `datasets`' `save_to_disk` wrote, shuffled whole."""

    def __init__(self, path: str, column: str = "text", *, split: str = "train"):
        self.path = path
        self.column = column
        self.split = split

    def documents(self, *, seed: int = 0, epoch: int = 0) -> Iterator[Document]:
        import datasets

        try:
            data: Any = datasets.load_from_disk(self.path)
        except (OSError, ValueError) as error:
            raise InputError(f"path: {self.path!r} is not a folder that save_to_disk wrote: {one_line(error)}") from error
        if isinstance(data, datasets.DatasetDict):
            if self.split not in data:
                raise InputError(f"split: {self.path!r} has no {self.split!r}, it has {', '.join(map(str, data))}")
            data = data[self.split]
        check_column(self.column, data.column_names, self.path)
        # A saved format would hand out tensors where the file holds lists.
        data = data.with_format(None)
        for row in data.shuffle(seed=mix(seed, epoch), keep_in_memory=True):
            yield document_in(row, self.column, self.path)

    def identity(self) -> str:
        return self.path

    def settings(self) -> dict[str, Any]:
        return {"split of it": self.split, "column": self.column}


class TextFiles(Corpus):
    """Local files, folders and globs of them: files in a shuffled order, their documents through a shuffle window.

    A `.txt` file is one document a paragraph (a run of lines between blank ones): books and dumps are single files, and a
    held-out split by document is only as fine as its documents. `.jsonl` and `.parquet` give a document a row, from `column`.
    `.gz` is read too.
    """

    def __init__(self, paths: str | list[str], *, column: str = "text", shuffle_window: int = 1000):
        self.paths = [paths] if isinstance(paths, str) else paths
        self.column = column
        self.shuffle_window = shuffle_window

    def documents(self, *, seed: int = 0, epoch: int = 0) -> Iterator[Document]:
        files = sorted({file for path in self.paths for file in expand(path)})
        order = random.Random(mix(seed, epoch))
        order.shuffle(files)
        yield from _through_window(
            itertools.chain.from_iterable(documents_of(file, self.column) for file in files), self.shuffle_window, order
        )

    def identity(self) -> str:
        return ", ".join(self.paths)

    def settings(self) -> dict[str, Any]:
        return {"column": self.column, "shuffle_window": self.shuffle_window}


class InMemory(Corpus):
    """Texts, or lists of token ids, that are there already: in a notebook, or from a source that nothing here reads."""

    def __init__(self, documents: list[Document], name: str = "documents in memory"):
        self.given, self.name = documents, name

    def documents(self, *, seed: int = 0, epoch: int = 0) -> Iterator[Document]:
        order = list(self.given)
        random.Random(mix(seed, epoch)).shuffle(order)
        return iter(order)

    def identity(self) -> str:
        return self.name


class PythonDocs(Corpus):
    """The docstrings of the installed packages, parsed and never imported, in a shuffled order of files."""

    def __init__(self, min_characters: int = 200):
        self.min_characters = min_characters

    def documents(self, *, seed: int = 0, epoch: int = 0) -> Iterator[Document]:
        files = _installed_sources()
        if not files:
            raise InputError(f"corpus: no package is installed in {sysconfig.get_path('purelib')!r}")
        random.Random(mix(seed, epoch)).shuffle(files)
        for file in files:
            yield from (text for text in _docstrings(file) if len(text) >= self.min_characters)

    def identity(self) -> str:
        return f"docstrings of Python {sys.version_info.major}.{sys.version_info.minor}'s installed packages"

    def settings(self) -> dict[str, Any]:
        return {"min_characters": self.min_characters}


def _through_window(documents: Iterable[Document], size: int, order: random.Random) -> Iterator[Document]:
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


def _installed_sources() -> list[Path]:
    roots = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    # By the path inside the environment, so that two equal environments at different places give one order.
    return [file for _, file in sorted((str(file.relative_to(root)), file) for root in roots for file in root.rglob("*.py"))]


def _docstrings(file: Path) -> Iterator[str]:
    try:
        source = file.read_bytes()
        if not any(quotes in source for quotes in TRIPLE):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    # Packages ship templates and tests that are no Python, and some nest deeper than the parser goes.
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return
    # What can hold a docstring is a statement among statements: `ast.walk` would go through every expression too.
    nodes = deque[ast.AST]([tree])
    while nodes:
        node = nodes.popleft()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
        for block in BLOCKS:
            nodes.extend(getattr(node, block, None) or ())
