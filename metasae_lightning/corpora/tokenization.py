"""Documents to tokens, and tokens packed into contexts of one length."""

import itertools
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from metasae_lightning.corpora.base import Corpus, Split, split_of
from metasae_lightning.corpora.documents import Document
from metasae_lightning.corpora.prefetch import heartbeat
from metasae_lightning.errors import InputError

Exhausted = Literal["epoch", "end"]
"""The end of a corpus: `epoch` begins another epoch in another order, `end` ends the stream."""

TOKENIZED_AT_ONCE = 64
# A tokenizer must not run on two threads at once, and the splits of a run share one tokenizer.
TOKENIZER_LOCK = threading.Lock()

log = logging.getLogger(__name__)


def special_ids(tokenizer: Any) -> list[int]:
    """The ids of a tokenizer's special tokens.

    TransformerLens adds special tokens that the vocabulary does not have; their id is None, and they are left out.
    """
    return sorted({token for token in tokenizer.all_special_ids if token is not None})


@dataclass(frozen=True)
class Chunk:
    """Some tokenized documents, with the corpus positions before and after them."""

    documents: list[list[int]]
    """The token ids of each document."""
    position: dict[str, Any]
    """The position before these documents: the epoch, the reader's state, and the number of the split's documents read so far."""
    next_position: dict[str, Any]
    """The position after these documents."""


@dataclass(frozen=True)
class TokenizedDocuments:
    """One rank's documents of one split, tokenized: document number i of the split goes to rank i modulo `world_size`."""

    corpus: Corpus
    tokenizer: Any
    split: Split = "train"
    held_out: float = 0.0
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    exhausted: Exhausted = "epoch"

    def chunks(self, position: dict[str, Any]) -> Iterator[Chunk]:
        """Tokenized documents from a position on: epoch after epoch, or to the end of the epoch where `exhausted` is `end`.

        After an epoch without any text for this rank, an InputError is raised.
        """
        special = set(special_ids(self.tokenizer))
        for epoch in itertools.count(position["epoch"]):
            n_documents = position["met"]
            # A position inside an epoch comes from an earlier reading, which found text.
            has_text = n_documents > 0
            for chunk in self._epoch(position):
                n_documents = chunk.next_position["met"]
                has_text = has_text or any(token not in special for tokens in chunk.documents for token in tokens)
                yield chunk
            if not has_text:
                share = f"split {self.split} of held_out={self.held_out}, rank {self.rank} of {self.world_size}"
                raise InputError(f"corpus: no document with text in it ({self.corpus.description()}: {share})")
            if self.exhausted == "end":
                return
            log.warning("the %s split's %d documents are exhausted; epoch %d begins, in another order", self.split, n_documents, epoch + 1)
            position = {"epoch": epoch + 1, "reader": None, "met": 0}

    def _epoch(self, position: dict[str, Any]) -> Iterator[Chunk]:
        """This rank's documents of the split in one epoch, from a position on, tokenized in chunks of `TOKENIZED_AT_ONCE`."""
        reader = self.corpus.reader(seed=self.seed, epoch=position["epoch"], state=position["reader"])
        n_documents, pending = position["met"], list[Document]()
        for document in reader:
            heartbeat()
            if split_of(document, self.held_out) != self.split:
                continue
            n_documents += 1
            if (n_documents - 1) % self.world_size == self.rank:
                pending.append(document)
            if len(pending) == TOKENIZED_AT_ONCE:
                next_position = {"epoch": position["epoch"], "reader": reader.state(), "met": n_documents}
                yield Chunk(list(self._tokenize(pending)), position, next_position)
                position, pending = next_position, []
        if pending:
            next_position = {"epoch": position["epoch"], "reader": reader.state(), "met": n_documents}
            yield Chunk(list(self._tokenize(pending)), position, next_position)

    def _tokenize(self, documents: list[Document]) -> Iterator[list[int]]:
        """The token ids of each document. Documents that are token ids already are checked against the vocabulary."""
        texts = [document for document in documents if isinstance(document, str)]
        with TOKENIZER_LOCK:
            # `verbose=False` turns off the warning about long texts: they are cut into contexts later.
            options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
            encoded = iter(self.tokenizer(texts, **options)["input_ids"] if texts else [])
        for document in documents:
            if isinstance(document, str):
                yield next(encoded)
                continue
            if document and not 0 <= min(document) <= max(document) < len(self.tokenizer):
                span = f"got {min(document)} to {max(document)}"
                raise InputError(f"column: token ids must be in the tokenizer's range, 0 to {len(self.tokenizer) - 1}, {span}")
            yield document


