"""When each part of a run works, by the host's clock or by the GPU's, and each part's share of the time."""

import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

Span = tuple[float, float]


class WorkTimes:
    """The times at which one kind of work ran in a window of time.

    On a CPU they are read from the clock. On a GPU they are CUDA events on the current stream, so the times are those at which the GPU
    began and finished the work. Read `spans` only when `is_complete`; then the host never waits. Nothing is recorded before `start`.

    Args:
        device: The device that works.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._begin: Any = None
        self._end: Any = None
        # Pairs of marks at which work began and ended. The first is None if work began before the window, the second if work goes on.
        self._work: deque[list[Any]] = deque()
        self._current: list[Any] = [None, None]

    def start(self) -> None:
        """Begin the first window."""
        self._work.clear()
        self._begin, self._end = self._mark(), None

    def end_window(self) -> None:
        """End the window; the next one begins. `spans` must be called before the next call."""
        self._end = self._mark()

    @contextmanager
    def running(self) -> Generator[None, None, None]:
        """A block that does the work, on any thread."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def begin(self) -> None:
        """Work begins; `end` must be called before the next call."""
        if self._begin is not None:
            self._current = [self._mark(), None]
            self._work.append(self._current)

    def end(self) -> None:
        """The work that began last ends."""
        if self._begin is not None:
            self._current[1] = self._mark()

    @property
    def has_ended(self) -> bool:
        """Whether a window has ended that `spans` has not read."""
        return self._end is not None

    def is_complete(self) -> bool:
        """Whether a window has ended on the device too, so that `spans` can read it."""
        return self._end is not None and _is_past(self._end)

    def spans(self) -> tuple[list[Span], float]:
        """The times of work in the window that `end_window` ended and the window's length, in seconds from its beginning.

        Work that goes on after the window counts in each of the windows with its part there.
        """
        seconds, spans, continued = _seconds(self._begin, self._end), list[Span](), deque[list[Any]]()
        while self._work:
            begin, end = self._work[0]
            if begin is not None and not _is_past(begin):
                break  # begins after the window, as all that follows
            start = 0.0 if begin is None else _seconds(self._begin, begin)
            if start >= seconds:
                break
            stop = _seconds(self._begin, end) if end is not None and _is_past(end) else float("inf")
            spans.append((max(start, 0.0), min(stop, seconds)))
            work = self._work.popleft()
            if stop > seconds:
                work[0] = None
                continued.append(work)
        self._work.extendleft(reversed(continued))
        self._begin, self._end = self._end, None
        return spans, seconds

    def _mark(self) -> Any:
        """The present: a time of the clock, or an event on the device's current stream."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


class StreamTimes:
    """The times at which a stream runs its language model and waits for text.

    Args:
        device: The language model's device.
    """

    def __init__(self, device: torch.device):
        self.model, self.text = WorkTimes(device), WorkTimes(device)


def shares(seconds: float, *, model: Sequence[Span], sae: Sequence[Span], text: Sequence[Span]) -> dict[str, float]:
    """The shares of a window of time, whose sum is one, that go to the model, the SAE, the wait for text, and the host.

    A moment at which the model and the SAE both work counts half for each. A moment at which neither works counts as `text` if the
    stream waits for text, and otherwise as `host`.

    >>> shares(10.0, model=[(0.0, 4.0)], sae=[(2.0, 6.0)], text=[(5.0, 9.0)])
    {'model': 0.3, 'sae': 0.3, 'text': 0.3, 'host': 0.1}
    """
    totals = {"model": 0.0, "sae": 0.0, "text": 0.0, "host": 0.0}
    changes = [(0.0, "host", 0), (seconds, "host", 0)]
    for name, spans in (("model", model), ("sae", sae), ("text", text)):
        changes += [(min(moment, seconds), name, step) for span in spans for moment, step in zip(span, (1, -1), strict=True)]
    active, previous = dict.fromkeys(totals, 0), 0.0
    for moment, name, step in sorted(changes):
        working = [kind for kind in ("model", "sae") if active[kind]] or (["text"] if active["text"] else ["host"])
        for kind in working:
            totals[kind] += (moment - previous) / len(working)
        active[name] += step
        previous = moment
    return {name: total / max(seconds, 1e-9) for name, total in totals.items()}


def _is_past(mark: Any) -> bool:
    """Whether a mark is in the past. A time of the clock always is; an event is once the GPU has reached it."""
    return isinstance(mark, float) or mark.query()


def _seconds(begin: Any, end: Any) -> float:
    """Seconds between two marks."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
