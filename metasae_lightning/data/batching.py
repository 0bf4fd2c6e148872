"""Batch sizes, context sizes and storage types of an activation stream."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from metasae_lightning.corpora.tokenization import Exhausted
from metasae_lightning.errors import InputError

Storage = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Batching:
    """Settings that determine a sequence of batches, besides corpus, model and rank. `ActivationsDataModule` explains the fields."""

    batch_size: int
    context_size: int
    buffer_size: int
    held_out: float = 0.02
    prepend_bos: bool = True
    skip_positions: int = 0
    max_norm_ratio: float | None = None
    forward_batch: int = 32
    seed: int = 0
    exhausted: Exhausted = "epoch"
    cross_document_attention: bool = False
    buffer_dtype: Storage = "float32"

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("context_size", 2), ("forward_batch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.buffer_size < self.batch_size:
            raise InputError(f"buffer_size must hold a batch of {self.batch_size} tokens, got {self.buffer_size}")
        if not 0 <= self.skip_positions < self.context_size:
            raise InputError(f"skip_positions must be in [0, context_size={self.context_size}), got {self.skip_positions}")
        if self.max_norm_ratio is not None and self.max_norm_ratio <= 1:
            raise InputError(f"max_norm_ratio must be more than 1, since it is times the median norm, got {self.max_norm_ratio}")
        if not 0 <= self.held_out < 0.5:
            raise InputError(f"held_out must be in [0, 0.5): that share is validation and as much again is test, got {self.held_out}")
        if self.buffer_dtype not in get_args(Storage):
            raise InputError(f"buffer_dtype must be one of {', '.join(get_args(Storage))}, got {self.buffer_dtype}")

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the buffer."""
        return getattr(torch, self.buffer_dtype)

    @property
    def block(self) -> int:
        """Rows in a shuffled block: a whole number of batches."""
        return self.buffer_size // self.batch_size * self.batch_size
