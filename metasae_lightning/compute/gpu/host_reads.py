"""The GPU path's reads of numbers on the host: each makes the host wait for the GPU, so all of them are made here."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_GIVEN: ContextVar[Iterator[list[float]] | None] = ContextVar("given_numbers", default=None)


def read_numbers(numbers: Tensor) -> list[float]:
    """The numbers in a tensor. The host waits until the GPU has computed them."""
    given = _GIVEN.get()
    return numbers.tolist() if given is None else next(given)


@contextmanager
def given_numbers(answers: Iterable[list[float]]) -> Generator[None]:
    """Take the results of `read_numbers` from `answers`, in order: for fake tensors, which have no data."""
    token = _GIVEN.set(iter(answers))
    try:
        yield
    finally:
        _GIVEN.reset(token)
