"""Datasets of the hub, read through `datasets` from any place on and in spite of a connection that breaks."""

import copy
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from metasae_lightning.corpora.documents import Document, Reader, check_column, document_in, mix, one_line
from metasae_lightning.corpora.prefetch import alive
from metasae_lightning.errors import InputError

Place = dict[str, Any]
# What a connection that fails raises, in the libraries that versions of `datasets` read with.
BROKEN = {
    *("builtins.ConnectionError", "builtins.TimeoutError", "asyncio.TimeoutError", "httpx.TransportError", "httpx2.TransportError"),
    *("requests.ConnectionError", "requests.Timeout", "requests.ChunkedEncodingError"),
    *("aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError"),
}

log = logging.getLogger(__name__)


def passing(error: BaseException) -> BaseException | None:
    """What of an error and its causes may pass: a broken connection, a time-out, a fault of the server's; not an answer such as 404.

    >>> passing(TimeoutError("read timed out")), passing(FileNotFoundError("no such dataset"))
    (TimeoutError('read timed out'), None)
    """
    from huggingface_hub import constants

    chain = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) and deeper not in chain:
        chain.append(deeper)
    for link in chain:
        status = getattr(getattr(link, "response", None), "status_code", None)
        if status is not None:
            return link if status in (408, 429) or status >= 500 else None
    # Being offline is told as a broken connection too.
    broken = [link for link in chain if not constants.HF_HUB_OFFLINE and not BROKEN.isdisjoint(map(_library_name, type(link).__mro__))]
    return broken[-1] if broken else None


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _library_name(kind: type) -> str:
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset, and how patient to be with it."""

    path: str
    name: str | None
    split: str
    column: str
    revision: str | None
    streaming: bool
    retries: int
    """How often in a row to try again."""
    retry_seconds: float
    """How long to wait before the first of them; each waits twice as long as the one before."""

    def rows(self, order: int, place: Place | None = None, *, given: int = 0) -> Iterator[tuple[Document, Place]]:
        """Every document from a place on, each with the place after it; `given` were read before and are only told of."""
        data, failures = None, 0
        while True:
            try:
                data = self._open() if data is None else data
                for text, after in (self._shards if self.streaming else self._whole)(data, order, place):
                    given, failures, place = given + 1, 0, after
                    yield text, after
                return
            except InputError:
                raise
            # A hub that is away raises whatever its client, its HTTP library or its file reader raises.
            except Exception as error:
                failures += 1
                self._wait(error, failures, given)

    def _wait(self, error: Exception, failures: int, given: int) -> None:
        passes = passing(error)
        if passes is None or failures > self.retries:
            tried = f", after {given} documents and {self.retries} retries" if passes else f", after {given} documents" if given else ""
            raise InputError(f"path: the dataset {self.path!r} cannot be read{tried}: {_told(passes or error)}") from error
        seconds = self.retry_seconds * 2 ** (failures - 1)
        message = "the dataset %r broke off after %d documents, retry %d of %d in %g s: %s"
        log.warning(message, self.path, given, failures, self.retries, seconds, _told(passes))
        alive(seconds)
        time.sleep(seconds)

    def _open(self) -> Any:
        from datasets import config, load_dataset

        # The hub's client tries each request 6 times in up to 83 s by itself, too short to be worth a warning. `datasets` would do
        # that 20 times over, with waits of 5 to 60 s: half an hour to an hour for each of our own retries. 1 is once and no more; it
        # waits even then, which our own wait makes needless.
        config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 1
        config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = 0
        alive(0.0 if self.streaming else math.inf)  # a download takes what it takes, and times out by itself
        data: Any = load_dataset(self.path, self.name, split=self.split, revision=self.revision, streaming=self.streaming)
        if data.column_names is not None:
            check_column(self.column, data.column_names, self.path)
        alive()
        return data

    def _whole(self, data: Any, order: int, place: Place | None) -> Iterator[tuple[Document, Place]]:
        shuffled, start = data.shuffle(seed=order), place["row"] if place else 0
        # `datasets` refuses to select nothing.
        rows = shuffled.select(range(start, len(shuffled))) if start < len(shuffled) else ()
        for number, row in enumerate(rows, start + 1):
            yield document_in(row, self.column, self.path), {"row": number}

    def _shards(self, data: Any, order: int, place: Place | None) -> Iterator[tuple[Document, Place]]:
        # Shuffled here and not by `datasets`, whose shuffle mixes shards in a way of its own in every version and resumes inexactly.
        shards, (first, within) = list(range(data.num_shards)), (place["shard"], place["within"]) if place else (0, None)
        if place and place["shards"] != len(shards):
            raise InputError(f"path: the dataset {self.path!r} has {len(shards)} shards, it had {place['shards']} when reading began")
        random.Random(order).shuffle(shards)
        for number in range(first, len(shards)):
            shard = data.shard(len(shards), shards[number])
            if within is not None:
                shard.load_state_dict(copy.deepcopy(within))
            last = None
            for row in shard:
                if last is not None:
                    yield last, {"shards": len(shards), "shard": number, "within": within}
                last, within = document_in(row, self.column, self.path), shard.state_dict()
            # Held back until the shard's end is known: to go on after its last document is to go on in the next one.
            if last is not None:
                yield last, {"shards": len(shards), "shard": number + 1, "within": None}
            within = None


class Windows(Reader):
    """Documents shuffled window by window, each window by a seed of its own.

    A window is what is held in memory, and what is read again to go on from inside it.
    """

    def __init__(
        self, rows: Callable[..., Iterator[tuple[Document, Place]]], *, size: int, order: tuple[int, int], state: Place | None = None
    ):
        self._size, self._order = size, order
        self._state = state or {"documents": 0, "window": 0, "at": 0, "source": None}
        self._rows = rows(self._state["source"], given=self._state["documents"] - self._state["at"])
        self._window: list[Document] = []
        self._after: Place | None = None

    def __next__(self) -> Document:
        at = self._state["at"]
        if not self._window:
            self._fill(at)
        given = self._window[at]
        self._state = {**self._state, "documents": self._state["documents"] + 1, "at": at + 1}
        if at + 1 == len(self._window):
            self._state |= {"window": self._state["window"] + 1, "at": 0, "source": self._after}
            self._window = []
        return given

    def _fill(self, at: int) -> None:
        window: list[Document] = []
        for text, after in islice(self._rows, self._size):
            window.append(text)
            self._after = after
        if not window and not at:
            raise StopIteration
        if len(window) <= at:
            raise InputError(f"path: the dataset has changed since reading began: {at} documents were read where {len(window)} are left")
        random.Random(mix(*self._order, self._state["window"])).shuffle(window)
        self._window = window

    def state(self) -> dict[str, Any]:
        return copy.deepcopy(self._state)
