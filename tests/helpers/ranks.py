"""Run functions in several processes, as ranks of one group, and compare their training with that of one process."""

import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from metasae_lightning.penalties import Decomposability
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import config


def fork_context() -> Any:
    """A multiprocessing context whose processes are forked from a server that has imported everything, which saves seconds for each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.killed", "tests.helpers.ranks"])
    return context


def on_two_ranks(target: Callable[[int, str], None], folder: Path) -> None:
    """Run a function of rank and folder in two processes, and check that both end without an error."""
    on_ranks(2, target, folder)


def on_ranks(count: int, target: Callable[[int, str], None], folder: Path) -> None:
    """Run a function of rank and folder in `count` processes, and check that all end without an error."""
    context = fork_context()
    processes = [context.Process(target=target, args=(rank, str(folder))) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0] * count


def in_process_group(count: int, target: Callable[[int, str], None], folder: Path) -> None:
    """Run a function of rank and folder on `count` ranks of one gloo process group."""
    on_ranks(count, partial(_join_group_and_run, count, target), folder)


def module(kind: tuple[str, dict[str, Any], dict[str, Any]], d_sae: int, dtype: torch.dtype) -> JointSAE:
    """A small JointSAE. `kind`: architecture of the primary, further arguments of its config, further arguments of JointSAE."""
    architecture, config_args, module_args = kind
    arguments: dict[str, Any] = {
        "meta": config("batchtopk", d_sae=12),
        "penalties": {"d": Decomposability(0.3)},
        # Short enough that some latents die, so that the auxiliary loss is not zero.
        **{"n_p": 3, "n_m": 2, "dead_after_tokens": 64},
        **module_args,
    }
    return JointSAE(config(architecture, d_sae=d_sae, **config_args), **arguments).to(dtype)


def assert_same_training(single_process: dict[str, Any], by_rank: list[dict[str, Any]], tolerance: float, case: str) -> None:
    """Assert that the results of the ranks equal that of a single process, and have the same bits on all ranks.

    A result has the module's `state`, the `dead` latents, and the scalars of each step (`shown`).
    """
    for name, expected in single_process["state"].items():
        for result in by_rank:
            assert (result["state"][name] == by_rank[0]["state"][name]).all(), f"{case}: {name} differs among ranks"
        error = (by_rank[0]["state"][name].double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
        assert error <= tolerance, f"{case}: {name} is {error:.1e} off"
    assert all((result["dead"] == single_process["dead"]).all() for result in by_rank), case
    atol = 1e-7 if tolerance > 1e-9 else 1e-12
    for expected, *rank_values in zip(single_process["shown"], *(result["shown"] for result in by_rank), strict=True):
        for values in rank_values:
            torch.testing.assert_close(torch.stack(values), torch.stack(expected), rtol=100 * tolerance, atol=atol)


def _join_group_and_run(count: int, target: Callable[[int, str], None], rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    target(rank, folder)
    torch.distributed.destroy_process_group()
