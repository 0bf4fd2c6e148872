"""Documents tokenized and packed into contexts of one length."""

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
from metasae_lightning.corpora.prefetch import Producer, alive
from metasae_lightning.errors import InputError

Exhausted = Literal["epoch", "end"]
"""What follows when a corpus is exhausted: another epoch in another order, or the end."""


def special_ids(tokenizer: Any) -> list[int]:
    """A tokenizer's special tokens; TransformerLens names some that are not in its vocabulary."""
    return sorted({token for token in tokenizer.all_special_ids if token is not None})


TOKENISED_AT_ONCE = 64
# Tokenizers refuse to be used by two threads at once, and the splits of one run share theirs.
TOKENIZING = threading.Lock()

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """Some documents, tokenised, and where they lie in the corpus."""

    documents: list[list[int]]
    """Their tokens."""
    place: dict[str, Any]
    """Where reading stood before them: epoch, the reader's state, documents of the split met so far."""
    after: dict[str, Any]
    """Where it stands after them."""


@dataclass(frozen=True)
class Documents:
    """Which documents, and in which order: those of a split, dealt to ranks in turn."""

    corpus: Corpus
    tokenizer: Any
    split: Split = "train"
    held_out: float = 0.0
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    exhausted: Exhausted = "epoch"

    def chunks(self, place: dict[str, Any]) -> Iterator[Chunk]:
        """Their tokens from a place on, an epoch after another."""
        special = set(special_ids(self.tokenizer))
        for epoch in itertools.count(place["epoch"]):
            # An epoch that is gone on with had text in it, or it would not have been left.
            documents, text = place["met"], int(place["met"] > 0)
            for chunk in self._epoch(place):
                documents, text = chunk.after["met"], text + any(token not in special for tokens in chunk.documents for token in tokens)
                yield chunk
            if not text:
                where = f"{self.corpus.description()}: split {self.split} of held_out={self.held_out}, rank {self.rank} of {self.world_size}"
                raise InputError(f"corpus: not one document with text in it ({where})")
            if self.exhausted == "end":
                return
            log.warning("the %s split's %d documents are exhausted; epoch %d begins, in another order", self.split, documents, epoch + 1)
            place = {"epoch": epoch + 1, "reader": None, "met": 0}

    def _epoch(self, place: dict[str, Any]) -> Iterator[Chunk]:
        reader = self.corpus.reader(seed=self.seed, epoch=place["epoch"], state=place["reader"])
        met, mine = place["met"], list[Document]()
        for document in reader:
            alive()
            if split_of(document, self.held_out) != self.split:
                continue
            met += 1
            if (met - 1) % self.world_size == self.rank:
                mine.append(document)
            if len(mine) == TOKENISED_AT_ONCE:
                after = {"epoch": place["epoch"], "reader": reader.state(), "met": met}
                yield Chunk(list(self._tokenised(mine)), place, after)
                place, mine = after, []
        if mine:
            yield Chunk(list(self._tokenised(mine)), place, {"epoch": place["epoch"], "reader": reader.state(), "met": met})

    def _tokenised(self, documents: list[Document]) -> Iterator[list[int]]:
        texts = [document for document in documents if isinstance(document, str)]
        with TOKENIZING:  # its own warning about long texts does not know that they are packed
            encoded = iter(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
        for document in documents:
            if isinstance(document, str):
                yield next(encoded)
                continue
            if document and not 0 <= min(document) <= max(document) < len(self.tokenizer):
                span = f"got {min(document)} to {max(document)}"
                raise InputError(f"column: token ids must be in the tokenizer's range, 0 to {len(self.tokenizer) - 1}, {span}")
            yield document


class PackedTokens:
    """Contexts of exactly `context_size` tokens: documents one after another, each ended by EOS, read and tokenised on a thread.

    What a document leaves over begins the next context. `state()` between two takes is a place to go on from, exactly.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        context_size: int,
        prepend_bos: bool,
        stall_seconds: float | None = None,
        name: str = "",
        state: dict[str, Any] | None = None,
    ):
        self.context_size = context_size
        self.head, self.separator = marks(documents.tokenizer, prepend_bos, name)
        self._start = state or {"place": {"epoch": 0, "reader": None, "met": 0}, "taken": 0, "waiting": []}
        source = documents.chunks(self._start["place"])
        self._chunks = Producer(source, name=f"corpus {documents.corpus.description()}", stall_seconds=stall_seconds)
        self._chunk: Chunk | None = None
        self._waiting: list[int] = list(map(int, self._start["waiting"]))
        self._taken, self._ended = 0, False
        if self._start["taken"] and self._next_chunk():
            self._taken = self._start["taken"]

    def take(self, count: int) -> Int[Tensor, "context position"]:
        """The next contexts, fewer only at the very end."""
        body = self.context_size - len(self.head)
        while len(self._waiting) < count * body and not self._ended:
            self._add_document()
        whole = min(count, len(self._waiting) // body)
        packed = torch.tensor(self._waiting[: whole * body], dtype=torch.long).view(whole, body)
        del self._waiting[: whole * body]
        return torch.cat([torch.tensor(self.head, dtype=torch.long).expand(whole, -1), packed], 1)

    def state(self) -> dict[str, Any]:
        """Where the next `take` begins."""
        place = self._chunk.place if self._chunk else self._start["place"]
        return {"place": place, "after": self.reached, "taken": self._taken, "waiting": torch.tensor(self._waiting, dtype=torch.int32)}

    @property
    def reached(self) -> dict[str, Any]:
        """The place that everything read so far lies before."""
        return self._chunk.after if self._chunk else self._start.get("after", self._start["place"])

    def close(self) -> None:
        """End the reading thread."""
        self._chunks.close()

    def _add_document(self) -> None:
        if (self._chunk is None or self._taken == len(self._chunk.documents)) and not self._next_chunk():
            self._ended = True
            return
        assert self._chunk is not None
        self._waiting += self._chunk.documents[self._taken] + self.separator
        self._taken += 1

    def _next_chunk(self) -> bool:
        chunk = next(self._chunks, None)
        self._chunk, self._taken = chunk or self._chunk, self._taken if chunk is None else 0
        return chunk is not None


def marks(tokenizer: Any, prepend_bos: bool, name: str = "") -> tuple[list[int], list[int]]:
    """What begins a context and what ends a document; a model without BOS was trained to begin after EOS."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    begin = bos if bos is not None else eos
    if prepend_bos and begin is None:
        raise InputError(f"prepend_bos: the tokenizer of {name!r} has neither BOS nor EOS, set it to false")
    return [begin] if prepend_bos else [], [] if eos is None else [eos]
