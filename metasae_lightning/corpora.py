"""Where text comes from: the hub, local files, saved datasets, the documentation of the installed packages."""

import ast
import glob
import gzip
import hashlib
import itertools
import json
import random
import sys
import sysconfig
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from metasae_lightning.errors import InputError, did_you_mean

Document = str | list[int]
"""A text, or the tokens of one."""
Split = Literal["train", "validation", "test"]
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")


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

    @abstractmethod
    def identity(self) -> str:
        """What a published SAE tells of the text it was trained on."""


class HubText(Corpus):
    """A column of a hub dataset: streamed as it comes through a shuffle window, or downloaded and shuffled whole."""

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
    ):
        self.path = path
        self.name = name
        self.split = split
        self.column = column
        self.revision = revision
        self.streaming = streaming
        self.shuffle_window = shuffle_window

    def documents(self, *, seed: int = 0, epoch: int = 0) -> Iterator[Document]:
        import datasets

        # A hub that is away raises whatever its client, its HTTP library or its file reader raises.
        try:
            data: Any = datasets.load_dataset(self.path, self.name, split=self.split, revision=self.revision, streaming=self.streaming)
        except Exception as error:
            raise InputError(f"path: the dataset {self.path!r} cannot be read: {_line(error)}") from error
        if data.column_names is not None:
            _column(self.column, data.column_names, self.path)
        order = _mix(seed, epoch)
        shuffled = data.shuffle(seed=order, buffer_size=self.shuffle_window) if self.streaming else data.shuffle(seed=order)
        yield from _rows(shuffled, self.column, self.path)

    def identity(self) -> str:
        return "/".join(filter(None, [self.path, self.name]))


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
            raise InputError(f"path: {self.path!r} is not a folder that save_to_disk wrote: {_line(error)}") from error
        if isinstance(data, datasets.DatasetDict):
            if self.split not in data:
                raise InputError(f"split: {self.path!r} has no {self.split!r}, it has {', '.join(map(str, data))}")
            data = data[self.split]
        _column(self.column, data.column_names, self.path)
        # A saved format would hand out tensors where the file holds lists.
        data = data.with_format(None)
        yield from _rows(data.shuffle(seed=_mix(seed, epoch), keep_in_memory=True), self.column, self.path)

    def identity(self) -> str:
        return self.path


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
        files = sorted({file for path in self.paths for file in _expand(path)})
        order = random.Random(_mix(seed, epoch))
        order.shuffle(files)
        yield from _through_window(itertools.chain.from_iterable(map(self._documents_of, files)), self.shuffle_window, order)

    def _documents_of(self, file: Path) -> Iterator[Document]:
        try:
            yield from self._read(file)
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise InputError(f"paths: {str(file)!r} cannot be read: {_line(error)}") from error

    def _read(self, file: Path) -> Iterator[Document]:
        kind = file.name.removesuffix(".gz").rsplit(".", 1)[-1]
        if kind == "parquet":
            yield from _parquet(file, self.column)
            return
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            yield from _json_lines(lines, file, self.column) if kind == "jsonl" else _paragraphs(lines)

    def identity(self) -> str:
        return ", ".join(self.paths)


class PythonDocs(Corpus):
    """The docstrings of the installed packages, parsed and never imported, in a shuffled order of files."""

    def __init__(self, min_characters: int = 200):
        self.min_characters = min_characters

    def documents(self, *, seed: int = 0, epoch: int = 0) -> Iterator[Document]:
        files = _installed_sources()
        if not files:
            raise InputError(f"corpus: no package is installed in {sysconfig.get_path('purelib')!r}")
        random.Random(_mix(seed, epoch)).shuffle(files)
        for file in files:
            yield from (text for text in _docstrings(file) if len(text) >= self.min_characters)

    def identity(self) -> str:
        return f"docstrings of Python {sys.version_info.major}.{sys.version_info.minor}'s installed packages"


def _mix(seed: int, epoch: int) -> int:
    """One seed for an epoch's order; neighbouring runs do not share neighbouring epochs."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=4).digest(), "big")


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_bytes())
    # Packages ship templates and tests that are no Python, and some nest deeper than the parser goes.
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _expand(path: str) -> Iterator[Path]:
    place = Path(path).expanduser()
    if place.is_file():
        if not place.name.endswith(SUFFIXES):
            raise InputError(f"paths: {path!r} is none of {', '.join(SUFFIXES)}")
        yield place
        return
    inside = place.rglob("*") if place.is_dir() else map(Path, glob.glob(str(place), recursive=True))
    files = [file for file in inside if file.is_file() and file.name.endswith(SUFFIXES)]
    if not files:
        siblings = [str(p) for p in place.parent.glob("*") if p != place] if place.parent.is_dir() else []
        state = f"holds no {', '.join(SUFFIXES)} file" if place.is_dir() else "does not exist"
        raise InputError(f"paths: {path!r} {state}{did_you_mean(str(place), siblings)}")
    yield from files


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Runs of lines between blank ones.

    >>> list(_paragraphs(["a\\n", "b\\n", "  \\n", "\\n", "c"]))
    ['a\\nb', 'c']
    """
    gathered: list[str] = []
    for line in lines:
        if line.strip():
            gathered.append(line)
        elif gathered:
            yield "".join(gathered).strip()
            gathered = []
    if gathered:
        yield "".join(gathered).strip()


def _json_lines(lines: Iterable[str], file: Path, column: str) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"paths: {str(file)!r} line {number} is not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict):
            raise InputError(f"paths: {str(file)!r} line {number} must be an object with {column!r}, it is {type(row).__name__}")
        _column(column, row, f"{file} line {number}")
        yield _document(row[column], column, f"{file} line {number}")


def _parquet(file: Path, column: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table: Any = pyarrow.parquet.ParquetFile(file)
        _column(column, table.schema_arrow.names, str(file))
        for batch in table.iter_batches(columns=[column]):
            yield from (_document(value, column, str(file)) for value in batch.column(0).to_pylist())
    except pyarrow.ArrowException as error:
        raise InputError(f"paths: {str(file)!r} is not a parquet file: {_line(error)}") from error


def _rows(rows: Iterable[Any], column: str, path: str) -> Iterator[Document]:
    for row in rows:
        _column(column, row, path)
        yield _document(row[column], column, path)


def _column(column: str, existing: Iterable[str], where: str) -> None:
    names = list(existing)
    if column not in names:
        near = sorted(names, key=lambda name: did_you_mean(column, [name]) == "")
        raise InputError(f"column: {where} has no {column!r}, it has {', '.join(near)}")


def _document(value: Any, column: str, where: str) -> Document:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(token, int) for token in value):
        return value
    raise InputError(f"column: {column!r} of {where} must be text or a list of token ids, it is {type(value).__name__}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
