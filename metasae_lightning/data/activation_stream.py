"""The stream of a language model: text to tokens to activations to shuffled batches."""

import contextlib
import logging
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning.compute.transfers import copy_to
from metasae_lightning.corpora.base import Corpus
from metasae_lightning.corpora.prefetch import Producer
from metasae_lightning.corpora.tokenization import TokenizedDocuments
from metasae_lightning.data.batching import Batching, StreamSlice
from metasae_lightning.data.forward_passes import RowReader
from metasae_lightning.data.shuffle import BatchMove
from metasae_lightning.data.stream import PreparedBatch, Stream
from metasae_lightning.data.work_times import StreamTimes
from metasae_lightning.lm.base import LanguageModel
from metasae_lightning.step import Batch

log = logging.getLogger(__name__)


@final
class ActivationStream(Stream):
    """Shuffled batches of a language model's activations on a corpus.

    Each document of the split goes to one rank, which tokenises its documents, separates them by EOS and packs them into contexts. With
    `prepend_bos`, each context begins with BOS. The model sees the special tokens; the batches leave them out. The activations of one
    forward pass at a time enter a buffer, and leave it in the order of `shuffle.batch_moves`. To recompute the buffer, a resumed run runs
    the model again on the tokens of at most two buffers.

    Args:
        corpus: The text.
        language_model: The model and its hooks.
        batching: Settings of the batches.
        part: The part of the data that this rank reads. Its `prefetch` of None is 2 where the model or `home` is a GPU, and 0 on a CPU,
            where a thread would compete with the training for cores.
        buffer_device: `model` has the buffer on the model's device; `cpu` has it in main memory, pinned where there is a GPU.
        checkpoint_buffer: `tokens` saves the position from which the buffer's tokens are run again; `activations` saves the buffer.
        stall_seconds: Longest time to wait for the corpus, in seconds; None waits forever.
        home: The device of the batches; None is the model's. The thread copies each batch there once, in the buffer's dtype.
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
        self.home = home or language_model.device
        # `home` comes first: the event of a batch is recorded on its CUDA stream.
        self._gpus = [device for device in dict.fromkeys((self.home, language_model.device)) if device.type == "cuda"]
        super().__init__(batching, part, prefetch=2 if self._gpus else 0)
        self.corpus, self.language_model, self.stall_seconds = corpus, language_model, stall_seconds
        self.times = StreamTimes(language_model.device)
        self.buffer_on_model_device, self.saves_activations = buffer_device == "model", checkpoint_buffer == "activations"
        # The buffer, its reader and the last move, while batches are made.
        self._buffer_state: dict[str, Any] = {}

    def description(self) -> dict[str, Any]:
        """The settings of corpus, language model, batches and rank."""
        batching = {name: value for name, value in asdict(self.batching).items() if name != "batch_size"}
        model = {**self.language_model.description(), "hook": ", ".join(self.language_model.hooks)}
        return {
            "corpus": self.corpus.description(),
            **self.corpus.settings(),
            **model,
            "batch_size": self.batching.batch_size,
            **batching,
            **self.part.settings,
        }

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

    def load_other_world_size(self, states: list[dict[str, Any]]) -> None:
        """Continue from the states of a run with another number of ranks, after the last document that any of its ranks has read.

        No document is read twice. Earlier documents that another rank has not read, and rows that were in the buffers and in no batch, are
        left out. The batches differ from those of a run that never stopped.
        """
        for state in states:
            self._check_description(state, ignored=("rank", "world_size"))
        reached = [state["reached"] for state in states if state["reached"]]
        n_batches = states[0]["batches"] * len(states) // self.part.world_size
        base = None
        if reached:
            furthest = max(reached, key=lambda position: (position["epoch"], (position["reader"] or {"documents": 0})["documents"]))
            base = self._base_after(furthest)
            documents = (furthest["reader"] or {"documents": 0})["documents"]
            log.warning(
                "restored on %d ranks instead of %d: goes on at document %d of epoch %d; what the buffers held is left out, and batches "
                "are not those of a run that never stopped", self.part.world_size, len(states), documents, furthest["epoch"],
            )  # fmt: skip
        self._position = {"batches": n_batches, "origin": n_batches, "base": base, "cursor": None, "reached": base and base["place"]}
        self._length = None

    def _base_after(self, reached: dict[str, Any]) -> dict[str, Any]:
        """The position of the tokens at the beginning of the next document."""
        return {"place": reached, "taken": 0, "waiting": []}

    def _available(self, base: dict[str, Any] | None) -> int:
        """Number of rows from `base` to the end of the split, at most the budget of tokens; the smallest number of any rank.

        Before the run, this process reads the split once for each rank and tokenises the documents of that rank, up to the budget:
        schedules need the length of the run, and all ranks must end at the same step.
        """
        log.warning("counting the tokens of the %s split, which may end before the budget", self.part.split)
        counts: list[int] = []
        for rank in range(self.part.world_size):
            reader = self._reader(rank, {"tokens": base, "number": 0})
            counts.append(reader.count_rows(self.part.tokens))
            reader.close()
        return min(counts)

    def row_reader(self, state: dict[str, Any] | None = None) -> RowReader:
        """A reader of the rows of all batches, in the order of the corpus, from the `state` of another such reader or the beginning."""
        return self._reader(self.part.rank, state or {"tokens": None, "number": 0})

    def _reader(self, rank: int, cursor: dict[str, Any], first_row: int = 0) -> RowReader:
        batching = self.batching
        documents = TokenizedDocuments(
            self.corpus,
            self.language_model.tokenizer,
            self.part.split,
            batching.held_out,
            batching.seed,
            rank,
            self.part.world_size,
            batching.exhausted,
        )
        return RowReader(
            documents,
            self.language_model,
            batching,
            cursor=cursor,
            first_row=first_row,
            stall_seconds=self.stall_seconds,
            times=self.times,
        )

    def _batches(self, position: dict[str, Any]) -> Generator[PreparedBatch, None, None]:
        """Every batch after a position.

        With prefetching, batches for GPUs are made on CUDA streams of their own, so that they do not wait for training steps.
        """
        batches = self._make_batches(position)
        del position  # it may hold a saved buffer
        if not self._gpus or not self.prefetch:
            yield from batches
            return
        with contextlib.ExitStack() as stack:
            # A copy between two GPUs waits for the current streams of both: on the SAE's stream it would wait for the training steps.
            cuda_streams = {device: torch.cuda.Stream(device) for device in self._gpus}
            for device, cuda_stream in cuda_streams.items():
                cuda_stream.wait_stream(torch.cuda.current_stream(device))
                stack.enter_context(torch.cuda.stream(cuda_stream))
            yield from batches

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

    def _record_ready(self) -> Any:
        """An event after the last batch on the CUDA stream that makes it; None where that is no other stream than the caller's."""
        makes_ahead = self.prefetch and self.home.type == "cuda"
        return torch.cuda.current_stream(self.home).record_event() if makes_ahead else None

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
