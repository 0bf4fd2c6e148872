"""Two processes that talk to each other, as ranks do."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path


def on_two_ranks(target: Callable[[int, str], None], folder: Path) -> None:
    """Run a function of rank and folder in two processes; both must end well."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(rank, str(folder))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
