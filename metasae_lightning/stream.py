"""Text to tokens to activations to shuffled batches, as one iterator whose whole state is a count of batches."""

import hashlib
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasae_lightning.corpora import Corpus, Document, Split, split_of
from metasae_lightning.errors import InputError
from metasae_lightning.lm import LanguageModel
from metasae_lightning.step import Batch

TOKENISED_AT_ONCE = 64

log = logging.getLogger(__name__)


def content(
    tokens: Int[Tensor, "context position"], special: Int[Tensor, " special"], skip_positions: int = 0
) -> Bool[Tensor, "context position"]:
    """Which tokens are trained on: text, past the first positions. The one mask, for training and for every evaluation.

    >>> content(torch.tensor([[1, 7, 2, 5]]), torch.tensor([1, 2])).tolist()
    [[False, True, False, True]]
    >>> content(torch.tensor([[1, 7, 2, 5]]), torch.tensor([1, 2]), skip_positions=2).tolist()
    [[False, False, False, True]]
    """
    keep = torch.isin(tokens, special, invert=True)
    keep[:, :skip_positions] = False
    return keep


def ordinary(activations: Float[Tensor, "row d_model"], max_norm_ratio: float) -> Bool[Tensor, " row"]:
    """Which rows are no attention sinks: norms up to so many times the batch's median.

    >>> ordinary(torch.tensor([[1.0], [2.0], [40.0]]), 10.0).tolist()
    [True, True, False]
    """
    norms = activations.norm(dim=-1)
    return norms <= max_norm_ratio * norms.median()


