"""The memory plan of an evaluation, made before the language model is loaded."""

import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from metasae_lightning.memory.measure import module_bytes
from metasae_lightning.memory.plan import available_by_device, check_and_print, check_limit, planned_language_model, process_item
from metasae_lightning.memory.table import MemoryItem, MemoryPlan
from metasae_lightning.metrics.cofiring import Phi
from metasae_lightning.metrics.decomposition import Decomposition
from metasae_lightning.metrics.firings import PAIR_BYTES


def print_and_check_evaluation_plan(
    saes: Sequence[Any],
    data: Any,
    *,
    pairs_gib: float,
    critics: bool,
    splices: bool,
    limit_gib: float | None,
    by_polarity: bool = False,
) -> None:
    """Raise an `InputError` if an evaluation of SAEs on `data` needs more than the available memory, else print its plan to stderr.

    The memory for pairs of latents is an upper bound. Memory that depends on firings or on the vocabulary is listed as not planned.

    Args:
        saes: The SAEs, on the CPU.
        data: The data module; its language model is not loaded.
        pairs_gib: Memory for counting pairs of latents, in GiB.
        critics: Whether fresh meta SAEs are trained on the decoder.
        splices: Whether the complete language model is loaded to measure losses.
        limit_gib: Memory limit in GiB, in place of the available memory of each device.
        by_polarity: Whether pairs of signs are counted, of which each latent has two.
    """
    check_limit(limit_gib)
    model = getattr(data, "language_model", None)
    device = torch.device("cpu") if model is None else model.device
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=device), is_global_zero=True)
    items, unplanned = planned_language_model(data, trainer.strategy)
    unplanned.append("the firings of the SAEs")
    if splices and model is not None:
        unplanned.append("the language model with all layers, and its predictions")
    items += measure_items(saes, str(device), pairs_gib, critics, by_polarity=by_polarity)
    process = process_item(sum(map(module_bytes, saes)))
    plan = MemoryPlan((process, *items), tuple(unplanned))
    check_and_print(plan, available_by_device(plan, trainer, limit_gib), trainer)


def measure_items(saes: Sequence[Any], device: str, pairs_gib: float, critics: bool, *, by_polarity: bool = False) -> Iterator[MemoryItem]:
    """Memory of all SAEs, and for the largest, of the counts of pairs of latents and of a critic: SAEs are measured one at a time."""
    widest = max(saes, key=lambda sae: sae.W_dec.numel())
    d_sae, d_in = widest.W_dec.shape
    names = f"{len(saes)}, the widest with {d_sae:,} latents of {d_in} numbers"
    yield MemoryItem("SAEs", device, sum(map(module_bytes, saes)), names, "fewer SAEs at once")
    units = 2 * d_sae if by_polarity else d_sae
    rows = Phi(units, memory_gib=pairs_gib).rows
    size = f"at most, {rows:,} of {units:,} {'signs of latents' if by_polarity else 'latents'} with all others at a time"
    yield MemoryItem("pairs of latents", device, rows * units * PAIR_BYTES, size, "lower pairs_gib", phase="pairs")
    if critics:
        metric = Decomposition()
        latents = max(metric.k, math.ceil(metric.share * d_sae))
        # The decoder's unit rows and two nulls; weights, gradients and Adam's two moments of a critic.
        numbers = 3 * d_sae * d_in + 4 * (2 * latents * d_in + latents + d_in)
        size = f"the decoder, its nulls, and a meta SAE of {latents:,} latents in training"
        yield MemoryItem("a critic", device, numbers * 4, size, "critic_seeds: 0", phase="critics")
