"""The memory of objectives that run the language model of the data."""

from collections.abc import Iterator
from typing import Any

from metasae_lightning.memory import measure
from metasae_lightning.memory.table import MemoryItem
from metasae_lightning.objectives import Objective
from metasae_lightning.training.joint import JointSAE
from metasae_lightning.training.side_by_side import SideBySide


def objectives_of(saes: JointSAE | SideBySide | None) -> list[Objective]:
    """The objectives of all arms that have one."""
    arms = [] if saes is None else [saes] if isinstance(saes, JointSAE) else list(saes.arms.values())
    return [arm.objective for arm in arms if arm.objective is not None]


def objective_items(
    objectives: list[Objective], data: Any, device: str, *, positions: int, separate_documents: bool
) -> Iterator[MemoryItem]:
    """One memory item, for the passes of the largest objective; objectives run one at a time."""
    peaks = [
        (measure.measure_objective(objective, data.language_model, positions, separate_documents=separate_documents), objective)
        for objective in objectives
    ]
    if peaks:
        peak, objective = max(peaks, key=lambda pair: pair[0].bytes)
        size = f"{objective.contexts_at_once} contexts of {positions} tokens, clean and spliced, with the logits"
        small_bytes = peak.small_bytes if device == "cpu" else 0
        remedy = "lower objective.contexts_at_once"
        yield MemoryItem("its passes for the objective", device, peak.bytes, size, remedy, "batch", small_bytes=small_bytes)