class ActivationStream:
    """Shuffled batches of activations, a function of the arguments alone.

    Documents of the split are dealt to ranks in turn, tokenised, separated by EOS and packed into contexts, each begun by BOS;
    the model sees special tokens, the batches do not. Activations are numbered as they come; block k holds numbers
    `k * buffer_size` to `(k + 1) * buffer_size` and is handed out in a random order of its own. A row taken out of the buffer
    makes room for one of the next block, so memory is one buffer and one forward pass, and the buffer at any moment can be
    recomputed from at most two buffers of tokens.
    """

    def __init__(
        self,
        corpus: Corpus,
        language_model: LanguageModel,
        *,
        split: Split = "train",
        tokens: int,
        batch_size: int,
        context_size: int,
        buffer_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        held_out: float = 0.02,
        prepend_bos: bool = True,
        skip_positions: int = 0,
        max_norm_ratio: float | None = None,
        forward_batch: int = 32,
    ):
        self.corpus = corpus
        self.language_model = language_model
        self.split: Split = split
        self.tokens = tokens
        self.batch_size = batch_size
        self.context_size = context_size
        self.buffer_size = buffer_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.held_out = held_out
        self.prepend_bos = prepend_bos
        self.skip_positions = skip_positions
        self.max_norm_ratio = max_norm_ratio
        self.forward_batch = forward_batch
        self._given = 0
        self._check()

    def _check(self) -> None:
        for name, least in (("batch_size", 1), ("context_size", 2), ("forward_batch", 1), ("world_size", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.tokens < self.batch_size:
            raise InputError(f"tokens must fill a batch of {self.batch_size}, got {self.tokens} a rank for {self.split}")
        if self.buffer_size < self.batch_size:
            raise InputError(f"buffer_size must hold a batch of {self.batch_size} tokens, got {self.buffer_size}")
        if not 0 <= self.skip_positions < self.context_size:
            raise InputError(f"skip_positions must be in [0, context_size={self.context_size}), got {self.skip_positions}")
        if self.max_norm_ratio is not None and self.max_norm_ratio <= 1:
            raise InputError(f"max_norm_ratio must be more than 1, since it is times the median norm, got {self.max_norm_ratio}")
        if not 0 <= self.held_out < 0.5:
            raise InputError(f"held_out must be in [0, 0.5): that share is validation and as much again is test, got {self.held_out}")
        if not 0 <= self.rank < self.world_size:
            raise InputError(f"rank must be in [0, {self.world_size}), got {self.rank}")

    def __len__(self) -> int:
        """How many whole batches the budget holds."""
        return self.tokens // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        # A held-out pass that was cut short must not make the next one see other tokens.
        if self.split != "train" or self._given >= len(self):
            self._given = 0
        for batch in self._batches(self._given):
            self._given += 1
            yield batch
        self._given = 0

    def state_dict(self) -> dict[str, Any]:
        """How many batches were handed out, and of which stream."""
        return {"batches": self._given, "stream": self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stream of the same identity stood; the next iteration recomputes its buffer."""
        own, other = self.identity(), state["stream"]
        differing = [f"{key}: {other.get(key)} then, {own.get(key)} now" for key in own if own.get(key) != other.get(key)]
        if differing:
            raise InputError(f"the checkpoint's data cannot be continued with other arguments ({'; '.join(differing)})")
        self._given = min(int(state["batches"]), len(self))

    def identity(self) -> dict[str, Any]:
        """Everything that the batch sequence is a function of."""
        shape = ("batch_size", "context_size", "buffer_size", "forward_batch", "prepend_bos", "skip_positions", "max_norm_ratio")
        sizes = {name: getattr(self, name) for name in shape}
        order = {name: getattr(self, name) for name in ("split", "held_out", "seed", "rank", "world_size")}
        model = {"model": self.language_model.name, "hook": self.language_model.hook}
        return {"corpus": self.corpus.identity()} | model | sizes | order

    def _batches(self, start: int) -> Iterator[Batch]:
        """Every batch from number `start` on."""
        size, total = self.batch_size, len(self) * self.batch_size
        block = self.buffer_size // size * size
        first = start * size // block * block
        rows = self._rows(first)
        buffer = torch.empty(min(block, total - first), self.language_model.d_model, device=self.language_model.device)
        slots = torch.arange(len(buffer))
        left = _fill(buffer, slots, rows, None)
        for begin in range(first, total, block):
            here, after = min(block, total - begin), max(min(block, total - begin - block), 0)
            slots = slots[:here][self._order(begin // block, here)]
            for at in range(0, here, size):
                taken = slots[at : at + size]
                if begin + at >= start * size:
                    yield self._batch(buffer[taken.to(buffer.device)])
                left = _fill(buffer, taken[: max(after - at, 0)], rows, left)

    def _batch(self, rows: Float[Tensor, "row d_model"]) -> Batch:
        """A batch without its sinks: it gets shorter, so that which rows come next does not depend on norms."""
        return Batch(rows if self.max_norm_ratio is None else rows[ordinary(rows, self.max_norm_ratio)])

    def _order(self, block: int, length: int) -> Int[Tensor, " row"]:
        key = f"{self.seed}/{self.split}/{self.rank}/{self.world_size}/{block}"
        own = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big"))
        return torch.randperm(length, generator=own)

    def _rows(self, first: int) -> Iterator[Float[Tensor, "row d_model"]]:
        """Activations of text tokens from number `first` on, a forward pass at a time; earlier passes are counted and not run."""
        special = torch.tensor(sorted(set(self.language_model.tokenizer.all_special_ids)), dtype=torch.long)
        seen = 0
        for tokens in self._forward_batches():
            keep = content(tokens, special, self.skip_positions)
            count = int(keep.sum())
            if seen + count > first:
                activations = self.language_model.activations(tokens)
                yield activations[keep.to(activations.device)][max(first - seen, 0) :]
            seen += count

    def _forward_batches(self) -> Iterator[Int[Tensor, "context position"]]:
        contexts = self._contexts()
        while True:
            yield torch.tensor(list(itertools.islice(contexts, self.forward_batch)))

    def _contexts(self) -> Iterator[list[int]]:
        """Contexts of exactly `context_size` tokens; what a document leaves over begins the next."""
        limit = self.language_model.n_ctx
        if limit is not None and self.context_size > limit:
            raise InputError(f"context_size must be at most {limit}, the model's longest context, got {self.context_size}")
        head, separator = self._marks()
        body = self.context_size - len(head)
        waiting: list[int] = []
        for document in self._documents():
            waiting += document + separator
            whole = len(waiting) // body * body
            for at in range(0, whole, body):
                yield head + waiting[at : at + body]
            waiting = waiting[whole:]

    def _marks(self) -> tuple[list[int], list[int]]:
        """What begins a context and what ends a document; a model without BOS was trained to begin after EOS."""
        tokenizer = self.language_model.tokenizer
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        begin = bos if bos is not None else eos
        if self.prepend_bos and begin is None:
            raise InputError(f"prepend_bos: the tokenizer of {self.language_model.name!r} has neither BOS nor EOS, set it to false")
        return [begin] if self.prepend_bos else [], [] if eos is None else [eos]

    def _documents(self) -> Iterator[list[int]]:
        """The tokens of this rank's documents, an epoch after another."""
        special = set(self.language_model.tokenizer.all_special_ids)
        for epoch in itertools.count():
            documents = text = 0
            mine = self._dealt(epoch)
            while chunk := list(itertools.islice(mine, TOKENISED_AT_ONCE)):
                for tokens in self._tokenised(chunk):
                    documents, text = documents + 1, text + any(token not in special for token in tokens)
                    yield tokens
            if not text:
                where = f"{self.corpus.identity()}: split {self.split} of held_out={self.held_out}, rank {self.rank} of {self.world_size}"
                raise InputError(f"corpus: not one document with text in it ({where})")
            log.warning("the %s split's %d documents are exhausted; epoch %d begins, in another order", self.split, documents, epoch + 1)

    def _dealt(self, epoch: int) -> Iterator[Document]:
        ours = (d for d in self.corpus.documents(seed=self.seed, epoch=epoch) if split_of(d, self.held_out) == self.split)
        return itertools.islice(ours, self.rank, None, self.world_size)

    def _tokenised(self, documents: list[Document]) -> Iterator[list[int]]:
        tokenizer = self.language_model.tokenizer
        texts = [document for document in documents if isinstance(document, str)]
        # The tokenizer's own warning about long texts does not know that they are packed.
        encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else [])
        for document in documents:
            if isinstance(document, str):
                yield next(encoded)
                continue
            if document and not 0 <= min(document) <= max(document) < len(tokenizer):
                span = f"got {min(document)} to {max(document)}"
                raise InputError(f"column: token ids must be in the tokenizer's range, 0 to {len(tokenizer) - 1}, {span}")
            yield document


def _fill(
    buffer: Float[Tensor, "slot d_model"],
    slots: Int[Tensor, " free"],
    rows: Iterator[Float[Tensor, "row d_model"]],
    left: Float[Tensor, "before d_model"] | None,
) -> Float[Tensor, "after d_model"] | None:
    """Write the next rows into these slots; returns what the last forward pass left over."""
    while len(slots):
        if left is None or not len(left):
            left = next(rows)
        count = min(len(left), len(slots))
        buffer[slots[:count].to(buffer.device)] = left[:count].to(buffer.dtype)
        slots, left = slots[count:], left[count:]
    return left
