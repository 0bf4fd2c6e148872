"""Settings of an activation stream: its batches, and the part of the data that one rank reads."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from metasae_lightning.corpora.base import Split
from metasae_lightning.corpora.tokenization import Exhausted
from metasae_lightning.errors import InputError
from metasae_lightning.lm.base import LanguageModel

Storage = Literal["float32", "bfloat16", "float16"]
Order = Literal["shuffled", "contexts"]
"""Whether a batch has shuffled rows, or the rows of whole contexts in the order of the corpus."""


@dataclass(frozen=True)
class Batching:
    """Settings that determine a sequence of batches, together with the corpus, the language model and the `StreamSlice`.

    `ActivationsDataModule` has an argument for each field, and describes it.
    """

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
    order: Order = "shuffled"

    def __post_init__(self) -> None:
        for name, minimum in (("batch_size", 1), ("context_size", 2), ("forward_batch", 1)):
            if getattr(self, name) < minimum:
                raise InputError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        if self.order not in get_args(Order):
            raise InputError(f"order must be one of {', '.join(get_args(Order))}, got {self.order}")
        if self.order == "contexts" and self.batch_size % self.context_size:
            raise InputError(
                f"batch_size must be a multiple of context_size={self.context_size} where a batch is whole contexts, got {self.batch_size}"
            )
        if self.order == "shuffled" and self.buffer_size < self.batch_size:
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
        """The torch dtype of the shuffle buffer."""
        return getattr(torch, self.buffer_dtype)

    @property
    def block_size(self) -> int:
        """Number of rows that are shuffled among each other: the largest multiple of `batch_size` that fits in the buffer.

        A batch of whole contexts is not shuffled with others: it is a block of its own.
        """
        return self.batch_size if self.order == "contexts" else self.buffer_size // self.batch_size * self.batch_size

    @property
    def contexts_in_pass(self) -> int:
        """Number of contexts that are read together: a forward pass, or a batch of whole contexts."""
        return self.batch_size // self.context_size if self.order == "contexts" else self.forward_batch


@dataclass(frozen=True)
class StreamSlice:
    """The part of the data that one rank reads.

    Args:
        split: The split of the corpus.
        tokens: Budget of tokens, on this rank alone.
        rank: Index of this rank.
        world_size: Number of ranks that share the split.
        prefetch: Number of batches that a thread prepares ahead; 0 uses no thread, None lets the stream choose.
    """

    split: Split
    tokens: int
    rank: int = 0
    world_size: int = 1
    prefetch: int | None = None

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise InputError(f"rank must be in [0, {self.world_size}), got {self.rank}")

    @property
    def settings(self) -> dict[str, Any]:
        """The fields that determine which batches the rank reads, except for their number."""
        return {"split": self.split, "rank": self.rank, "world_size": self.world_size}


def check_numbers(batching: Batching, tokens: int, prefetch: int | None, stall_seconds: float, cache: str | None = None) -> None:
    """Refuse a training budget, `prefetch` or `stall_seconds` outside its range, and contexts out of a `cache`."""
    if cache is not None and batching.order == "contexts":
        raise InputError("order: contexts needs a language model that runs, and a cache has activations alone: set cache: null")
    if tokens < batching.batch_size:
        raise InputError(f"tokens must fill a batch of {batching.batch_size}, got {tokens}")
    if prefetch is not None and prefetch < 0:
        raise InputError(f"prefetch must be at least 0, got {prefetch}")
    if stall_seconds <= 0:
        raise InputError(f"stall_seconds must be more than 0, got {stall_seconds}")


def cautions(batching: Batching, language_model: LanguageModel) -> Iterator[str]:
    """Texts of warnings: the loaded model attends across documents that should be kept apart, or no documents are held out."""
    name, has_eos = language_model.name, language_model.tokenizer.eos_token_id is not None
    if not (batching.cross_document_attention or (has_eos and language_model.can_separate_documents(batching.context_size))):
        reason = "" if has_eos else ", since its tokenizer has no EOS to end documents with"
        yield (
            f"{name} cannot be kept from attending across the documents of a context{reason}: it does "
            "(cross_document_attention: true says that this is meant)"
        )
    if not batching.held_out:
        yield "held_out: 0 holds nothing out: no validation, and what is exported is not checked on fresh activations"
