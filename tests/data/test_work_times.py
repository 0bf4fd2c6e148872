"""Times of work on the clock and on a GPU that is simulated, and the shares of time."""

import random
from typing import Any

import pytest
import torch

from metasae_lightning.data import work_times
from metasae_lightning.data.work_times import WorkTimes, shares


class Gpu:
    """A GPU whose events complete when `now` has come to the time at which they were recorded."""

    def __init__(self) -> None:
        self.queued_until, self.now = 0.0, 0.0

    def event(self, **_: Any) -> Any:
        return Event(self)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.time = gpu, -1.0

    def record(self, cuda_stream: Any) -> None:
        self.time = self.gpu.queued_until

    def query(self) -> bool:
        return self.time <= self.gpu.now

    def elapsed_time(self, later: "Event") -> float:
        assert self.query() and later.query(), "the host would wait"
        return 1000 * (later.time - self.time)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    simulated = Gpu()
    monkeypatch.setattr(work_times.torch.cuda, "Event", simulated.event)
    monkeypatch.setattr(work_times.torch.cuda, "current_stream", lambda device: None)
    return simulated


def work(times: WorkTimes, gpu: Gpu, seconds: float) -> None:
    """Queue work of some seconds on the GPU; the host goes on at once."""
    with times.running():
        gpu.queued_until += seconds


def test_on_a_gpu_times_are_read_without_a_wait_and_work_over_a_windows_end_counts_in_both(gpu: Gpu):
    times = WorkTimes(torch.device("cuda", 0))
    times.start()
    work(times, gpu, 2.0)
    gpu.queued_until += 1.0
    times.begin()
    gpu.queued_until += 1.0
    times.end_window()  # at 4 s, in the middle of work from 3 to 6 s
    gpu.queued_until += 2.0
    times.end()
    gpu.queued_until += 1.0
    work(times, gpu, 3.0)  # from 7 to 10 s
    gpu.now = 3.5
    assert times.has_ended and not times.is_complete()
    gpu.now = 5.0  # the window is past, the work that it cuts is not
    assert times.is_complete()
    assert times.spans() == ([(0.0, 2.0), (3.0, 4.0)], 4.0)
    times.end_window()  # at 10 s
    gpu.now = 10.0
    assert times.spans() == ([(0.0, 2.0), (3.0, 6.0)], 6.0)


def test_nothing_is_recorded_before_the_start(gpu: Gpu):
    times = WorkTimes(torch.device("cuda", 0))
    work(times, gpu, 2.0)
    times.start()
    work(times, gpu, 1.0)
    times.end_window()
    gpu.now = 3.0
    assert times.spans() == ([(0.0, 1.0)], 1.0)


def test_work_that_another_thread_ends_while_it_is_read_ends_in_the_next_window(monkeypatch: pytest.MonkeyPatch):
    now = iter([0.0, 1.0, 2.0, 5.0, 6.0])  # start, begin, end of window, end, end of window
    monkeypatch.setattr(work_times.time, "perf_counter", lambda: next(now))
    times = WorkTimes(torch.device("cpu"))
    times.start()
    times.begin()
    times.end_window()
    assert times.spans() == ([(1.0, 2.0)], 2.0)
    times.end()
    times.end_window()
    assert times.spans() == ([(0.0, 3.0)], 4.0)


@pytest.mark.parametrize("seed", range(20))
def test_shares_add_up_to_one_and_are_those_of_a_thousand_moments(seed: int):
    rng = random.Random(seed)

    def spans() -> list[work_times.Span]:
        edges = sorted(rng.randrange(1000) for _ in range(8))
        return list(zip(edges[::2], edges[1::2], strict=True))

    model, sae, text = spans(), spans(), spans()
    expected = dict.fromkeys(("model", "sae", "text", "host"), 0.0)
    for moment in range(1000):
        is_on = {name: any(b <= moment < e for b, e in of) for name, of in (("model", model), ("sae", sae), ("text", text))}
        working = [name for name in ("model", "sae") if is_on[name]] or ["text" if is_on["text"] else "host"]
        for name in working:
            expected[name] += 1 / len(working) / 1000
    values = shares(1000.0, model=model, sae=sae, text=text)
    assert values == pytest.approx(expected)
    assert sum(values.values()) == pytest.approx(1)
