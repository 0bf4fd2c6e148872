"""The GPU path's reads of numbers on the host: each makes the host wait for the GPU, so all of them are made here.

A search for the largest values ends with a check that some numbers are positive: the smallest selected value, and how much it exceeds
every value that was not ranked. Within `deferred_checks` the host makes the check at the next read, so that two searches wait once.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Then = Callable[..., None]
"""A function that gets numbers when they are read."""
# Checks that were added and not made yet; whether further checks are added to them; and the given answers to reads.
_CHECKS: ContextVar["DeferredChecks | None"] = ContextVar("checks", default=None)
_IS_DEFERRING: ContextVar[bool] = ContextVar("is_deferring", default=False)
_ANSWERS: ContextVar[Iterator[list[float]] | None] = ContextVar("answers", default=None)


class DeferredChecks:
    """Checks that numbers are positive, which the host makes when it next reads any numbers."""

    def __init__(self) -> None:
        self._unread: list[tuple[list[Tensor], Then | None]] = []
        self._all_hold = True

    def add(self, numbers: list[Tensor], then: "Then | None") -> None:
        """Add numbers that must be positive, and a function that gets them when they are read."""
        self._unread.append((numbers, then))

    def take(self) -> "list[tuple[list[Tensor], Then | None]]":
        """The numbers that were not read yet, each with its function. The caller must read and check them."""
        unread, self._unread = self._unread, []
        return unread

    def unread(self) -> list[Tensor]:
        """The numbers that were not read yet. The caller must read them and give them to `check`."""
        return [number for numbers, _ in self._unread for number in numbers]

    def check(self, read: list[float]) -> None:
        """Check the numbers that were not read before, now that they are."""
        for numbers, then in self._unread:
            values, read = read[: len(numbers)], read[len(numbers) :]
            self._all_hold &= all(value > 0 for value in values)
            if then is not None:
                then(*values)
        self._unread = []

    def all_hold(self) -> bool:
        """Whether all numbers are positive. The host waits for those that were not read yet."""
        if unread := self.unread():
            self.check(_read(torch.cat(unread)))
        return self._all_hold


def read_numbers(numbers: Tensor) -> list[float]:
    """The numbers in a vector. The host waits until the GPU has computed them, and makes the deferred checks."""
    checks = _CHECKS.get()
    unread = [] if checks is None else checks.unread()
    read = _read(torch.cat([numbers, *unread]) if unread else numbers)
    if checks is not None:
        checks.check(read[len(numbers) :])
    return read[: len(numbers)]


def is_deferring() -> bool:
    """Whether checks are deferred now."""
    return _IS_DEFERRING.get()


def are_positive(*numbers: Tensor, then: Then | None = None) -> bool:
    """Whether all numbers are positive; within `deferred_checks` True, and the check follows later.

    `then` gets the numbers when they are read.
    """
    checks, flat = _CHECKS.get(), [number.view(1) for number in numbers]
    if checks is not None and _IS_DEFERRING.get():
        checks.add(flat, then)
        return True
    values = read_numbers(torch.cat(flat))
    if then is not None:
        then(*values)
    return all(value > 0 for value in values)


@contextmanager
def deferred_checks() -> Generator[DeferredChecks]:
    """Defer the checks of `are_positive` within the context. Whoever uses what was computed there must ask `all_hold` first."""
    checks = DeferredChecks()
    _CHECKS.set(checks)  # it stays after the context, for the next read
    token = _IS_DEFERRING.set(True)
    try:
        yield checks
    finally:
        _IS_DEFERRING.reset(token)


@contextmanager
def given_numbers(answers: Iterable[list[float]]) -> Generator[None]:
    """Take what is read from `answers`, in order, for fake tensors, which have no data."""
    token = _ANSWERS.set(iter(answers))
    try:
        yield
    finally:
        _ANSWERS.reset(token)


def _read(numbers: Tensor) -> list[float]:
    answers = _ANSWERS.get()
    return numbers.tolist() if answers is None else next(answers)
