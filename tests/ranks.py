"""Processes that talk to each other, as ranks do."""

import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch


def on_two_ranks(target: Callable[[int, str], None], folder: Path) -> None:
    """Run a function of rank and folder in two processes; both must end well."""
    on_ranks(2, target, folder)


def on_ranks(count: int, target: Callable[[int, str], None], folder: Path) -> None:
    """The same in so many."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(rank, str(folder))) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0] * count


def met(count: int, target: Callable[[int, str], None], folder: Path) -> None:
    """Run a function of rank and folder on so many ranks of one group."""
    on_ranks(count, partial(_meet, count, target), folder)


def _meet(count: int, target: Callable[[int, str], None], rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    target(rank, folder)
    torch.distributed.destroy_process_group()
