"""Processes that talk to each other, as ranks do."""

import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from metasae_lightning.penalties import Decomposability
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import config


def forks() -> Any:
    """Processes that are copies of one that has imported everything: seconds less for each, and no thread of this one's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.killed", "tests.helpers.ranks"])
    return context


def on_two_ranks(target: Callable[[int, str], None], folder: Path) -> None:
    """Run a function of rank and folder in two processes; both must end well."""
    on_ranks(2, target, folder)


def on_ranks(count: int, target: Callable[[int, str], None], folder: Path) -> None:
    """The same in so many."""
    context = forks()
    processes = [context.Process(target=target, args=(rank, str(folder))) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0] * count


def met(count: int, target: Callable[[int, str], None], folder: Path) -> None:
    """Run a function of rank and folder on so many ranks of one group."""
    on_ranks(count, partial(_meet, count, target), folder)


def module(kind: tuple[str, dict[str, Any], dict[str, Any]], d_sae: int, dtype: torch.dtype) -> JointSAE:
    """A small joint module of a kind: its primary's architecture, its config's arguments and the module's."""
    architecture, of_config, of_module = kind
    given: dict[str, Any] = {
        "meta": config("batchtopk", d_sae=12),
        "penalties": {"d": Decomposability(0.3)},
        # So short that some latents are dead now and then, and the auxiliary loss is there.
        **{"n_p": 3, "n_m": 2, "dead_after_tokens": 64},
        **of_module,
    }
    return JointSAE(config(architecture, d_sae=d_sae, **of_config), **given).to(dtype)


def same_training(alone: dict[str, Any], ours: list[dict[str, Any]], tolerance: float, told: str) -> None:
    """What ranks came to is what one process does, the same bits on all: `state`, who is `dead`, what steps have `shown`."""
    for name, expected in alone["state"].items():
        for one in ours:
            assert (one["state"][name] == ours[0]["state"][name]).all(), f"{told}: {name} differs among ranks"
        off = (ours[0]["state"][name].double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
        assert off <= tolerance, f"{told}: {name} is {off:.1e} off"
    assert all((one["dead"] == alone["dead"]).all() for one in ours), told
    atol = 1e-7 if tolerance > 1e-9 else 1e-12
    for expected, *others in zip(alone["shown"], *(one["shown"] for one in ours), strict=True):
        for each in others:
            torch.testing.assert_close(torch.stack(each), torch.stack(expected), rtol=100 * tolerance, atol=atol)


def _meet(count: int, target: Callable[[int, str], None], rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    target(rank, folder)
    torch.distributed.destroy_process_group()
