"""The stream of a language model's activations, as shuffled batches."""

import contextlib
import logging
from collections.abc import Generator
from dataclasses import asdict, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning.corpora.base import Corpus, Split
from metasae_lightning.corpora.prefetch import Producer
from metasae_lightning.corpora.tokenization import TokenizedDocuments
from metasae_lightning.data.batching import Batching
from metasae_lightning.data.forward_passes import Rows
from metasae_lightning.data.stream import Handed, Stream
from metasae_lightning.lm.base import LanguageModel
from metasae_lightning.step import Batch

log = logging.getLogger(__name__)


@final
class ActivationStream(Stream):
    """Shuffled batches of a language model's activations on a corpus.

    Ranks take the documents of a split in turn. Documents are tokenized, separated by EOS and packed into contexts that begin with BOS.
    The model reads special tokens; batches do not contain them. Activations are numbered in reading order and leave in the order of
    `shuffle.turns`. Memory is one buffer and one forward pass. The buffer can be recomputed from two buffers of tokens.

    Args:
        prefetch: Batches that a thread makes ahead; by default 2 if the model or `home` is a GPU, else 0.
        buffer_device: Device of the buffer: that of the `model`, or `cpu`, in pinned memory if there is a GPU.
        checkpoint_buffer: What a saved state holds: the position of the buffer's `tokens`, or its `activations`.
        stall_seconds: Longest wait for a corpus that yields nothing.
        home: Device of the batches; by default the model's. The thread moves rows there once, in the buffer's type.
    """

    def __init__(
        self,
        corpus: Corpus,
        language_model: LanguageModel,
        batching: Batching,
        *,
        tokens: int,
        split: Split = "train",
        rank: int = 0,
        world_size: int = 1,
        prefetch: int | None = None,
        buffer_device: str = "model",
        checkpoint_buffer: str = "tokens",
        stall_seconds: float | None = None,
        home: torch.device | None = None,
    ):
        self.home = home or language_model.device
        # The device of the batches comes first: a batch is ready on its CUDA stream.
        self._gpus = [device for device in dict.fromkeys((self.home, language_model.device)) if device.type == "cuda"]
        ahead = (2 if self._gpus else 0) if prefetch is None else prefetch
        super().__init__(batching, split=split, tokens=tokens, rank=rank, world_size=world_size, prefetch=ahead)
        self.corpus, self.language_model, self.stall_seconds = corpus, language_model, stall_seconds
        self.on_model, self.with_activations = buffer_device == "model", checkpoint_buffer == "activations"
        self._shelf: dict[str, Any] = {}

    def identity(self) -> dict[str, Any]:
        """See the base."""
        batching = {name: value for name, value in asdict(self.batching).items() if name != "batch_size"}
        place = {"split": self.split, "rank": self.rank, "world_size": self.world_size}
        model = {**self.language_model.description(), "hook": ", ".join(self.language_model.hooks)}
        return {
            "corpus": self.corpus.description(),
            **self.corpus.settings(),
            **model,
            "batch_size": self.batching.batch_size,
            **batching,
            **place,
        }

    def state_dict(self) -> dict[str, Any]:
        """The state of the base class; with `checkpoint_buffer: activations` also the buffer's rows and waiting batches."""
        if not self.with_activations:
            return super().state_dict()
        if not isinstance(self._making, Producer):
            return {**super().state_dict(), **self._saved([])}
        with self._making.paused() as waiting:
            return {**super().state_dict(), **self._saved([handed.batch.activations for handed in waiting])}

    def _saved(self, waiting: list[Tensor]) -> dict[str, Any]:
        if not self._shelf:
            return {}
        turn, rows, buffer = (self._shelf[name] for name in ("turn", "rows", "buffer"))
        for device in self._gpus:
            torch.cuda.synchronize(device)  # another CUDA stream may still be writing
        waiting = [rows.cpu() for rows in waiting]
        made = turn.number + 1
        # Rows by their number within the next batch's block; slot numbers are not portable.
        slots = turn.base if made * self.batching.batch_size % self.batching.block else turn.after
        shelf = {"waiting": waiting, "made": made, "buffer": buffer[slots.to(buffer.device)].cpu(), "rows": rows.state()}
        return {"shelf": shelf}

    def load_elsewhere(self, states: list[dict[str, Any]]) -> None:
        """Continue from a state of another number of ranks, after the last document that any of them has read.

        No document is read twice. Rows that waited in their buffers are dropped. Batches differ from those of the old number of ranks.
        """
        for state in states:
            self._check(state, but=("rank", "world_size"))
        reached = [state["reached"] for state in states if state["reached"]]
        given = states[0]["batches"] * len(states) // self.world_size
        base = None
        if reached:
            furthest = max(reached, key=lambda place: (place["epoch"], (place["reader"] or {"documents": 0})["documents"]))
            base = {"place": furthest, "taken": 0, "waiting": []}
            documents = (furthest["reader"] or {"documents": 0})["documents"]
            log.warning(
                "restored on %d ranks instead of %d: goes on at document %d of epoch %d; what the buffers held is left out, and batches "
                "are not those of a run that never stopped", self.world_size, len(states), documents, furthest["epoch"],
            )  # fmt: skip
        self._place = {"batches": given, "origin": given, "base": base, "cursor": None, "reached": base and base["place"]}
        self._length = None

    def _available(self, base: dict[str, Any] | None) -> int:
        """Number of rows, counted by tokenizing everything once before the run: schedules need the length, and ranks must end together."""
        log.warning("counting the tokens of the %s split, which may end before the budget", self.split)
        counts: list[int] = []
        for rank in range(self.world_size):
            rows = self._rows(rank, {"tokens": base, "number": 0})
            counts.append(rows.count(self.tokens))
            rows.close()
        return min(counts)

    def rows(self, cursor: dict[str, Any] | None = None) -> Rows:
        """The rows of the stream in the order of the corpus, from a position on."""
        return self._rows(self.rank, cursor or {"tokens": None, "number": 0})

    def _rows(self, rank: int, cursor: dict[str, Any], first: int = 0) -> Rows:
        batching = self.batching
        documents = TokenizedDocuments(
            self.corpus,
            self.language_model.tokenizer,
            self.split,
            batching.held_out,
            batching.seed,
            rank,
            self.world_size,
            batching.exhausted,
        )
        return Rows(documents, self.language_model, batching, cursor=cursor, first=first, stall_seconds=self.stall_seconds)

    def _batches(self, place: dict[str, Any]) -> Generator[Handed, None, None]:
        made = self._made(place)
        del place  # the state may hold a buffer
        if not self._gpus or not self.prefetch:
            yield from made
            return
        with contextlib.ExitStack() as beside:
            # A copy between two GPUs waits for the current streams of both; on the SAE's own stream it would wait for training steps.
            sides = {device: torch.cuda.Stream(device) for device in self._gpus}
            for device, side in sides.items():
                side.wait_stream(torch.cuda.current_stream(device))
                beside.enter_context(torch.cuda.stream(side))
            for handed in made:
                yield replace(handed, ready=sides[self.home].record_event() if self.home in sides else None)

    def _made(self, place: dict[str, Any]) -> Generator[Handed, None, None]:
        shelf: dict[str, Any] | None = place.get("shelf")
        place = {key: value for key, value in place.items() if key != "shelf"}
        start = shelf["made"] if shelf else place["batches"] - place["origin"]
        first, moves = self._turns(place, start)
        beginning = place["cursor"] or {"tokens": place["base"], "number": 0}
        rows = self._rows(self.rank, shelf["rows"]) if shelf else self._rows(self.rank, beginning, first)
        try:
            total = (len(self) - place["origin"]) * self.batching.batch_size
            buffer = self._buffer(min(self.batching.block, total - first), shelf)
            if shelf is None:
                rows.fill(buffer, torch.arange(len(buffer)))
            else:
                waiting: list[Tensor] = shelf["waiting"]
                for number, batch in enumerate(waiting, start - len(waiting) + 1):
                    yield Handed(Batch(batch.to(self.home), self.language_model.widths), self._after(place, number, rows))
            restored, shelf = shelf is not None, None  # the rows are in the buffer now
            for turn in moves:
                if restored and turn.number < start:
                    continue  # the saved buffer already contains that move
                taken = buffer.index_select(0, turn.taken.to(buffer.device)) if turn.number >= start else None
                rows.fill(buffer, turn.refill)
                self._shelf = {"turn": turn, "rows": rows, "buffer": buffer}
                if taken is not None:
                    # Rows on the host are read at once, so the copy must be complete.
                    moved = taken.to(self.home, non_blocking=self.home.type == "cuda")
                    batch = self._batch(moved, self.language_model.widths)
                    yield Handed(batch, self._after(place, turn.number + 1, rows))
        finally:
            self._shelf = {}
            rows.close()

    def _after(self, place: dict[str, Any], number: int, rows: Rows) -> dict[str, Any]:
        """The position after a number of batches since the origin."""
        block = number * self.batching.batch_size // self.batching.block
        rows.forget(block)
        return {**place, "batches": place["origin"] + number, "cursor": rows.cursor(block), "reached": rows.reached}

    def _buffer(self, length: int, shelf: dict[str, Any] | None) -> Float[Tensor, "slot d_model"]:
        model = self.language_model
        device = model.device if self.on_model else torch.device("cpu")
        pinned = not self.on_model and torch.cuda.is_available()
        buffer = torch.empty(length, model.d_model, dtype=self.batching.dtype, device=device, pin_memory=pinned)
        if shelf is not None:
            buffer.copy_(shelf["buffer"][:length])
        return buffer
