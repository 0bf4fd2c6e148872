"""Reads of numbers by the host. Each makes the host wait for the GPU, so the searches of the GPU path make all of theirs here.

A search for the largest values ends with a check that some numbers are positive: the smallest selected value, and how much it exceeds
every value that was not ranked. A check within `deferred_checks` is made at the host's next read, so that two searches need one wait.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Then = Callable[..., None]
"""A function that gets numbers when they are read."""
# The deferred checks that the next read makes; whether checks are deferred now; the given answers to reads.
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
        """Check the values of the numbers that `unread` returned."""
        for numbers, then in self._unread:
            values, read = read[: len(numbers)], read[len(numbers) :]
            self._all_hold &= all(value > 0 for value in values)
            if then is not None:
                then(*values)
        self._unread = []

    def all_hold(self) -> bool:
        """Whether all added numbers are positive. The host waits for those that were not read yet."""
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
    """Whether all numbers are positive; within `deferred_checks` always True, and the check is made later.

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
    _CHECKS.set(checks)  # not reset: the next read may come after the context
    token = _IS_DEFERRING.set(True)
    try:
        yield checks
    finally:
        _IS_DEFERRING.reset(token)


@contextmanager
def given_numbers(answers: Iterable[list[float]]) -> Generator[None]:
    """Answer each read with the next of `answers`: fake tensors have no data to read."""
    token = _ANSWERS.set(iter(answers))
    try:
        yield
    finally:
        _ANSWERS.reset(token)


def _read(numbers: Tensor) -> list[float]:
    answers = _ANSWERS.get()
    return numbers.tolist() if answers is None else next(answers)
