"""Tokens to activations to shuffled batches, as one iterator that can be saved and restored anywhere."""

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
    """A batch on its way to the caller."""

    batch: Batch
    """The batch."""
    after: dict[str, Any]
    """What to save to go on behind it."""
    ready: Any = None
    """The CUDA event after which it may be read, where it was made on a stream of its own."""


class Stream(ABC):
    """Batches that are a function of the arguments, and the place among them.

    Its state names a batch and where to read on for it; finished batches that nobody has taken yet are made again.
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
        """Everything that the batches are a function of."""

    @abstractmethod
    def _batches(self, place: dict[str, Any]) -> Generator[Handed, None, None]:
        """Every batch from a place on."""

    @abstractmethod
    def _available(self, base: dict[str, Any] | None) -> int:
        """How many rows there are before the corpus is exhausted, counted from `base`, up to the budget; the same on every rank."""

    def __len__(self) -> int:
        """How many whole batches the budget holds, or the corpus where it ends first and nothing follows."""
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
        # A held-out pass that was cut short must not make the next one see other tokens.
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
        """End what is being read and made ahead."""
        if self._making is not None:
            self._making.close()

    def state_dict(self) -> dict[str, Any]:
        """The place among the batches, and of which stream."""
        return {**self._place, "stream": self.identity(), "length": len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stream of the same identity stood."""
        self._check(state)
        self._place = {key: value for key, value in state.items() if key not in ("stream", "length")}
        self._length = None
        self._check_length(state)

    @abstractmethod
    def load_elsewhere(self, states: list[dict[str, Any]]) -> None:
        """Go on where another number of ranks stood, behind everything that any of them has read; says what is not the same."""

    def _check(self, state: dict[str, Any], but: tuple[str, ...] = ()) -> None:
        own, other = self.identity(), state["stream"]
        differing = [
            f"{key}: {other.get(key)} then, {own.get(key)} now" for key in own if key not in but and own.get(key) != other.get(key)
        ]
        if differing:
            raise InputError(f"the checkpoint's data cannot be continued with other arguments ({'; '.join(differing)})")

    def _check_length(self, state: dict[str, Any]) -> None:
        """The last, shorter block is shuffled as such: inside it, a run of another length would hand out other rows, and some twice."""
        size, block, length = self.batching.batch_size, self.batching.block, state["length"]
        total, done = (length - state["origin"]) * size, (state["batches"] - state["origin"]) * size
        if done % block and done // block == total // block and length != len(self):
            raise InputError(
                f"tokens: the checkpoint stands in the last {total % block:,} of its budget, which are shuffled as such: "
                f"it goes on to {length * size:,} a rank, got {len(self) * size:,}"
            )

    def _turns(self, place: dict[str, Any], start: int) -> tuple[int, Iterator[Turn]]:
        """The number of the first row to be read, and the moves from its block on, for batch `start` since the origin."""
        size, block = self.batching.batch_size, self.batching.block
        total = (len(self) - place["origin"]) * size
        first = start * size // block
        key = f"{self.batching.seed}/{self.split}/{self.rank}/{self.world_size}/{place['origin']}"
        return first * block, turns(block, total, first=first, batch=size, order=lambda at, length: permutation(f"{key}/{at}", length))

    def _batch(self, rows: Float[Tensor, "row d_model"], hooks: dict[str, int]) -> Batch:
        """A batch without its sinks: it gets shorter, so that which rows come next does not depend on norms."""
        batch = Batch(rows.float(), hooks)
        if self.batching.max_norm_ratio is None:
            return batch
        kept = [ordinary(batch.select_hook(hook).activations, self.batching.max_norm_ratio) for hook in hooks]
        return Batch(batch.activations[torch.stack(kept).all(0)], hooks)


class Batches:
    """A stream to Lightning's loop, which would keep its state a second time: the data module's is the one that counts."""

    def __init__(self, stream: Stream):
        self._stream = stream

    def __len__(self) -> int:
        return len(self._stream)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._stream)

    def state_dict(self) -> dict[str, Any]:
        """Nothing; that there is one tells Lightning that a run can be gone on with in its middle."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See above."""
