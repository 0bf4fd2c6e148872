"""Local files of text: which there are, and the documents in each."""

import glob
import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from metasae_lightning.corpora.documents import Document, check_column, checked, document_in, one_line
from metasae_lightning.errors import InputError, did_you_mean

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")


def expand(path: str) -> Iterator[Path]:
    """The files of text that a file, a folder or a glob stands for."""
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


def documents_of(file: Path, column: str) -> Iterator[Document]:
    """The documents of one file, by its suffix."""
    try:
        yield from _read(file, column)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"paths: {str(file)!r} cannot be read: {one_line(error)}") from error


def _read(file: Path, column: str) -> Iterator[Document]:
    kind = file.name.removesuffix(".gz").rsplit(".", 1)[-1]
    if kind == "parquet":
        yield from _parquet(file, column)
        return
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        yield from _json_lines(lines, file, column) if kind == "jsonl" else paragraphs(lines)


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Runs of lines between blank ones.

    >>> list(paragraphs(["a\\n", "b\\n", "  \\n", "\\n", "c"]))
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
        yield document_in(row, column, f"{file} line {number}")


def _parquet(file: Path, column: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table: Any = pyarrow.parquet.ParquetFile(file)
        check_column(column, table.schema_arrow.names, str(file))
        for batch in table.iter_batches(columns=[column]):
            yield from (checked(value, column, str(file)) for value in batch.column(0).to_pylist())
    except pyarrow.ArrowException as error:
        raise InputError(f"paths: {str(file)!r} is not a parquet file: {one_line(error)}") from error
