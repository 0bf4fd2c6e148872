"""The stream of a language model: text to tokens to activations to shuffled batches."""

import logging
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning.compute.transfers import copy_to
from metasae_lightning.corpora.base import Corpus
from metasae_lightning.corpora.prefetch import Producer
from metasae_lightning.data.batching import Batching, StreamSlice
from metasae_lightning.data.forward_passes import RowReader
from metasae_lightning.data.model_stream import ModelStream
from metasae_lightning.data.shuffle import BatchMove
from metasae_lightning.data.stream import PreparedBatch
from metasae_lightning.lm.base import LanguageModel
from metasae_lightning.step import Batch

log = logging.getLogger(__name__)


@final
class ActivationStream(ModelStream):
    """Shuffled batches of a language model's activations on a corpus.

    The activations of one forward pass at a time enter a buffer, and leave it in the order of `shuffle.batch_moves`. To recompute the
    buffer, a resumed run runs the model again on the tokens of at most two buffers.

    Args:
        corpus: The text.
        language_model: The model and its hooks.
        batching: Settings of the batches.
        part: The part of the data that this rank reads.
        buffer_device: `model` has the buffer on the model's device; `cpu` has it in main memory, pinned where there is a GPU.
        checkpoint_buffer: `tokens` saves the position from which the buffer's tokens are run again; `activations` saves the buffer.
        stall_seconds: Longest time to wait for the corpus, in seconds; None waits forever.
        home: The device of the batches; None is the model's.
    """

    def __init__(
        self,
        corpus: Corpus,
        language_model: LanguageModel,
        batching: Batching,
        part: StreamSlice,
        *,
        buffer_device: str = "model",
        checkpoint_buffer: str = "tokens",
        stall_seconds: float | None = None,
        home: torch.device | None = None,
    ):
        super().__init__(corpus, language_model, batching, part, stall_seconds=stall_seconds, home=home)
        self.buffer_on_model_device, self.saves_activations = buffer_device == "model", checkpoint_buffer == "activations"
        # The buffer, its reader and the last move, while batches are made.
        self._buffer_state: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Position, description and number of batches; with `checkpoint_buffer: activations` also the buffer and the prepared batches."""
        if not self.saves_activations:
            return super().state_dict()
        if not isinstance(self._source, Producer):
            return {**super().state_dict(), **self._buffer_state_dict([])}
        with self._source.paused() as waiting:
            return {**super().state_dict(), **self._buffer_state_dict([prepared.batch.activations for prepared in waiting])}

    def _buffer_state_dict(self, waiting: list[Tensor]) -> dict[str, Any]:
        """The buffer's rows, its reader's state and the `waiting` batches on the CPU; empty where no batch was made."""
        if not self._buffer_state:
            return {}
        move, reader, buffer = (self._buffer_state[name] for name in ("move", "reader", "buffer"))
        for device in self._gpus:
            torch.cuda.synchronize(device)  # the thread's CUDA stream may still be writing
        waiting = [activations.cpu() for activations in waiting]
        n_made = move.number + 1
        # The rows of the next batch's block, in the order of their numbers: the slots are not saved.
        slots = move.block_slots if n_made * self.batching.batch_size % self.batching.block_size else move.next_block_slots
        return {"shelf": {"waiting": waiting, "made": n_made, "buffer": buffer[slots.to(buffer.device)].cpu(), "rows": reader.state()}}

    def _count(self, reader: RowReader) -> int:
        """The rows that are left, up to the budget."""
        return reader.count_rows(self.part.tokens)

    def _make_batches(self, position: dict[str, Any]) -> Generator[PreparedBatch, None, None]:
        """Fill the buffer and yield its batches, from a position that may have a saved buffer and prepared batches as `shelf`."""
        saved: dict[str, Any] | None = position.get("shelf")
        position = {key: value for key, value in position.items() if key != "shelf"}
        start = saved["made"] if saved else position["batches"] - position["origin"]
        first_row, moves = self._moves(position, start)
        cursor = position["cursor"] or {"tokens": position["base"], "number": 0}
        part = self.part
        reader = self._reader(part.rank, saved["rows"]) if saved else self._reader(part.rank, cursor, first_row)
        try:
            total = (len(self) - position["origin"]) * self.batching.batch_size
            buffer = self._buffer(min(self.batching.block_size, total - first_row), saved)
            if saved is None:
                reader.fill(buffer, torch.arange(len(buffer)))
            else:
                waiting: list[Tensor] = saved["waiting"]
                for number, activations in enumerate(waiting, start - len(waiting) + 1):
                    batch = Batch(activations.to(self.home), self.language_model.widths)
                    yield PreparedBatch(batch, self._position_after(position, number, reader), self._record_ready())
            is_restored, saved = saved is not None, None  # frees the saved buffer, which was copied
            for move in _slots_on(buffer.device, moves):
                if is_restored and move.number < start:
                    continue  # the saved buffer is that after this move
                batch = ready = None
                if move.number >= start:
                    # The batch is complete, and marked as ready, before the pass that refills its slots: the SAE need not wait for it.
                    rows = copy_to(buffer.index_select(0, move.batch_slots), self.home)
                    batch, ready = self._batch(rows, self.language_model.widths), self._record_ready()
                reader.fill(buffer, move.refill_slots)
                self._buffer_state = {"move": move, "reader": reader, "buffer": buffer}
                if batch is not None:
                    yield PreparedBatch(batch, self._position_after(position, move.number + 1, reader), ready)
            reader.check_range()
        finally:
            self._buffer_state = {}
            reader.close()

    def _position_after(self, position: dict[str, Any], number: int, reader: RowReader) -> dict[str, Any]:
        """The position after `number` batches since the origin. The reader forgets the blocks before that position."""
        block = number * self.batching.batch_size // self.batching.block_size
        reader.forget_before(block)
        return {**position, "batches": position["origin"] + number, "cursor": reader.cursor(block), "reached": reader.reached}

    def _buffer(self, length: int, saved: dict[str, Any] | None) -> Float[Tensor, "slot d_model"]:
        """A new buffer of `length` rows, with the rows of the saved one where there is one."""
        model = self.language_model
        device = model.device if self.buffer_on_model_device else torch.device("cpu")
        pinned = not self.buffer_on_model_device and torch.cuda.is_available()
        buffer = torch.empty(length, model.d_model, dtype=self.batching.dtype, device=device, pin_memory=pinned)
        if saved is not None:
            buffer.copy_(saved["buffer"][:length])
        return buffer


def _slots_on(device: torch.device, moves: Iterable[BatchMove]) -> Iterator[BatchMove]:
    """The moves with the slots of batches on `device`. The slots of a whole block are copied together, not batch by batch."""
    if device.type == "cpu":
        yield from moves
        return
    for _, of_block in groupby(moves, lambda move: move.block):
        slots, begin = None, 0
        for move in of_block:
            slots = copy_to(move.next_block_slots, device) if slots is None else slots
            batch_slots = slots[begin : begin + len(move.batch_slots)]
            begin += len(batch_slots)
            yield replace(move, batch_slots=batch_slots, refill_slots=batch_slots[: len(move.refill_slots)])
