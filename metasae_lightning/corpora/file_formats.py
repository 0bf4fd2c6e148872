"""Local text files: the files that a path stands for, and the documents in each file."""

import glob
import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from metasae_lightning.corpora.documents import Document, check_column, check_document, document_from_row
from metasae_lightning.errors import InputError, did_you_mean, one_line

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")


def expand_path(pattern: str) -> Iterator[Path]:
    """The text files that a path stands for: the file itself, those in a folder and its subfolders, or those that match a glob pattern.

    A text file's name ends in one of `SUFFIXES`. An error is raised if there is no text file.
    """
    path = Path(pattern).expanduser()
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise InputError(f"paths: {pattern!r} is none of {', '.join(SUFFIXES)}")
        yield path
        return
    candidates = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    files = [file for file in candidates if file.is_file() and file.name.endswith(SUFFIXES)]
    if not files:
        siblings = [str(p) for p in path.parent.glob("*") if p != path] if path.parent.is_dir() else []
        problem = f"holds no {', '.join(SUFFIXES)} file" if path.is_dir() else "does not exist"
        raise InputError(f"paths: {pattern!r} {problem}{did_you_mean(str(path), siblings)}")
    yield from files


def read_documents(file: Path, column: str) -> Iterator[Document]:
    """The documents of one file, read in the format that its suffix names."""
    try:
        yield from _read_by_suffix(file, column)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"paths: {str(file)!r} cannot be read: {one_line(error)}") from error


def _read_by_suffix(file: Path, column: str) -> Iterator[Document]:
    suffix = file.name.removesuffix(".gz").rsplit(".", 1)[-1]
    if suffix == "parquet":
        yield from _read_parquet(file, column)
        return
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        yield from _read_json_lines(lines, file, column) if suffix == "jsonl" else paragraphs(lines)


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """The paragraphs of a text: lines joined until a blank line.

    >>> list(paragraphs(["a\\n", "b\\n", "  \\n", "\\n", "c"]))
    ['a\\nb', 'c']
    """
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).strip()
            paragraph = []
    if paragraph:
        yield "".join(paragraph).strip()


def _read_json_lines(lines: Iterable[str], file: Path, column: str) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"paths: {str(file)!r} line {number} is not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict):
            raise InputError(f"paths: {str(file)!r} line {number} must be an object with {column!r}, it is {type(row).__name__}")
        yield document_from_row(row, column, f"{file} line {number}")


def _read_parquet(file: Path, column: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table: Any = pyarrow.parquet.ParquetFile(file)
        check_column(column, table.schema_arrow.names, str(file))
        for batch in table.iter_batches(columns=[column]):
            yield from (check_document(value, column, str(file)) for value in batch.column(0).to_pylist())
    except pyarrow.ArrowException as error:
        raise InputError(f"paths: {str(file)!r} is not a parquet file: {one_line(error)}") from error
