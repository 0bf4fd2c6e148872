"""The base class of streams: an iterator of batches whose position can be saved and restored anywhere."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning.corpora.base import Split
from metasae_lightning.corpora.prefetch import Producer
from metasae_lightning.data.batching import Batching
from metasae_lightning.data.masks import ordinary
from metasae_lightning.data.shuffle import Turn, permutation, turns
from metasae_lightning.errors import InputError
from metasae_lightning.step import Batch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Handed:
    """A batch with the state after it."""

    batch: Batch
    """The batch."""
    after: dict[str, Any]
    """State to save in order to continue after it."""
    ready: Any = None
    """CUDA event after which the batch may be read, if another CUDA stream made it."""


class Stream(ABC):
    """Batches that are determined by the arguments, and a position among them.

    The state names a batch and the reading position for it. Batches that were made ahead but not used are made again.
    """

    def __init__(self, batching: Batching, *, split: Split, tokens: int, rank: int, world_size: int, prefetch: int):
        if world_size < 1 or not 0 <= rank < world_size:
            raise InputError(f"rank must be in [0, {world_size}), got {rank}")
        if tokens < batching.batch_size:
            raise InputError(f"tokens must fill a batch of {batching.batch_size}, got {tokens} a rank for {split}")
        self.batching, self.tokens, self.rank, self.world_size, self.prefetch = batching, tokens, rank, world_size, prefetch
        self.split: Split = split
        self._start: dict[str, Any] = {"batches": 0, "origin": 0, "base": None, "cursor": None, "reached": None}
        self._place = self._start
        self._making: Producer[Handed] | Generator[Handed, None, None] | None = None
        self._length: int | None = None

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything that determines the batches."""

    @abstractmethod
    def _batches(self, place: dict[str, Any]) -> Generator[Handed, None, None]:
        """All batches from a position on."""

    @abstractmethod
    def _available(self, base: dict[str, Any] | None) -> int:
        """Number of rows before the corpus is exhausted, counted from `base`, up to the budget; the same on every rank."""

    def __len__(self) -> int:
        """Number of whole batches in the budget, or in the corpus if it ends first."""
        if self._length is None:
            self._length = self.tokens // self.batching.batch_size
            if self.batching.exhausted == "end":
                held = self._place["origin"] + self._available(self._place["base"]) // self.batching.batch_size
                if held < self._length:
                    log.warning("the %s split ends after %d of %d batches", self.split, held, self._length)
                if not held:
                    raise InputError(f"corpus: the {self.split} split does not fill one batch of {self.batching.batch_size} tokens")
                self._length = min(self._length, held)
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        # A held-out pass that was cut short must not shift the next one.
        if self.split != "train" or self._place["batches"] >= len(self):
            self._place = self._start
        made = self._batches(self._place)
        self._making = made = Producer(made, ahead=self.prefetch, name=f"the {self.split} stream") if self.prefetch else made
        try:
            for handed in made:
                if handed.ready is not None:
                    here = torch.cuda.current_stream(handed.batch.activations.device)
                    here.wait_event(handed.ready)
                    handed.batch.activations.record_stream(here)
                self._place = handed.after
                yield handed.batch
            self._place = self._start
        finally:
            made.close()
            self._making = None

    def close(self) -> None:
        """Stop reading and making batches ahead."""
        if self._making is not None:
            self._making.close()

    def state_dict(self) -> dict[str, Any]:
        """The position among the batches, and a description of the stream."""
        return {**self._place, "stream": self.identity(), "length": len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of an equal stream."""
        self._check(state)
        self._place = {key: value for key, value in state.items() if key not in ("stream", "length")}
        self._length = None
        self._check_length(state)

    @abstractmethod
    def load_elsewhere(self, states: list[dict[str, Any]]) -> None:
        """Continue from states of another number of ranks, after everything that any of them has read, and warn about what differs."""

    def _check(self, state: dict[str, Any], but: tuple[str, ...] = ()) -> None:
        own, other = self.identity(), state["stream"]
        differing = [
            f"{key}: {other.get(key)} then, {own.get(key)} now" for key in own if key not in but and own.get(key) != other.get(key)
        ]
        if differing:
            raise InputError(f"the checkpoint's data cannot be continued with other arguments ({'; '.join(differing)})")

    def _check_length(self, state: dict[str, Any]) -> None:
        """Refuse a changed length inside the last, shorter block: its shuffle depends on its length, so rows would repeat."""
        size, block, length = self.batching.batch_size, self.batching.block, state["length"]
        total, done = (length - state["origin"]) * size, (state["batches"] - state["origin"]) * size
        if done % block and done // block == total // block and length != len(self):
            raise InputError(
                f"tokens: the checkpoint stands in the last {total % block:,} of its budget, which are shuffled as such: "
                f"it goes on to {length * size:,} a rank, got {len(self) * size:,}"
            )

    def _turns(self, place: dict[str, Any], start: int) -> tuple[int, Iterator[Turn]]:
        """Number of the first row to read, and the moves from its block on, for batch `start`."""
        size, block = self.batching.batch_size, self.batching.block
        total = (len(self) - place["origin"]) * size
        first = start * size // block
        key = f"{self.batching.seed}/{self.split}/{self.rank}/{self.world_size}/{place['origin']}"
        return first * block, turns(block, total, first=first, batch=size, order=lambda at, length: permutation(f"{key}/{at}", length))

    def _batch(self, rows: Float[Tensor, "row d_model"], hooks: dict[str, int]) -> Batch:
        """The batch without attention sinks. It gets shorter instead of refilled, so later rows do not depend on norms."""
        batch = Batch(rows.float(), hooks)
        if self.batching.max_norm_ratio is None:
            return batch
        kept = [ordinary(batch.select_hook(hook).activations, self.batching.max_norm_ratio) for hook in hooks]
        return Batch(batch.activations[torch.stack(kept).all(0)], hooks)


class Batches:
    """A stream as Lightning's loop sees it, without a state: the data module saves the state."""

    def __init__(self, stream: Stream):
        self._stream = stream

    def __len__(self) -> int:
        return len(self._stream)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._stream)

    def state_dict(self) -> dict[str, Any]:
        """Empty; its existence tells Lightning that the stream can resume in the middle of an epoch."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See above."""
