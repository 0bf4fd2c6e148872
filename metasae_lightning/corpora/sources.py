"""Text sources: a dataset on the Hub, a saved dataset, text files, strings in memory."""

import itertools
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

from metasae_lightning.corpora.base import Corpus, through_window
from metasae_lightning.corpora.documents import Counted, Document, Reader, check_column, document_in, mix, one_line
from metasae_lightning.corpora.file_formats import documents_of, expand
from metasae_lightning.corpora.hub_datasets import HubDataset, Windows
from metasae_lightning.errors import InputError


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

    def description(self) -> str:
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

    def description(self) -> str:
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
        yield from through_window(
            itertools.chain.from_iterable(documents_of(file, self.column) for file in files), self.shuffle_window, order
        )

    def description(self) -> str:
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

    def description(self) -> str:
        return self.name
