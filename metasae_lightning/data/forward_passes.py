"""A language model's activations as numbered rows, one forward pass at a time, from any position in the corpus."""

import logging
from collections import deque
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasae_lightning.compute.transfers import copy_to
from metasae_lightning.corpora.prefetch import Producer
from metasae_lightning.corpora.tokenization import PackedTokens, TokenizedDocuments
from metasae_lightning.data.batching import Batching
from metasae_lightning.data.masks import document_mask, documents_in_contexts, same_document
from metasae_lightning.data.prepared_passes import PreparedPass, prepare_passes
from metasae_lightning.data.work_times import StreamTimes
from metasae_lightning.errors import InputError
from metasae_lightning.lm.base import LanguageModel

log = logging.getLogger(__name__)


class RowReader:
    """Reads the activations of trainable tokens in the order of the corpus, and writes them into a buffer.

    A row is the activation of one trainable token. A thread reads and tokenizes documents, and prepares the next two passes. For each
    block of rows that was begun, the reader stores the position in the corpus before the forward pass that contains the first row of the
    block, until `forget_before` deletes it.

    Args:
        documents: The tokenised documents.
        language_model: The model that runs on them.
        batching: Sizes and masks.
        cursor: Where to begin: what `cursor` or `state` of another reader returned; None is the beginning.
        first_row: Number of the first row to write. Forward passes with only earlier rows are counted and not run.
        stall_seconds: Longest time to wait for the corpus, in seconds; None waits forever.
        times: Records when the model runs and when the reader waits for text.
    """

    def __init__(
        self,
        documents: TokenizedDocuments,
        language_model: LanguageModel,
        batching: Batching,
        *,
        cursor: dict[str, Any] | None = None,
        first_row: int = 0,
        stall_seconds: float | None = None,
        times: StreamTimes | None = None,
    ):
        language_model.check_context_size(batching.context_size)
        cursor = cursor or {"tokens": None, "number": 0}
        self.documents, self.language_model, self.batching, self.first_row = documents, language_model, batching, first_row
        self.number: int = cursor["number"]
        self._block_starts: dict[int, dict[str, Any]] = {
            block: {**start, "digests": [*start["digests"]]} for block, start in cursor.get("begun", {}).items()
        }
        self._leftover: Tensor | None = cursor.get("left")
        # Hashes of the tokens of the next passes as an earlier reader saw them.
        self._expected_digests: list[str] = list(cursor.get("digests", []))
        self._range_check = Float16Check()
        self.times = times or StreamTimes(language_model.device)
        packed = PackedTokens(
            documents,
            context_size=batching.context_size,
            prepend_bos=batching.prepend_bos,
            name=language_model.name,
            state=cursor["tokens"],
        )
        self._prefix, self._separator = packed.prefix, packed.separator
        # The positions before the next pass, and after everything that was read for the last one.
        self._position, self._read_position = packed.state(), packed.read_position
        passes = prepare_passes(packed, documents, batching, pin=language_model.device.type == "cuda")
        self._passes = Producer(passes, name=f"corpus {documents.corpus.description()}", stall_seconds=stall_seconds)

    def fill(self, buffer: Float[Tensor, "slot d_model"], slots: Int[Tensor, " free"]) -> None:
        """Write the next rows into these slots, and run forward passes as needed; an InputError if the corpus ends first.

        On a GPU a pass takes a fixed number of calls and writing its rows one, and the host does not wait for any.
        """
        while len(slots):
            if self._leftover is None or not len(self._leftover):
                self._leftover = self._run_next_pass()
            count = min(len(self._leftover), len(slots))
            rows = self._leftover[:count].to(buffer)
            if buffer.dtype == torch.float16:
                self._range_check.add(rows)
            buffer.index_copy_(0, copy_to(slots[:count], buffer.device), rows)
            slots, self._leftover = slots[count:], self._leftover[count:]

    def next_pass(self) -> tuple[Int[Tensor, "context position"], Tensor] | None:
        """The contexts of the next forward pass and the mask of their trainable tokens; None at the end.

        Advances the reader, and runs no model. An InputError is raised if the tokens are not those that an earlier reader saw.
        """
        prepared = self.next_prepared_pass()
        return None if prepared is None else (prepared.tokens, prepared.mask)

    def next_prepared_pass(self) -> PreparedPass | None:
        """The next pass, as `next_pass`, with everything that the host knows about it."""
        with self.times.text.running():
            prepared = next(self._passes, None)
        if prepared is None:
            return None
        self._position, self._read_position = prepared.next_position, prepared.read_position
        if self._expected_digests and prepared.digest != self._expected_digests.pop(0):
            raise InputError(f"corpus: {self.documents.corpus.description()} is not what it was when the checkpoint was written")
        n_rows, block_size = len(prepared.row_indices), self.batching.block_size
        for block in range(-(-self.number // block_size), -(-(self.number + n_rows) // block_size)):
            self._block_starts[block] = {"tokens": prepared.position, "number": self.number, "digests": []}
        for start in self._block_starts.values():
            start["digests"].append(prepared.digest)
        self.number += n_rows
        return prepared

    def run(self, prepared: PreparedPass, *, contexts_at_once: int) -> Float[Tensor, "row d_model"]:
        """The rows of a prepared pass, from forward passes of at most so many contexts."""
        tokens = prepared.tokens.split(contexts_at_once)
        documents = [None] * len(tokens) if prepared.documents is None else prepared.documents.split(contexts_at_once)
        activations = torch.cat([self._activations(*part) for part in zip(tokens, documents, strict=True)]).flatten(0, 1)
        return activations.index_select(0, copy_to(prepared.row_indices, activations.device))

    def visible(self, prepared: PreparedPass) -> Bool[Tensor, "context position position"] | None:
        """The attention mask of a prepared pass; None is causal attention."""
        if prepared.documents is None or not self._separates_documents(prepared.tokens.shape[1]):
            return None
        return same_document(prepared.documents, starts_with_bos=self.starts_with_bos)

    def count_rows(self, limit: int) -> int:
        """Number of rows up to the end of the corpus, at most `limit`.

        The reader advances past these rows. It reads and tokenises the corpus, and runs no model.
        """
        while self.number < limit and self.next_pass() is not None:
            self.forget_before(self.number // self.batching.block_size)
        return min(self.number, limit)

    def state(self) -> dict[str, Any]:
        """The position before the next forward pass, with the rows of the last pass that are in no buffer yet."""
        self._range_check.read(wait=True)
        leftover = None if self._leftover is None else self._leftover.cpu()
        block_starts = {block: self.cursor(block) for block in self._block_starts}
        return {"tokens": self._position, "number": self.number, "left": leftover, "begun": block_starts}

    def cursor(self, block: int) -> dict[str, Any] | None:
        """The position from which to read a block's rows again; None for a block that was not begun, or was forgotten.

        It has the hashes of all passes that were read since, by which a later run notices that the corpus has changed.
        """
        start = self._block_starts.get(block)
        return start and {**start, "digests": [*start["digests"]]}

    def forget_before(self, block: int) -> None:
        """Delete the stored positions of the blocks before `block`."""
        self._block_starts = {number: start for number, start in self._block_starts.items() if number >= block}

    @property
    def reached(self) -> dict[str, Any]:
        """The position in the corpus after everything that was read."""
        return self._read_position

    def check_range(self) -> None:
        """Refuse rows that float16 could not hold, of all that were written."""
        self._range_check.read(wait=True)

    def close(self) -> None:
        """Stop reading the corpus."""
        self._passes.close()

    def _run_next_pass(self) -> Float[Tensor, "row d_model"]:
        """The rows of the next forward pass, from `first_row` on; passes with earlier rows alone are skipped."""
        while True:
            number_before = self.number
            prepared = self.next_prepared_pass()
            if prepared is None:
                raise InputError(f"corpus: {self.documents.corpus.description()} ended earlier than when it was counted")
            if self.number > self.first_row:
                activations = self._activations(prepared.tokens, prepared.documents).flatten(0, 1)
                # Indices are computed on the CPU: with a mask on the GPU, the CPU would wait for the number of rows.
                rows = activations.index_select(0, copy_to(prepared.row_indices, activations.device))
                return rows[max(self.first_row - number_before, 0) :]

    @property
    def separator(self) -> int | None:
        """The token that ends a document, or None where the tokeniser has none."""
        return self._separator[0] if self._separator else None

    @property
    def starts_with_bos(self) -> bool:
        """Whether every context begins with BOS."""
        return bool(self._prefix)

    def attention_mask(self, tokens: Int[Tensor, "context position"]) -> Bool[Tensor, "context position position"] | None:
        """Attention mask that separates the documents of each context.

        None is causal attention: `cross_document_attention` is set, the model cannot mask, or there is nothing to separate.
        """
        if self.separator is None or not self._separates_documents(tokens.shape[1]):
            return None
        return document_mask(tokens, self.separator, starts_with_bos=self.starts_with_bos)

    def forward(self, tokens: Int[Tensor, "context position"]) -> Float[Tensor, "context position d_model"]:
        """The model's activations on contexts, with documents separated."""
        if self.separator is None:
            return self._activations(tokens, None)
        return self._activations(tokens, documents_in_contexts(tokens, self.separator, starts_with_bos=self.starts_with_bos))

    def _separates_documents(self, length: int) -> bool:
        """Whether attention in contexts of this length is restricted to documents."""
        return not self.batching.cross_document_attention and self.language_model.can_separate_documents(length)

    def _activations(
        self, tokens: Int[Tensor, "context position"], documents: Int[Tensor, "context position"] | None
    ) -> Float[Tensor, "context position d_model"]:
        """The model's activations. The attention mask is made on the model's device, from the number of each token's document."""
        model, visible = self.language_model, None
        if documents is not None and self._separates_documents(tokens.shape[1]):
            visible = same_document(copy_to(documents, model.device), starts_with_bos=self.starts_with_bos)
        with self.times.model.running():
            return model.activations(copy_to(tokens, model.device), visible)


class Float16Check:
    """Refuses activations that float16 cannot hold. On a GPU an answer is read once it is there, so that the host does not wait."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Tensor, Any]] = deque()

    def add(self, rows: Float[Tensor, "row d_model"]) -> None:
        """Check float16 rows; on a GPU, read the answers about earlier rows that are there."""
        is_finite = rows.isfinite().all()
        if rows.device.type == "cuda":
            is_finite = is_finite.to("cpu", non_blocking=True)
            self._pending.append((is_finite, torch.cuda.current_stream(rows.device).record_event()))
            self.read()
        elif not is_finite:
            raise _too_large()

    def read(self, *, wait: bool = False) -> None:
        """Read the answers that are there, or all with `wait`; an InputError if any rows were not finite."""
        while self._pending and (wait or self._pending[0][1].query()):
            is_finite, event = self._pending.popleft()
            event.synchronize()
            if not is_finite:
                raise _too_large()


def _too_large() -> InputError:
    return InputError("buffer_dtype: float16 ends at 65504 and an activation is larger: set bfloat16 or float32")
