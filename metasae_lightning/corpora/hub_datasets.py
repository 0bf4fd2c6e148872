"""Datasets on the Hugging Face Hub, read from any position, with retries after connection errors."""

import copy
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from metasae_lightning.corpora.documents import Document, Reader, check_column, document_from_row, order_seed
from metasae_lightning.corpora.prefetch import heartbeat
from metasae_lightning.errors import InputError, one_line

Position = dict[str, Any]
"""The position after a document: plain values from which reading can continue."""

# The exceptions of failed connections, in all HTTP libraries that versions of `datasets` use.
CONNECTION_ERRORS = {
    *("builtins.ConnectionError", "builtins.TimeoutError", "asyncio.TimeoutError", "httpx.TransportError", "httpx2.TransportError"),
    *("requests.ConnectionError", "requests.Timeout", "requests.ChunkedEncodingError"),
    *("aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError"),
}

log = logging.getLogger(__name__)


def transient_error(error: BaseException) -> BaseException | None:
    """The error, or the one among its causes, that a retry may cure; None if a retry is of no use.

    Failed connections, time-outs and the HTTP answers 408, 429 and 500 or above are transient. Other answers, such as 404, are not, and in
    offline mode a failed connection is not either.

    >>> transient_error(TimeoutError("read timed out")), transient_error(FileNotFoundError("no such dataset"))
    (TimeoutError('read timed out'), None)
    """
    from huggingface_hub import constants

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    for link in chain:
        status = getattr(getattr(link, "response", None), "status_code", None)
        if status is not None:
            return link if status in (408, 429) or status >= 500 else None
    # In offline mode the client raises a connection error too, and no retry helps.
    if constants.HF_HUB_OFFLINE:
        return None
    failed = [link for link in chain if not CONNECTION_ERRORS.isdisjoint(map(_qualified_name, type(link).__mro__))]
    return failed[-1] if failed else None


def _describe_error(error: BaseException) -> str:
    """The exception's type and message on one line."""
    return f"{type(error).__name__}: {one_line(error)}"


