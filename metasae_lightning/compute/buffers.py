"""Room for the large matrices of a step, kept from one step to the next."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from metasae_lightning.compute.row_chunks import cached


class Memory:
    """Matrices by name. On a CPU a large one that is new comes from the system page by page, for more than the sums in it cost.

    What is taken holds what was last written to it, and is only lent: the next to ask for that name writes over it. A GPU's memory torch
    keeps itself, so there is none of it here.

    Args:
        shapes: Whether a name has a matrix of each shape that it was asked for, or the last one's.
    """

    def __init__(self, *, shapes: bool = False) -> None:
        self._shapes = shapes
        self._held: dict[Any, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_held": {}, "_shapes": self._shapes}

    def take(self, name: str, shape: Iterable[int], like: Tensor) -> Tensor | None:
        """A matrix of that shape; none where there is nothing to be gained."""
        if not cached(like) or torch.is_inference_mode_enabled():  # what is made there cannot be written to later
            return None
        shape = tuple(shape)
        key = (name, shape) if self._shapes else name
        held = self._held.get(key)
        if held is None or held.shape != shape or held.dtype != like.dtype:
            held = self._held[key] = like.new_empty(shape)
        return held


# For what is used up before anybody else can ask: one room for all SAEs of a process, which take their steps one after the other.
LENT = Memory(shapes=True)


def room(memory: Memory | None, name: str, shape: Iterable[int], like: Tensor) -> Tensor:
    """A matrix to write to: of that memory, or new."""
    taken = None if memory is None else memory.take(name, shape, like)
    return like.new_empty(tuple(shape)) if taken is None else taken
