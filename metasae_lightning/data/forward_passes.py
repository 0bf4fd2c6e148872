"""A language model's activations as numbered rows, one forward pass at a time, from any position in the corpus."""

import hashlib
import logging
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasae_lightning.corpora.tokenization import PackedTokens, TokenizedDocuments, special_ids
from metasae_lightning.data.batching import Batching
from metasae_lightning.data.masks import document_mask, trainable_tokens
from metasae_lightning.errors import InputError
from metasae_lightning.lm.base import LanguageModel

log = logging.getLogger(__name__)


class RowReader:
    """Reads the activations of trainable tokens in the order of the corpus, and writes them into a buffer.

    A row is the activation of one trainable token. For each block of rows that was begun, the reader stores the position in the corpus
    before the forward pass that contains the first row of the block, until `forget_before` deletes it.

    Args:
        documents: The tokenised documents.
        language_model: The model that runs on them.
        batching: Sizes and masks.
        cursor: Where to begin: what `cursor` or `state` of another reader returned; None is the beginning.
        first_row: Number of the first row to write. Forward passes with only earlier rows are counted and not run.
        stall_seconds: Longest time to wait for the corpus, in seconds; None waits forever.
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
    ):
        limit = language_model.n_ctx
        if limit is not None and batching.context_size > limit:
            raise InputError(f"context_size must be at most {limit}, the model's longest context, got {batching.context_size}")
        cursor = cursor or {"tokens": None, "number": 0}
        self.documents, self.language_model, self.batching, self.first_row = documents, language_model, batching, first_row
        self.number: int = cursor["number"]
        self._block_starts: dict[int, dict[str, Any]] = {
            block: {**start, "digests": [*start["digests"]]} for block, start in cursor.get("begun", {}).items()
        }
        self._leftover: Tensor | None = cursor.get("left")
        # Hashes of the tokens of the next passes as an earlier reader saw them.
        self._expected_digests: list[str] = list(cursor.get("digests", []))
        self._special = torch.tensor(special_ids(documents.tokenizer), dtype=torch.long)
        self._tokens = PackedTokens(
            documents,
            context_size=batching.context_size,
            prepend_bos=batching.prepend_bos,
            stall_seconds=stall_seconds,
            name=language_model.name,
            state=cursor["tokens"],
        )

    def fill(self, buffer: Float[Tensor, "slot d_model"], slots: Int[Tensor, " free"]) -> None:
        """Write the next rows into these slots, and run forward passes as needed; an InputError if the corpus ends first."""
        while len(slots):
            if self._leftover is None or not len(self._leftover):
                self._leftover = self._run_next_pass()
            count = min(len(self._leftover), len(slots))
            rows = self._leftover[:count].to(buffer)
            if buffer.dtype == torch.float16 and not rows.isfinite().all():
                raise InputError("buffer_dtype: float16 ends at 65504 and an activation is larger: set bfloat16 or float32")
            buffer.index_copy_(0, slots[:count].to(buffer.device), rows)
            slots, self._leftover = slots[count:], self._leftover[count:]

    def next_pass(self) -> tuple[Int[Tensor, "context position"], Tensor] | None:
        """The contexts of the next forward pass and the mask of their trainable tokens; None at the end.

        Advances the reader, and runs no model. An InputError is raised if the tokens are not those that an earlier reader saw.
        """
        position = self._tokens.state()
        tokens = self._tokens.next_contexts(self.batching.forward_batch)
        if not len(tokens):
            return None
        digest = hashlib.blake2b(tokens.numpy().tobytes(), digest_size=8).hexdigest()
        if self._expected_digests and digest != self._expected_digests.pop(0):
            raise InputError(f"corpus: {self.documents.corpus.description()} is not what it was when the checkpoint was written")
        mask = trainable_tokens(tokens, self._special, self.batching.skip_positions)
        n_rows, block_size = int(mask.sum()), self.batching.block_size
        for block in range(-(-self.number // block_size), -(-(self.number + n_rows) // block_size)):
            self._block_starts[block] = {"tokens": position, "number": self.number, "digests": []}
        for start in self._block_starts.values():
            start["digests"].append(digest)
        self.number += n_rows
        return tokens, mask

    def count_rows(self, limit: int) -> int:
        """Number of rows up to the end of the corpus, at most `limit`.

        The reader advances past these rows. It reads and tokenises the corpus, and runs no model.
        """
        while self.number < limit and self.next_pass() is not None:
            self.forget_before(self.number // self.batching.block_size)
        return min(self.number, limit)

    def state(self) -> dict[str, Any]:
        """The position before the next forward pass, with the rows of the last pass that are in no buffer yet."""
        leftover = None if self._leftover is None else self._leftover.cpu()
        block_starts = {block: self.cursor(block) for block in self._block_starts}
        return {"tokens": self._tokens.state(), "number": self.number, "left": leftover, "begun": block_starts}

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
        return self._tokens.read_position

    def close(self) -> None:
        """Stop reading the corpus."""
        self._tokens.close()

    def _run_next_pass(self) -> Float[Tensor, "row d_model"]:
        """The rows of the next forward pass, from `first_row` on; passes with earlier rows alone are skipped."""
        while True:
            number_before = self.number
            contexts = self.next_pass()
            if contexts is None:
                raise InputError(f"corpus: {self.documents.corpus.description()} ended earlier than when it was counted")
            if self.number > self.first_row:
                tokens, mask = contexts
                activations = self.forward(tokens).flatten(0, 1)
                # Indices are computed on the CPU: with a mask on the GPU, the CPU would wait for the number of rows.
                rows = activations.index_select(0, mask.flatten().nonzero().flatten().to(activations.device))
                return rows[max(self.first_row - number_before, 0) :]

    @property
    def separator(self) -> int | None:
        """The token that ends a document, or None where the tokeniser has none."""
        return self._tokens.separator[0] if self._tokens.separator else None

    @property
    def starts_with_bos(self) -> bool:
        """Whether every context begins with BOS."""
        return bool(self._tokens.prefix)

    def attention_mask(self, tokens: Int[Tensor, "context position"]) -> Bool[Tensor, "context position position"] | None:
        """Attention mask that separates the documents of each context.

        None is causal attention: `cross_document_attention` is set, the model cannot mask, or there is nothing to separate.
        """
        if self.separator is None or self.batching.cross_document_attention:
            return None
        if not self.language_model.can_separate_documents(tokens.shape[1]):
            return None
        return document_mask(tokens, self.separator, starts_with_bos=self.starts_with_bos)

    def forward(self, tokens: Int[Tensor, "context position"]) -> Float[Tensor, "context position d_model"]:
        """The model's activations on contexts, with documents separated."""
        return self.language_model.activations(tokens, self.attention_mask(tokens))
