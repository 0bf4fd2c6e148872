"""A language model's activations as numbered rows, one forward pass at a time, from any position on."""

import hashlib
import logging
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasae_lightning.corpora.tokenization import PackedTokens, TokenizedDocuments, special_ids
from metasae_lightning.data.batching import Batching
from metasae_lightning.data.masks import content, own_document
from metasae_lightning.errors import InputError
from metasae_lightning.lm.base import LanguageModel

log = logging.getLogger(__name__)


class Rows:
    """Activations of text tokens in the order of the corpus, written into a buffer on request.

    For each started block of rows it remembers the position before the forward pass that contains the block's first row.

    Args:
        documents: The tokenized documents.
        language_model: The language model.
        batching: Sizes and masks.
        cursor: Start position from `cursor` or `state`; None is the beginning.
        first: Number of the first row needed; earlier passes are counted and not run.
        stall_seconds: Longest wait for the corpus.
    """

    def __init__(
        self,
        documents: TokenizedDocuments,
        language_model: LanguageModel,
        batching: Batching,
        *,
        cursor: dict[str, Any] | None = None,
        first: int = 0,
        stall_seconds: float | None = None,
    ):
        limit = language_model.n_ctx
        if limit is not None and batching.context_size > limit:
            raise InputError(f"context_size must be at most {limit}, the model's longest context, got {batching.context_size}")
        cursor = cursor or {"tokens": None, "number": 0}
        self.documents, self.language_model, self.batching, self.first = documents, language_model, batching, first
        self.number: int = cursor["number"]
        self._begun: dict[int, dict[str, Any]] = {
            block: {**at, "digests": [*at["digests"]]} for block, at in cursor.get("begun", {}).items()
        }
        self._left: Tensor | None = cursor.get("left")
        self._expected: list[str] = list(cursor.get("digests", []))
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
        """Write the next rows into these slots."""
        while len(slots):
            if self._left is None or not len(self._left):
                self._left = self._run()
            count = min(len(self._left), len(slots))
            rows = self._left[:count].to(buffer)
            if buffer.dtype == torch.float16 and not rows.isfinite().all():
                raise InputError("buffer_dtype: float16 ends at 65504 and an activation is larger: set bfloat16 or float32")
            buffer.index_copy_(0, slots[:count].to(buffer.device), rows)
            slots, self._left = slots[count:], self._left[count:]

    def take(self) -> tuple[Int[Tensor, "context position"], Tensor] | None:
        """Contexts of the next forward pass and the mask of tokens that are rows; None at the end."""
        before = self._tokens.state()
        tokens = self._tokens.next_contexts(self.batching.forward_batch)
        if not len(tokens):
            return None
        digest = hashlib.blake2b(tokens.numpy().tobytes(), digest_size=8).hexdigest()
        if self._expected and digest != self._expected.pop(0):
            raise InputError(f"corpus: {self.documents.corpus.description()} is not what it was when the checkpoint was written")
        keep = content(tokens, self._special, self.batching.skip_positions)
        count, block = int(keep.sum()), self.batching.block
        for begun in range(-(-self.number // block), -(-(self.number + count) // block)):
            self._begun[begun] = {"tokens": before, "number": self.number, "digests": []}
        for place in self._begun.values():
            place["digests"].append(digest)
        self.number += count
        return tokens, keep

    def count(self, most: int) -> int:
        """Number of rows that follow, up to a limit, without running the model."""
        while self.number < most and self.take() is not None:
            self.forget(self.number // self.batching.block)
        return min(self.number, most)

    def state(self) -> dict[str, Any]:
        """Position of the next pass, with the rows left over from the last."""
        left = None if self._left is None else self._left.cpu()
        begun = {block: self.cursor(block) for block in self._begun}
        return {"tokens": self._tokens.state(), "number": self.number, "left": left, "begun": begun}

    def cursor(self, block: int) -> dict[str, Any] | None:
        """Start position for the rows of a started block, and digests of the passes since, which detect a changed corpus."""
        place = self._begun.get(block)
        return place and {**place, "digests": [*place["digests"]]}

    def forget(self, block: int) -> None:
        """Forget the positions of earlier blocks."""
        self._begun = {begun: place for begun, place in self._begun.items() if begun >= block}

    @property
    def reached(self) -> dict[str, Any]:
        """Position in the corpus after everything read so far."""
        return self._tokens.read_position

    def close(self) -> None:
        """Stop reading."""
        self._tokens.close()

    def _run(self) -> Float[Tensor, "row d_model"]:
        """Run the next pass that contains a needed row."""
        while True:
            before = self.number
            taken = self.take()
            if taken is None:
                raise InputError(f"corpus: {self.documents.corpus.description()} ended earlier than when it was counted")
            if self.number > self.first:
                tokens, keep = taken
                found = self.forward(tokens).flatten(0, 1)
                # Indices are computed on the CPU; a mask on the device would force a wait.
                found = found.index_select(0, keep.flatten().nonzero().flatten().to(found.device))
                return found[max(self.first - before, 0) :]

    @property
    def separator(self) -> int | None:
        """Token that ends a document."""
        return self._tokens.separator[0] if self._tokens.separator else None

    @property
    def begun(self) -> bool:
        """Whether contexts begin with BOS."""
        return bool(self._tokens.prefix)

    def visible(self, tokens: Int[Tensor, "context position"]) -> Bool[Tensor, "context position position"] | None:
        """Attention mask that separates documents, if requested and supported."""
        apart = not self.batching.cross_document_attention and self.language_model.can_separate_documents(tokens.shape[1])
        return own_document(tokens, self.separator, begun=self.begun) if apart and self.separator is not None else None

    def forward(self, tokens: Int[Tensor, "context position"]) -> Float[Tensor, "context position d_model"]:
        """Activations of the model on whole contexts."""
        return self.language_model.activations(tokens, self.visible(tokens))
