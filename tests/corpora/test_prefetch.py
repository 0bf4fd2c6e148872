"""`Producer` runs an iterator ahead on a thread: order, limits, errors, stalls and the thread's end."""

import gc
import threading
import time

import pytest

from metasae_lightning.corpora.prefetch import Producer, heartbeat
from metasae_lightning.errors import InputError


def threads_named(name: str) -> list[threading.Thread]:
    """The running threads of that name."""
    return [thread for thread in threading.enumerate() if thread.name == name]


def has_ended(name: str, seconds: float = 3.0) -> bool:
    """Whether the thread of that name ends within some seconds."""
    deadline = time.monotonic() + seconds
    while threads_named(name) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not threads_named(name)


def test_items_come_in_order_and_the_thread_ends_after_the_last():
    assert list(Producer(iter(range(50)), name="fifty")) == list(range(50))
    assert has_ended("fifty")


def test_at_most_ahead_items_are_produced_before_they_are_requested():
    produced: list[int] = []
    producer = Producer((produced.append(i) or i for i in range(50)), ahead=3, name="bounded")
    time.sleep(0.3)
    assert produced == [0, 1, 2]
    assert next(producer) == 0
    time.sleep(0.3)
    assert produced == [0, 1, 2, 3]
    producer.close()


def test_an_exception_is_raised_in_place_of_its_item_and_again_at_each_later_call():
    def items():
        yield 1
        raise InputError("broken")

    producer = Producer(items(), name="failing")
    assert next(producer) == 1
    for _ in range(2):
        with pytest.raises(InputError, match="broken"):
            next(producer)
    assert has_ended("failing")


def test_a_stall_raises_an_error_that_names_the_producer():
    release = threading.Event()
    producer = Producer((release.wait() for _ in range(2)), name="corpus of nowhere", stall_seconds=0.2)
    started_at = time.monotonic()
    with pytest.raises(InputError, match=r"corpus of nowhere: nothing came for 0.2 s"):
        next(producer)
    assert time.monotonic() - started_at < 8
    release.set()
    assert has_ended("corpus of nowhere")


# No items come while a resumed reader skips documents, waits for a retry or downloads, but this is no stall.
@pytest.mark.parametrize("beat", [lambda: heartbeat(), lambda: heartbeat(1.0)])
def test_heartbeats_reset_the_stall_timer(beat):
    def items():
        for _ in range(8):
            beat()
            time.sleep(0.1)
        yield "done"

    assert list(Producer(items(), name="slow", stall_seconds=0.4)) == ["done"]


def test_closing_and_garbage_collection_end_the_thread():
    closed = Producer(iter(range(10**9)), name="closed")
    next(closed)
    closed.close()
    assert has_ended("closed")
    assert list(closed) == []
    collected = Producer(iter(range(10**9)), name="collected")
    next(collected)
    del collected
    gc.collect()
    assert has_ended("collected")


def test_pausing_shows_the_finished_items_and_loses_none():
    producer = Producer(iter(range(9)), ahead=3, name="paused")
    time.sleep(0.2)
    with producer.paused() as waiting:
        assert waiting == [0, 1, 2]
    assert list(producer) == list(range(9))
