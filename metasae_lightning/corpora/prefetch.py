"""Something slow done ahead of time, on a thread of its own."""

import math
import queue
import threading
import time
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

from metasae_lightning.errors import InputError

T = TypeVar("T")

END = object()
TOLD_EVERY, LOOKED_EVERY = 0.2, 60.0


def alive(seconds: float = 0.0) -> None:
    """Told by what makes items, on its thread: it is at work, and may be silent for so long from here on."""
    if (beat := getattr(_beats, "shared", None)) is not None:
        beat[0] = time.monotonic() + seconds


_beats = threading.local()


class Failure:
    """Carries an error from the thread to whoever waits for the item."""

    def __init__(self, error: BaseException):
        self.error = error


class Producer(Iterator[T], Generic[T]):
    """An iterator whose next items are made on a thread: at most `ahead` of them wait, errors reach the caller in their place.

    Args:
        items: What to iterate over; only the thread touches it from now on.
        ahead: How many finished items may wait.
        name: What a stall is called, and the thread.
        stall_seconds: After so long without an item, or a word of `alive`, waiting is given up with an error; none waits for ever.
    """

    def __init__(self, items: Iterator[T], *, ahead: int = 2, name: str = "producer", stall_seconds: float | None = None):
        self.name, self.stall_seconds = name, stall_seconds
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._room, self._making, self._stop = threading.Semaphore(ahead), threading.Lock(), threading.Event()
        self._over: Any = None
        # The thread knows nothing of this object, so that dropping the object ends the thread.
        self._beat = [time.monotonic()]
        work = (items, self._ready, self._room, self._making, self._stop, self._beat)
        self._thread = threading.Thread(target=_work, args=work, name=name, daemon=True)
        self._finalizer = weakref.finalize(self, self._stop.set)
        self._thread.start()

    def __next__(self) -> T:
        if self._over is None:
            item = self._wait()
            if item is not END and not isinstance(item, Failure):
                self._room.release()
                return item
            self._over = item
            self.close()
        if isinstance(self._over, Failure):
            raise self._over.error
        raise StopIteration

    def _wait(self) -> Any:
        began = time.monotonic()
        while True:
            patience = math.inf if self.stall_seconds is None else self.stall_seconds + max(began, self._beat[0]) - time.monotonic()
            if patience <= 0:
                message = f"{self.name}: nothing came for {self.stall_seconds:g} s, so it is given up (stall_seconds says how long to wait)"
                return Failure(InputError(message))
            with suppress(queue.Empty):
                return self._ready.get(timeout=min(patience, LOOKED_EVERY))

    @contextmanager
    def paused(self) -> Generator[list[T], None, None]:
        """Hold the thread between two items, and see those that wait."""
        with self._making:
            waiting: list[Any] = []
            while not self._ready.empty():
                waiting.append(self._ready.get())
            for item in waiting:
                self._ready.put(item)
            yield [item for item in waiting if item is not END and not isinstance(item, Failure)]

    def close(self, seconds: float = 5.0) -> None:
        """Stop after the item that is being made; a thread that hangs in a read is left to the end of the process."""
        self._over = self._over or END
        self._stop.set()
        until = time.monotonic() + seconds
        while self._thread.is_alive() and self._thread is not threading.current_thread() and time.monotonic() < until:
            self._room.release()
            self._thread.join(TOLD_EVERY)


def _work(items: Iterator[Any], ready: Any, room: threading.Semaphore, making: Any, stop: threading.Event, beat: list[float]) -> None:
    item: Any = None
    _beats.shared = beat
    while item is not END and not isinstance(item, Failure):
        while not room.acquire(timeout=TOLD_EVERY):
            if stop.is_set():
                break
        with making:
            if stop.is_set():
                break
            item = _made(items)
            ready.put(item)
            if not isinstance(item, Failure) and item is not END:
                item = None  # nothing is kept alive here while the thread waits for room
    if hasattr(items, "close"):
        items.close()  # pyright: ignore[reportAttributeAccessIssue]


def _made(items: Iterator[Any]) -> Any:
    try:
        return next(items, END)
    # Whatever it is, it is the caller's to see.
    except BaseException as error:
        return Failure(error)
