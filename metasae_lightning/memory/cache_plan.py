"""The memory plan of writing activations to a cache, made before anything is loaded."""

from typing import Any

from metasae_lightning.errors import InputError
from metasae_lightning.memory.plan import available_by_device, check_and_print, language_model_items, process_item
from metasae_lightning.memory.table import MemoryPlan


def print_and_check_cache_plan(data: Any, trainer: Any, limit_gib: float | None = None) -> None:
    """Raise an `InputError` if the language model of `data` does not fit in memory, else print the plan to stderr.

    A cache needs nothing else: activations go to the disk after each forward pass. `limit_gib` replaces the available memory.
    """
    if limit_gib is not None and limit_gib <= 0:
        raise InputError(f"memory_gib must be more than 0, or null for what is free, got {limit_gib}")
    items, unplanned = list[Any](), list[str]()
    try:
        items += language_model_items(None, data, trainer.strategy)
    except InputError:
        raise
    # A failed plan is no reason not to write a cache.
    except Exception as error:
        unplanned.append(f"language model ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
    plan = MemoryPlan((process_item(), *items), tuple(unplanned))
    check_and_print(plan, available_by_device(plan, trainer, limit_gib), trainer)
