"""Text sources: a dataset on the Hub, a dataset saved on disk, text files, and documents in memory."""

import itertools
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

from metasae_lightning.corpora.base import Corpus, shuffle_in_window
from metasae_lightning.corpora.documents import CountingReader, Document, Reader, check_column, document_from_row, order_seed
from metasae_lightning.corpora.file_formats import expand_path, read_documents
from metasae_lightning.corpora.hub_datasets import HubDataset, WindowReader
from metasae_lightning.errors import InputError, one_line


class HubText(Corpus):
    """A text column of a dataset on the Hugging Face Hub.

    A streamed dataset is read in a shuffled order of shards, and documents are shuffled in windows of `shuffle_window`. A downloaded
    dataset is shuffled as a whole. A resumed run reads the current window of a streamed dataset again, and drops the documents that the
    earlier run has read. In a downloaded dataset it continues at the next row. The documents are those of a run that never stopped only
    if the files on the Hub are still the same: set `revision` to be sure.

    Args:
        path: The dataset's name on the Hub.
        name: The dataset's configuration, if it has several.
        split: The dataset's split to read; validation and test documents are held out of this split.
        column: The column with the texts, or with lists of token ids.
        revision: A branch, tag or commit of the dataset.
        streaming: True reads over the network during training; false downloads the dataset first.
        shuffle_window: The number of streamed documents that are held in memory and shuffled together.
        retries: The number of retries in a row after a failed connection.
        retry_seconds: The wait before the first retry in seconds; each further retry waits twice as long.
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
        minima = (("shuffle_window", shuffle_window, 1), ("retries", retries, 0), ("retry_seconds", retry_seconds, 0))
        for argument, value, minimum in minima:
            if value < minimum:
                raise InputError(f"{argument} must be at least {minimum}, got {value}")
        self.dataset = HubDataset(path, name, split, column, revision, streaming, retries, retry_seconds)
        self.shuffle_window = shuffle_window

    def documents(self, *, seed: int = 0, epoch: int = 0) -> Iterator[Document]:
        """All documents of one epoch, in the order of `reader`."""
        return self.reader(seed=seed, epoch=epoch)

    def reader(self, *, seed: int = 0, epoch: int = 0, state: dict[str, Any] | None = None) -> Reader:
        """A reader that continues from `state`, or begins with the first document.

        In a streamed dataset, the reader reads the current shuffle window again and drops the documents that the earlier reader gave. In a
        downloaded dataset, it reads no document again.
        """
        rows = partial(self.dataset.rows, order_seed(seed, epoch))
        if self.dataset.streaming:
            return WindowReader(rows, size=self.shuffle_window, order=(seed, epoch), state=state)
        n_read = state["documents"] if state else 0
        return CountingReader((document for document, _ in rows({"row": n_read}, already_read=n_read)), already_read=n_read)

    def description(self) -> str:
        """The dataset's name on the Hub, with its configuration."""
        return "/".join(filter(None, [self.dataset.path, self.dataset.name]))

    def settings(self) -> dict[str, Any]:
        """The split, the column and the revision."""
        return {"split of it": self.dataset.split, "column": self.dataset.column, "revision": self.dataset.revision}


class SavedDataset(Corpus):
    """A folder written by `save_to_disk` of the library `datasets`; its rows are shuffled as a whole.

    Args:
        path: The folder.
        column: The column with the texts, or with lists of token ids.
        split: The split to read if the folder holds several.
    """

    def __init__(self, path: str, column: str = "text", *, split: str = "train"):
        self.path = path
        self.column = column
        self.split = split

    def documents(self, *, seed: int = 0, epoch: int = 0) -> Iterator[Document]:
        """All documents of the saved split, in a shuffled order."""
        import datasets

        try:
            data: Any = datasets.load_from_disk(self.path)
        except (OSError, ValueError) as error:
            raise InputError(f"path: {self.path!r} is not a folder written by save_to_disk: {one_line(error)}") from error
        if isinstance(data, datasets.DatasetDict):
            if self.split not in data:
                raise InputError(f"split: {self.path!r} has no {self.split!r}, it has {', '.join(map(str, data))}")
            data = data[self.split]
        check_column(self.column, data.column_names, self.path)
        # A format saved with the dataset would turn the lists of token ids into tensors.
        data = data.with_format(None)
        for row in data.shuffle(seed=order_seed(seed, epoch), keep_in_memory=True):
            yield document_from_row(row, self.column, self.path)

    def description(self) -> str:
        """The folder's path."""
        return self.path

    def settings(self) -> dict[str, Any]:
        """The split and the column."""
        return {"split of it": self.split, "column": self.column}


class TextFiles(Corpus):
    """Local text files, read in a shuffled order; their documents are shuffled in a window.

    A `.txt` file has one document per paragraph (lines up to a blank line). A whole file may be a book or a dump, too large a document
    for the split into train, validation and test. `.jsonl` and `.parquet` files have one document per row, in `column`. `.txt` and
    `.jsonl` files may be compressed (`.gz`).

    Args:
        paths: Files, folders and glob patterns, one or a list.
        column: The column with the texts, or with lists of token ids, in `.jsonl` and `.parquet` files.
        shuffle_window: The number of documents that are held in memory and shuffled together.
    """

    def __init__(self, paths: str | list[str], *, column: str = "text", shuffle_window: int = 1000):
        self.paths = [paths] if isinstance(paths, str) else paths
        self.column = column
        self.shuffle_window = shuffle_window

    def documents(self, *, seed: int = 0, epoch: int = 0) -> Iterator[Document]:
        """The documents of all files, in a shuffled order."""
        files = sorted({file for path in self.paths for file in expand_path(path)})
        order = random.Random(order_seed(seed, epoch))
        order.shuffle(files)
        documents = itertools.chain.from_iterable(read_documents(file, self.column) for file in files)
        yield from shuffle_in_window(documents, self.shuffle_window, order)

    def description(self) -> str:
        """The paths, separated by commas."""
        return ", ".join(self.paths)

    def settings(self) -> dict[str, Any]:
        """The column and the size of the shuffle window."""
        return {"column": self.column, "shuffle_window": self.shuffle_window}


class InMemory(Corpus):
    """Documents in a Python list: for a notebook, or for a source that no other class reads.

    Args:
        documents: Texts, or lists of token ids.
        name: The corpus's description, in messages and in the metadata of a published SAE.
    """

    def __init__(self, documents: list[Document], name: str = "documents in memory"):
        self.all_documents, self.name = documents, name

    def documents(self, *, seed: int = 0, epoch: int = 0) -> Iterator[Document]:
        """The documents, in a shuffled order."""
        order = list(self.all_documents)
        random.Random(order_seed(seed, epoch)).shuffle(order)
        return iter(order)

    def description(self) -> str:
        """The name given in the constructor."""
        return self.name
