"""The memory plan of writing activations to a cache, made before anything is loaded."""

from typing import Any

from metasae_lightning.memory.plan import available_by_device, check_and_print, check_limit, planned_language_model, process_item
from metasae_lightning.memory.table import MemoryPlan


def print_and_check_cache_plan(data: Any, trainer: Any, limit_gib: float | None = None) -> None:
    """Raise an `InputError` if the language model of `data` does not fit in memory, else print the plan to stderr.

    A cache needs nothing else: activations go to the disk after each forward pass. `limit_gib` replaces the available memory.
    """
    check_limit(limit_gib)
    items, unplanned = planned_language_model(data, trainer.strategy)
    plan = MemoryPlan((process_item(), *items), tuple(unplanned))
    check_and_print(plan, available_by_device(plan, trainer, limit_gib), trainer)