class PackedTokens:
    """Contexts of exactly `context_size` tokens, packed from tokenized documents.

    Documents follow one another, each with an EOS token after it if the tokenizer has one. A document that does not fit continues in the
    next context.

    Args:
        documents: The documents to pack.
        context_size: The number of tokens in a context, BOS included.
        prepend_bos: Whether each context begins with a BOS token, or with EOS if the tokenizer has no BOS.
        name: The language model's name, for messages.
        state: An earlier object's `state()`, to continue from there.
    """

    def __init__(
        self,
        documents: TokenizedDocuments,
        *,
        context_size: int,
        prepend_bos: bool,
        name: str = "",
        state: dict[str, Any] | None = None,
    ):
        self.context_size = context_size
        self.prefix, self.separator = boundary_tokens(documents.tokenizer, prepend_bos, name)
        self._start = state or {"place": {"epoch": 0, "reader": None, "met": 0}, "taken": 0, "waiting": []}
        self._chunks = documents.chunks(self._start["place"])
        self._chunk: Chunk | None = None
        self._waiting = torch.as_tensor(self._start["waiting"], dtype=torch.int32)
        """Tokens of documents that no context has yet."""
        self._n_used, self._ended = 0, False
        self._skips_taken = bool(self._start["taken"])
        """Whether the documents of the first chunk that an earlier object has used are still to be skipped."""

    def next_contexts(self, count: int) -> Int[Tensor, "context position"]:
        """The next `count` contexts; fewer at the end of the stream, where an incomplete context is dropped."""
        if self._skips_taken:
            self._skips_taken = False
            self._n_used = self._start["taken"] if self._next_chunk() else 0
        length = self.context_size - len(self.prefix)
        pieces, n_tokens = [self._waiting], len(self._waiting)
        while n_tokens < count * length and (document := self._next_document()) is not None:
            pieces.append(document)
            n_tokens += len(document)
        tokens = torch.cat(pieces) if len(pieces) > 1 else self._waiting
        complete = min(count, n_tokens // length)
        self._waiting = tokens[complete * length :]
        packed = tokens[: complete * length].view(complete, length).long()
        return torch.cat([torch.tensor(self.prefix, dtype=torch.long).expand(complete, -1), packed], 1)

    def state(self) -> dict[str, Any]:
        """The position of the next context: a new object with this `state` continues with it."""
        if self._skips_taken:
            return self._start
        position = self._chunk.position if self._chunk else self._start["place"]
        # A view would keep, and a checkpoint would contain, the tokens of the contexts before it.
        return {"place": position, "after": self.read_position, "taken": self._n_used, "waiting": self._waiting.clone()}

    @property
    def read_position(self) -> dict[str, Any]:
        """The corpus position after the current chunk, which contains the last document used."""
        return self._chunk.next_position if self._chunk else self._start.get("after", self._start["place"])

    def _next_document(self) -> Int[Tensor, " token"] | None:
        """The tokens of the next document, with its separator; None after the last document."""
        if self._ended or ((self._chunk is None or self._n_used == len(self._chunk.documents)) and not self._next_chunk()):
            self._ended = True
            return None
        assert self._chunk is not None
        self._n_used += 1
        return torch.tensor(self._chunk.documents[self._n_used - 1] + self.separator, dtype=torch.int32)

    def _next_chunk(self) -> bool:
        """Go to the next chunk; false if there is none."""
        chunk = next(self._chunks, None)
        self._chunk, self._n_used = chunk or self._chunk, self._n_used if chunk is None else 0
        return chunk is not None


def boundary_tokens(tokenizer: Any, prepend_bos: bool, name: str = "") -> tuple[list[int], list[int]]:
    """The tokens before each context, and the tokens after each document; each list has one token or none.

    Without `prepend_bos` no token is before a context. A tokenizer without BOS has its EOS before each context, because such models are
    trained with EOS between documents. An InputError is raised if `prepend_bos` is set and the tokenizer has neither.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    first = bos if bos is not None else eos
    if prepend_bos and first is None:
        raise InputError(f"prepend_bos: the tokenizer of {name!r} has neither BOS nor EOS, set it to false")
    return [first] if prepend_bos else [], [] if eos is None else [eos]
