"""An iterator that runs ahead on a thread of its own."""

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
"""The mark after the last item."""
POLL_SECONDS = 0.2
"""The interval at which a waiting thread looks whether it should stop."""
MAX_WAIT_SECONDS = 60.0
"""The longest single wait for an item, before the stall timer is looked at again."""

_current = threading.local()


def heartbeat(seconds: float = 0.0) -> None:
    """Reset the stall timer of the `Producer` whose thread runs this; elsewhere it does nothing.

    Slow code that makes items calls it, so that slow work is not mistaken for a stall.

    Args:
        seconds: A silence to expect, such as the wait before a retry; the timer starts after it.
    """
    if (last_heartbeat := getattr(_current, "last_heartbeat", None)) is not None:
        last_heartbeat[0] = time.monotonic() + seconds


class StopRequest:
    """Whether a thread should end.

    Ctrl-C can interrupt the caller's thread anywhere. The locks of `threading.Event` and `threading.Semaphore` are taken by Python code: an
    interrupt can come after a lock is taken and before it is released, and then the next call waits forever. So this is an attribute, and
    free slots are counted by a `SimpleQueue`, whose methods an interrupt cannot divide.
    """

    made = False

    def make(self) -> None:
        """Ask the thread to end."""
        self.made = True


class Failure:
    """An exception on its way from the thread to the caller."""

    def __init__(self, error: BaseException):
        self.error = error


class Producer(Iterator[T], Generic[T]):
    """Runs an iterator ahead on a thread; an exception of the iterator is raised by `next` in the place of its item.

    Args:
        items: The iterator to run; from now on only the thread may use it.
        ahead: The largest number of finished items that wait for the caller.
        name: The thread's name, also in the error about a stall.
        stall_seconds: Waiting ends with an error after this time without an item or a `heartbeat`; None waits forever.
    """

    def __init__(self, items: Iterator[T], *, ahead: int = 2, name: str = "producer", stall_seconds: float | None = None):
        self.name, self.stall_seconds = name, stall_seconds
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._free_slots: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(ahead):
            self._free_slots.put(None)
        self._producing, self._stop = threading.Lock(), StopRequest()
        self._ending: Any = None
        # The thread holds no reference to this object, so that garbage collection of the object ends the thread.
        self._last_heartbeat = [time.monotonic()]
        args = (items, self._ready, self._free_slots, self._producing, self._stop, self._last_heartbeat)
        self._thread = threading.Thread(target=_produce, args=args, name=name, daemon=True)
        self._finalizer = weakref.finalize(self, self._stop.make)
        self._thread.start()

    def __next__(self) -> T:
        """The next item; waits for it if it is not finished."""
        if self._ending is None:
            item = self._wait()
            if item is not END and not isinstance(item, Failure):
                self._free_slots.put(None)
                return item
            self._ending = item
            self.close()
        if isinstance(self._ending, Failure):
            raise self._ending.error
        raise StopIteration

    def _wait(self) -> Any:
        """The next entry of the queue, or a `Failure` after a stall."""
        start = time.monotonic()
        while True:
            remaining = math.inf
            if self.stall_seconds is not None:
                remaining = self.stall_seconds + max(start, self._last_heartbeat[0]) - time.monotonic()
            if remaining <= 0:
                return Failure(InputError(f"{self.name}: nothing came for {self.stall_seconds:g} s (stall_seconds sets this limit)"))
            with suppress(queue.Empty):
                return self._ready.get(timeout=min(remaining, MAX_WAIT_SECONDS))

    @contextmanager
    def paused(self) -> Generator[list[T], None, None]:
        """Wait for the current item, pause the thread, and yield the list of finished items. The items stay in the queue."""
        with self._producing:
            entries: list[Any] = []
            while not self._ready.empty():
                entries.append(self._ready.get())
            for entry in entries:
                self._ready.put(entry)
            yield [entry for entry in entries if entry is not END and not isinstance(entry, Failure)]

    def close(self, seconds: float = 5.0) -> None:
        """Stop the thread after its current item. A thread that does not end within `seconds` is left behind, as a daemon."""
        self._ending = self._ending or END
        self._stop.make()
        deadline = time.monotonic() + seconds
        while self._thread.is_alive() and self._thread is not threading.current_thread() and time.monotonic() < deadline:
            self._free_slots.put(None)
            self._thread.join(POLL_SECONDS)


def _produce(
    items: Iterator[Any],
    ready: Any,
    free_slots: queue.SimpleQueue[None],
    producing: Any,
    stop: StopRequest,
    last_heartbeat: list[float],
) -> None:
    """The thread's loop: wait for a free slot, make one item and put it in the queue."""
    item: Any = None
    _current.last_heartbeat = last_heartbeat
    while item is not END and not isinstance(item, Failure):
        while not stop.made:
            with suppress(queue.Empty):
                free_slots.get(timeout=POLL_SECONDS)
                break
        with producing:
            if stop.made:
                break
            item = _next_entry(items)
            ready.put(item)
            if not isinstance(item, Failure) and item is not END:
                item = None  # a reference here would keep the item alive while the thread waits
    if hasattr(items, "close"):
        items.close()  # pyright: ignore[reportAttributeAccessIssue]


def _next_entry(items: Iterator[Any]) -> Any:
    """The iterator's next item, `END` after the last, or its exception as a `Failure`."""
    try:
        return next(items, END)
    # The caller's thread must see every exception, KeyboardInterrupt and SystemExit included.
    except BaseException as error:
        return Failure(error)
