"""The base class of streams of batches, whose position can be saved and restored after any batch."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metasae_lightning.corpora.prefetch import Producer
from metasae_lightning.data.batching import Batching, StreamSlice
from metasae_lightning.data.masks import within_norm
from metasae_lightning.data.shuffle import BatchMove, batch_moves, permutation
from metasae_lightning.data.work_times import StreamTimes
from metasae_lightning.errors import InputError
from metasae_lightning.step import Batch, Contexts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedBatch:
    """A batch that the caller has not received yet."""

    batch: Batch
    """The batch."""
    next_position: dict[str, Any]
    """The position of the stream after this batch."""
    ready: Any = None
    """The CUDA event to wait for before the batch is read, where it was made on another CUDA stream; else None."""


class Stream(ABC):
    """An iterator over one rank's batches, whose position can be saved. The stream's arguments determine the batches.

    The position is a dictionary that checkpoints hold:

    - `batches`: number of batches that the caller has received.
    - `origin`: number of batches received when the number of ranks last changed; 0 in a run that never changed it.
    - `base`: position in the data at which reading began after that change; None is the beginning.
    - `cursor`: position in the data from which the rows of the next batches are read again.
    - `reached`: position in the data after everything that was read.

    Batches that were prepared and not received are not part of the position: a restored stream prepares them again, unless the state
    contains them as `shelf` (see `ActivationStream`).

    Args:
        batching: Settings of the batches.
        part: The part of the data that this rank reads.
        prefetch: Number of batches that a thread prepares ahead, where `part` leaves it open.
    """

    times: StreamTimes | None = None
    """When a language model runs and the stream waits for text; None where no model runs."""

    def __init__(self, batching: Batching, part: StreamSlice, *, prefetch: int = 0):
        if part.tokens < batching.batch_size:
            raise InputError(f"tokens must fill a batch of {batching.batch_size}, got {part.tokens} a rank for {part.split}")
        self.batching, self.part = batching, part
        self.prefetch = prefetch if part.prefetch is None else part.prefetch
        self._start: dict[str, Any] = {"batches": 0, "origin": 0, "base": None, "cursor": None, "reached": None}
        self._position = self._start
        self._source: Producer[PreparedBatch] | Generator[PreparedBatch, None, None] | None = None
        self._length: int | None = None

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """All settings that determine the batches. A checkpoint is resumed only with the same, except for the number of ranks.

        Another number of ranks goes to `load_other_world_size`.
        """

    @abstractmethod
    def _batches(self, position: dict[str, Any]) -> Generator[PreparedBatch, None, None]:
        """Every batch after a position."""

    @abstractmethod
    def _available(self, base: dict[str, Any] | None) -> int:
        """Number of rows from `base` to the end of the data, at most the budget of tokens; the smallest number of any rank."""

    def __len__(self) -> int:
        """Number of whole batches in the budget of tokens, or in the data if `exhausted` is `end` and the data end first.

        With `exhausted` of `end`, the first call counts the rows, which may read the corpus.
        """
        if self._length is None:
            self._length = self.part.tokens // self.batching.batch_size
            if self.batching.exhausted == "end":
                available = self._position["origin"] + self._available(self._position["base"]) // self.batching.batch_size
                if available < self._length:
                    log.warning("the %s split ends after %d of %d batches", self.part.split, available, self._length)
                if not available:
                    raise InputError(f"corpus: the {self.part.split} split does not fill one batch of {self.batching.batch_size} tokens")
                self._length = min(self._length, available)
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        # Every validation and test reads the same tokens, also after one that was stopped early.
        if self.part.split != "train" or self._position["batches"] >= len(self):
            self._position = self._start
        source = self._batches(self._position)
        self._source = source = Producer(source, ahead=self.prefetch, name=f"the {self.part.split} stream") if self.prefetch else source
        try:
            for prepared in source:
                if prepared.ready is not None:
                    cuda_stream = torch.cuda.current_stream(prepared.batch.activations.device)
                    cuda_stream.wait_event(prepared.ready)
                    prepared.batch.activations.record_stream(cuda_stream)
                self._position = prepared.next_position
                yield prepared.batch
            self._position = self._start
        finally:
            source.close()
            self._source = None

    def close(self) -> None:
        """Stop reading, and stop the thread that prepares batches."""
        if self._source is not None:
            self._source.close()

    def state_dict(self) -> dict[str, Any]:
        """The position, the description of this stream, and its number of batches."""
        return {**self._position, "stream": self.description(), "length": len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of a stream that had the same description.

        Another description is refused, and another length where rows would come twice. A stream at its end goes on if it is longer now.
        Where it ended inside a block, it goes on after the data that it has read, with a warning: a longer stream would have shuffled the
        rows of that block with others.
        """
        self._check_description(state)
        self._position = {key: value for key, value in state.items() if key not in ("stream", "length")}
        self._length = None
        if len(self) != state["length"]:
            self._position.pop("shelf", None)  # a saved buffer does not have the rows of a longer stream
        if len(self) > state["batches"] == state["length"] and self._rows_in_block(state):
            log.warning(
                "the stream goes on after its last block of %d rows, which were shuffled among each other", self._rows_in_block(state)
            )
            base = self._base_after(state["reached"])
            self._position |= {"origin": state["batches"], "base": base, "cursor": None}
            self._length = None
        else:
            self._check_length(state)

    @abstractmethod
    def load_other_world_size(self, states: list[dict[str, Any]]) -> None:
        """Continue from states of a run with another number of ranks, after all data that any rank has read; warn that batches differ."""

    @abstractmethod
    def _base_after(self, reached: Any) -> Any:
        """The `base` of a stream that goes on after everything that was read up to `reached`."""

    def _rows_in_block(self, state: dict[str, Any]) -> int:
        """Number of rows of the block that the state is in, up to the state; 0 between two blocks."""
        return (state["batches"] - state["origin"]) * self.batching.batch_size % self.batching.block_size

    def _check_description(self, state: dict[str, Any], ignored: tuple[str, ...] = ()) -> None:
        """Refuse a state of a stream whose description differs, except in the `ignored` keys."""
        # Streams of versions before `order` existed were shuffled.
        now, then = self.description(), {"order": "shuffled", **state["stream"]}
        differing = [f"{key}: {then.get(key)} then, {now[key]} now" for key in now if key not in ignored and now[key] != then.get(key)]
        if differing:
            raise InputError(f"the checkpoint's data cannot be continued with other arguments ({'; '.join(differing)})")

    def _check_length(self, state: dict[str, Any]) -> None:
        """Refuse another budget where the state is in the last block and that block is not full.

        The rows of that block are shuffled among each other. With another budget, the block would have other rows, and some rows would come
        twice.
        """
        size, block, length = self.batching.batch_size, self.batching.block_size, state["length"]
        total, done = (length - state["origin"]) * size, (state["batches"] - state["origin"]) * size
        if done % block and done // block == total // block and length != len(self):
            raise InputError(
                f"tokens: the checkpoint stands in the last {total % block:,} of its budget, which are shuffled as such: "
                f"it goes on to {length * size:,} a rank, got {len(self) * size:,}"
            )

    def _moves(self, position: dict[str, Any], start: int) -> tuple[int, Iterator[BatchMove]]:
        """The number of the first row to read in order to make batch `start`, and the shuffle's moves (one a batch) from there.

        Both begin at the block in which batch `start` begins, so the first moves may belong to earlier batches. Batches and rows are
        counted from the origin of `position`.
        """
        size, block_size, part = self.batching.batch_size, self.batching.block_size, self.part
        total = (len(self) - position["origin"]) * size
        first_block = start * size // block_size
        key = f"{self.batching.seed}/{part.split}/{part.rank}/{part.world_size}/{position['origin']}"

        def order(block: int, length: int) -> Int[Tensor, " row"]:
            return permutation(f"{key}/{block}", length)

        return first_block * block_size, batch_moves(block_size, total, first_block=first_block, batch_size=size, order=order)

    def _batch(self, rows: Float[Tensor, "row d_model"], hooks: dict[str, int], contexts: Contexts | None = None) -> Batch:
        """A float32 batch of these rows of `contexts`, without attention sinks: rows whose norm is too large at any hook.

        The limit is `max_norm_ratio` times the median norm at that hook; None keeps all rows. Dropped rows are not replaced, so
        the rows of later batches do not depend on norms.
        """
        batch = Batch(rows.float(), hooks, contexts=contexts)
        if self.batching.max_norm_ratio is None:
            return batch
        masks = [within_norm(batch.select_hook(hook).activations, self.batching.max_norm_ratio) for hook in hooks]
        keep = torch.stack(masks).all(0)
        contexts = contexts and replace(contexts, positions=contexts.positions[keep.cpu()])
        return Batch(batch.activations[keep], hooks, contexts=contexts)


class Batches:
    """A stream as Lightning's loop sees it, without a state of its own.

    Lightning saves the state of a loader in the checkpoint. The data module already saves the state of the stream.
    """

    def __init__(self, stream: Stream):
        self._stream = stream

    @property
    def times(self) -> StreamTimes | None:
        """When the stream's language model runs and the stream waits for text; None where no model runs."""
        return self._stream.times

    def __len__(self) -> int:
        return len(self._stream)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._stream)

    def state_dict(self) -> dict[str, Any]:
        """An empty state. Lightning resumes within an epoch only if the loader has this method."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore the state: the data module restores the stream."""