def _qualified_name(kind: type) -> str:
    """The top-level package and the name of a class, such as `httpx.TransportError`."""
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset on the Hub, and the retries after a failed connection."""

    path: str
    name: str | None
    split: str
    column: str
    revision: str | None
    streaming: bool
    retries: int
    """The number of retries in a row."""
    retry_seconds: float
    """The wait before the first retry in seconds; each further retry waits twice as long."""

    def rows(self, seed: int, position: Position | None = None, *, already_read: int = 0) -> Iterator[tuple[Document, Position]]:
        """The documents from `position` on, each with the position after it.

        `already_read` is the number of documents before `position`; only messages use it. An error that retries do not cure is raised as
        an InputError.
        """
        data, failures, n_read = None, 0, already_read
        read = self._read_shards if self.streaming else self._read_downloaded
        while True:
            try:
                data = self._open() if data is None else data
                for document, next_position in read(data, seed, position):
                    n_read, failures, position = n_read + 1, 0, next_position
                    yield document, next_position
                return
            except InputError:
                raise
            # An unreachable hub raises any exception of its client, of the HTTP library or of the file reader.
            except Exception as error:
                failures += 1
                self._wait_before_retry(error, failures, n_read)

    def _wait_before_retry(self, error: Exception, failures: int, n_read: int) -> None:
        """Log a warning and sleep; raise an InputError if a retry is of no use or no retries are left."""
        transient = transient_error(error)
        if transient is None or failures > self.retries:
            retries = f" and {self.retries} retries" if transient else ""
            progress = f", after {n_read} documents{retries}" if transient or n_read else ""
            raise InputError(f"path: the dataset {self.path!r} cannot be read{progress}: {_describe_error(transient or error)}") from error
        seconds = self.retry_seconds * 2 ** (failures - 1)
        message = "the dataset %r broke off after %d documents, retry %d of %d in %g s: %s"
        log.warning(message, self.path, n_read, failures, self.retries, seconds, _describe_error(transient))
        heartbeat(seconds)
        time.sleep(seconds)

    def _open(self) -> Any:
        """The dataset as an object of `datasets`: streamed, or downloaded first."""
        from datasets import config, load_dataset

        # The hub's client itself tries each request 6 times in up to 83 s, too short to be worth a warning. `datasets` would repeat
        # that 20 times with waits of 5 to 60 s: half an hour to an hour for each of our own retries. The value 1 means one try. The
        # interval is 0 because `datasets` waits even after the last try.
        config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 1
        config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = 0
        # A download may take any time, and has time-outs of its own.
        heartbeat(0.0 if self.streaming else math.inf)
        data: Any = load_dataset(self.path, self.name, split=self.split, revision=self.revision, streaming=self.streaming)
        if data.column_names is not None:
            check_column(self.column, data.column_names, self.path)
        heartbeat()
        return data

    def _read_downloaded(self, data: Any, seed: int, position: Position | None) -> Iterator[tuple[Document, Position]]:
        """The documents of a downloaded dataset, shuffled as a whole."""
        shuffled, start = data.shuffle(seed=seed), position["row"] if position else 0
        # `datasets` raises an error for an empty selection.
        rows = shuffled.select(range(start, len(shuffled))) if start < len(shuffled) else ()
        for number, row in enumerate(rows, start + 1):
            yield document_from_row(row, self.column, self.path), {"row": number}

    def _read_shards(self, data: Any, seed: int, position: Position | None) -> Iterator[tuple[Document, Position]]:
        """The documents of a streamed dataset, shard by shard in a shuffled order of shards."""
        # The shuffle of `datasets` would not do: its order differs between versions, and it resumes inexactly.
        shards = list(range(data.num_shards))
        first, within = (position["shard"], position["within"]) if position else (0, None)
        if position and position["shards"] != len(shards):
            raise InputError(f"path: the dataset {self.path!r} has {len(shards)} shards, it had {position['shards']} when reading began")
        random.Random(seed).shuffle(shards)
        for number in range(first, len(shards)):
            shard = data.shard(len(shards), shards[number])
            if within is not None:
                shard.load_state_dict(copy.deepcopy(within))
            previous = None
            for row in shard:
                if previous is not None:
                    yield previous, {"shards": len(shards), "shard": number, "within": within}
                previous, within = document_from_row(row, self.column, self.path), shard.state_dict()
            # The last document is yielded after the loop, because the position after it is the start of the next shard.
            if previous is not None:
                yield previous, {"shards": len(shards), "shard": number + 1, "within": None}
            within = None


class WindowReader(Reader):
    """A reader that shuffles streamed documents window by window, each window with a seed of its own.

    One window is held in memory. To resume inside a window, the reader reads that window again from its beginning.

    Args:
        rows: Yields documents from a position on, each with the position after it.
        size: The number of documents in a window.
        order: The run's seed and the epoch, from which the seeds of the windows follow.
        state: An earlier reader's `state()`, to continue from there.
    """

    def __init__(
        self, rows: Callable[..., Iterator[tuple[Document, Position]]], *, size: int, order: tuple[int, int], state: Position | None = None
    ):
        self._size, self._order = size, order
        self._state = state or {"documents": 0, "window": 0, "at": 0, "source": None}
        self._rows = rows(self._state["source"], already_read=self._state["documents"] - self._state["at"])
        self._window: list[Document] = []
        self._window_end: Position | None = None

    def __next__(self) -> Document:
        """The next document of the shuffled window. The first call after a window's last document reads the next window."""
        index = self._state["at"]
        if not self._window:
            self._fill(index)
        document = self._window[index]
        self._state = {**self._state, "documents": self._state["documents"] + 1, "at": index + 1}
        if index + 1 == len(self._window):
            self._state |= {"window": self._state["window"] + 1, "at": 0, "source": self._window_end}
            self._window = []
        return document

    def _fill(self, index: int) -> None:
        """Read and shuffle the next window, to be continued at its document `index`; raise StopIteration if no document is left."""
        window: list[Document] = []
        for document, next_position in islice(self._rows, self._size):
            window.append(document)
            self._window_end = next_position
        if not window and not index:
            raise StopIteration
        if len(window) <= index:
            raise InputError(
                f"path: the dataset has changed since reading began: {index} documents of a window were read, now it has {len(window)}"
            )
        random.Random(order_seed(*self._order, self._state["window"])).shuffle(window)
        self._window = window

    def state(self) -> dict[str, Any]:
        """The position to continue from: documents read, the shuffled window and its start in the dataset, and the index in the window."""
        return copy.deepcopy(self._state)
