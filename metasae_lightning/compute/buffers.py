"""Buffers for the large matrices of a training step, reused at the next step."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from metasae_lightning.compute.row_chunks import is_blocked


class BufferPool:
    """Uninitialised buffers by name, for a CPU.

    On a CPU, allocating a large matrix costs more than the arithmetic on it, because the system maps it page by page. On a GPU, torch's
    allocator reuses memory itself, so the pool holds no buffers there.

    A buffer contains whatever was last written to it. A result in a buffer is valid until the next `get` of its name, which returns the
    same memory if shape and data type are the same.

    Args:
        per_shape: Keep one buffer for each pair of name and shape; False keeps one for each name, of the shape that was last asked for.
    """

    def __init__(self, *, per_shape: bool = False) -> None:
        self._per_shape = per_shape
        self._buffers: dict[Any, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_buffers": {}, "_per_shape": self._per_shape}

    def get(self, name: str, shape: Iterable[int], like: Tensor) -> Tensor | None:
        """The buffer of that name and shape, with the data type of `like`; None on a GPU and in inference mode."""
        # A tensor that is allocated in inference mode cannot be written to outside it.
        if not is_blocked(like) or torch.is_inference_mode_enabled():
            return None
        shape = tuple(shape)
        key = (name, shape) if self._per_shape else name
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != shape or buffer.dtype != like.dtype:
            buffer = self._buffers[key] = like.new_empty(shape)
        return buffer

    def clear(self) -> None:
        """Free all buffers. Results that are still in use keep their memory."""
        self._buffers.clear()


SHARED = BufferPool(per_shape=True)
"""The process's buffers for results that are consumed within one step. SAEs share them, because they take their steps in turn."""


def buffer_or_new(pool: BufferPool | None, name: str, shape: Iterable[int], like: Tensor) -> Tensor:
    """An uninitialised matrix to write to: a buffer of the pool, or a new tensor if there is no pool or the pool gives none."""
    buffer = None if pool is None else pool.get(name, shape, like)
    return like.new_empty(tuple(shape)) if buffer is None else buffer
