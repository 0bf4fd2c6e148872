"""What is made ahead on a thread: order, bounds, errors, stalls and the end."""

import gc
import threading
import time

import pytest

from metasae_lightning.corpora.prefetch import Producer, heartbeat
from metasae_lightning.errors import InputError


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def gone(name: str, seconds: float = 3.0) -> bool:
    until = time.monotonic() + seconds
    while threads(name) and time.monotonic() < until:
        time.sleep(0.02)
    return not threads(name)


def test_items_come_in_order_and_the_thread_ends_with_them():
    assert list(Producer(iter(range(50)), name="fifty")) == list(range(50))
    assert gone("fifty")


def test_no_more_than_asked_are_made_ahead():
    made: list[int] = []
    producer = Producer((made.append(i) or i for i in range(50)), ahead=3, name="bounded")
    time.sleep(0.3)
    assert made == [0, 1, 2]
    assert next(producer) == 0
    time.sleep(0.3)
    assert made == [0, 1, 2, 3]
    producer.close()


def test_an_error_reaches_the_caller_in_its_place_and_stays():
    def items():
        yield 1
        raise InputError("broken")

    producer = Producer(items(), name="failing")
    assert next(producer) == 1
    for _ in range(2):
        with pytest.raises(InputError, match="broken"):
            next(producer)
    assert gone("failing")


def test_a_stall_is_named_and_given_up():
    hangs = threading.Event()
    producer = Producer((hangs.wait() for _ in range(2)), name="corpus of nowhere", stall_seconds=0.2)
    began = time.monotonic()
    with pytest.raises(InputError, match=r"corpus of nowhere: nothing came for 0.2 s"):
        next(producer)
    assert time.monotonic() - began < 8
    hangs.set()
    assert gone("corpus of nowhere")


# Skipping to a place, waiting for a retry, downloading: nothing comes, and nothing is wrong.
@pytest.mark.parametrize("word", [lambda: heartbeat(), lambda: heartbeat(1.0)])
def test_what_says_that_it_is_alive_is_waited_for(word):
    def items():
        for _ in range(8):
            word()
            time.sleep(0.1)
        yield "done"

    assert list(Producer(items(), name="slow", stall_seconds=0.4)) == ["done"]


def test_closing_and_dropping_end_the_thread():
    closed = Producer(iter(range(10**9)), name="closed")
    next(closed)
    closed.close()
    assert gone("closed")
    assert list(closed) == []
    dropped = Producer(iter(range(10**9)), name="dropped")
    next(dropped)
    del dropped
    gc.collect()
    assert gone("dropped")


def test_pausing_shows_what_waits_and_loses_nothing():
    producer = Producer(iter(range(9)), ahead=3, name="paused")
    time.sleep(0.2)
    with producer.paused() as waiting:
        assert waiting == [0, 1, 2]
    assert list(producer) == list(range(9))
