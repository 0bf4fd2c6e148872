"""The base class of streams that run a language model: text to tokens to activations."""

import contextlib
import logging
from abc import abstractmethod
from collections.abc import Generator
from dataclasses import asdict
from typing import Any

import torch

from metasae_lightning.corpora.base import Corpus
from metasae_lightning.corpora.tokenization import TokenizedDocuments
from metasae_lightning.data.batching import Batching, StreamSlice
from metasae_lightning.data.forward_passes import RowReader
from metasae_lightning.data.stream import PreparedBatch, Stream
from metasae_lightning.data.work_times import StreamTimes
from metasae_lightning.lm.base import LanguageModel

log = logging.getLogger(__name__)


class ModelStream(Stream):
    """A stream that runs a language model on a corpus.

    Each document of the split goes to one rank, which tokenises its documents, separates them by EOS and packs them into contexts. With
    `prepend_bos`, each context begins with BOS. The model sees the special tokens; the batches leave them out.

    Args:
        corpus: The text.
        language_model: The model and its hooks.
        batching: Settings of the batches.
        part: The part of the data that this rank reads. Its `prefetch` of None is 2 where the model or `home` is a GPU, and 0 on a CPU,
            where a thread would compete with the training for cores.
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
        stall_seconds: float | None = None,
        home: torch.device | None = None,
    ):
        self.home = home or language_model.device
        # `home` comes first: the event of a batch is recorded on its CUDA stream.
        self._gpus = [device for device in dict.fromkeys((self.home, language_model.device)) if device.type == "cuda"]
        super().__init__(batching, part, prefetch=2 if self._gpus else 0)
        self.corpus, self.language_model, self.stall_seconds = corpus, language_model, stall_seconds
        self.times = StreamTimes(language_model.device)

    @abstractmethod
    def _make_batches(self, position: dict[str, Any]) -> Generator[PreparedBatch, None, None]:
        """Every batch after a position, on the current CUDA stream."""

    @abstractmethod
    def _count(self, reader: RowReader) -> int:
        """What is left of a reader's part of the corpus, counted as `batch_size` counts, up to the budget; the reader advances past it."""

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
            counts.append(self._count(reader))
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

    def _record_ready(self) -> Any:
        """An event after the last batch on the CUDA stream that makes it; None where that is no other stream than the caller's."""
        makes_ahead = self.prefetch and self.home.type == "cuda"
        return torch.cuda.current_stream(self.home).record_event() if makes_ahead else None
