"""Batches read from a cache of activations, in the order that the language model's stream would have."""

import logging
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor

from metasae_lightning.corpora.base import Split, split_of
from metasae_lightning.data.activation_stream import ActivationStream
from metasae_lightning.data.batching import Batching
from metasae_lightning.data.cache_folder import RECORD, ActivationCache, Folder, ShardWriter, finish
from metasae_lightning.data.forward_passes import Rows
from metasae_lightning.data.masks import content
from metasae_lightning.data.shuffle import permutation
from metasae_lightning.data.stream import Handed, Stream
from metasae_lightning.errors import InputError

CONTEXTS_AT_ONCE = 16

log = logging.getLogger(__name__)


@final
class CachedStream(Stream):
    """Rows are numbered and shuffled as in `ActivationStream`, so a run from its own cache gets the same batches.

    Indices into memory-mapped files are shuffled. Ranks take contexts in turn. Contexts of a SAELens folder, which has no documents, are
    held out by a hash of their tokens. Later epochs use another order of contexts.
    """

    def __init__(
        self, cache: ActivationCache, batching: Batching, *, tokens: int, special: list[int], split: Split = "train", rank: int = 0,
        world_size: int = 1, prefetch: int = 0,
    ):  # fmt: skip
        super().__init__(batching, split=split, tokens=tokens, rank=rank, world_size=world_size, prefetch=prefetch)
        self.cache, self.special = cache, special
        self._known: tuple[Tensor, Tensor] | None = None

    def identity(self) -> dict[str, Any]:
        """See the base."""
        place = {"split": self.split, "rank": self.rank, "world_size": self.world_size}
        return {"cache": self.cache.record.get("identity", str(self.cache.path)), **asdict(self.batching), **place}

    def load_elsewhere(self, states: list[dict[str, Any]]) -> None:
        """Continue from a state of another number of ranks, after the last context that any rank has read."""
        for state in states:
            self._check(state, but=("rank", "world_size"))
        given = states[0]["batches"] * len(states) // self.world_size
        base = max((state["reached"] for state in states if state["reached"]), default=None)
        if base:
            log.warning(
                "restored on %d ranks instead of %d: goes on at context %d of epoch %d; batches are other ones",
                self.world_size,
                len(states),
                base[1],
                base[0],
            )
        self._place = {"batches": given, "origin": given, "base": base, "cursor": None, "reached": base}
        self._length = None

    def _contents(self) -> tuple[Tensor, Tensor]:
        """Contexts of the split, and the mask of tokens that are rows."""
        if self._known is None:
            folder = self.cache.folder(self.split)
            tokens = folder.tokens()
            keep = torch.ones(len(folder), folder.context_size, dtype=torch.bool)
            if tokens is None:
                keep[:, : max(int(self.batching.prepend_bos), self.batching.skip_positions)] = False
            else:
                keep = content(tokens, torch.tensor(self.special, dtype=torch.long), self.batching.skip_positions)
            self._known = _members(folder, tokens, self.split, self.batching.held_out, self.cache.ours), keep
            if not keep[self._known[0]].any():
                raise InputError(f"cache: {folder.path} has not one row for the {self.split} split of held_out={self.batching.held_out}")
        return self._known

    def _available(self, base: Any) -> int:
        members, keep = self._contents()
        begin = base[1] if base else 0
        counts = [int(keep[members[begin:][rank :: self.world_size]].sum()) for rank in range(self.world_size)]
        return min(min(counts), self.tokens)

    def _batches(self, place: dict[str, Any]) -> Generator[Handed, None, None]:
        start = place["batches"] - place["origin"]
        first, moves = self._turns(place, start)
        total, block = (len(self) - place["origin"]) * self.batching.batch_size, self.batching.block
        folder, hooks = self.cache.folder(self.split), self.cache.widths
        source = self._places(place["base"], first)
        held = torch.empty(min(block, total - first), dtype=torch.long)
        left, reached = _fill(held, torch.arange(len(held)), source, None)
        for turn in moves:
            batch = self._batch(folder.rows(held[turn.taken]).to(self.batching.dtype), hooks) if turn.number >= start else None
            left, now = _fill(held, turn.refill, source, left)
            reached = now or reached
            if batch is not None:
                yield Handed(batch, {**place, "batches": place["origin"] + turn.number + 1, "reached": reached})

    def _places(self, base: Any, first: int) -> Iterator[tuple[Int[Tensor, " row"], tuple[int, int]]]:
        """Indices of rows in order, and the epoch and context at which they end."""
        members, keep = self._contents()
        size, seen = keep.shape[1], 0
        epoch, begin = base or (0, 0)
        while True:
            order = members if not epoch else members[permutation(f"{self.batching.seed}/{self.split}/epoch {epoch}", len(members))]
            for at in range(begin, len(order), CONTEXTS_AT_ONCE * self.world_size):
                until = min(at + CONTEXTS_AT_ONCE * self.world_size, len(order))
                contexts = order[at:until][self.rank :: self.world_size]
                within, positions = keep[contexts].nonzero(as_tuple=True)
                places = contexts[within] * size + positions
                yield places[max(first - seen, 0) :], (epoch, until)
                seen += len(places)
            log.warning(
                "the cached %s split's %d contexts are exhausted; epoch %d begins, in another order", self.split, len(order), epoch + 1
            )
            epoch, begin = epoch + 1, 0


def _members(folder: Folder, tokens: Tensor | None, split: Split, held_out: float, ours: bool) -> Int[Tensor, " context"]:
    if ours:
        return torch.arange(len(folder))
    contents = (row.tolist() for row in tokens) if tokens is not None else ([index] for index in range(len(folder)))
    return torch.tensor([index for index, ids in enumerate(contents) if split_of(ids, held_out) == split], dtype=torch.long)


def _fill(held: Tensor, slots: Tensor, source: Iterator[tuple[Tensor, Any]], left: Tensor | None) -> tuple[Tensor | None, Any]:
    """Write the next indices into these slots; returns the rest, and the new position if reading advanced."""
    reached = None
    while len(slots):
        if left is None or not len(left):
            left, reached = next(source)
            continue
        count = min(len(left), len(slots))
        held[slots[:count]] = left[:count]
        slots, left = slots[count:], left[count:]
    return left, reached


def write(
    path: Path, streams: Mapping[Split, ActivationStream], identity: Mapping[str, Any], about: Mapping[str, Any], *, shard_contexts: int,
    dtype: str,
) -> None:  # fmt: skip
    """Write the activations of these streams to a cache, split by split and shard by shard. Continues a stopped call."""
    if (path / RECORD).exists():
        raise InputError(f"cache: {path} is there and whole: name another folder, or train from it")
    shards: dict[Split, dict[str, int]] = {}
    for split, stream in streams.items():
        widths, context_size = stream.language_model.widths, stream.batching.context_size
        writer = ShardWriter(path / split, widths, context_size, dtype=dtype, identity={**identity, "dtype": dtype, "hooks": list(widths)})
        rows = stream.rows(writer.place)
        try:
            while rows.number < stream.tokens and writer.write(_passes(rows, shard_contexts, stream.tokens), rows.state):
                log.warning("%s: %s of %s tokens, %d shards", path / split, f"{rows.number:,}", f"{stream.tokens:,}", len(writer.shards))
        finally:
            rows.close()
        if not writer.shards:
            raise InputError(f"corpus: the {split} split does not fill one context of {context_size} tokens")
        writer.finish()
        shards[split] = writer.shards
    finish(path, {**identity, "dtype": dtype}, about, shards)


def _passes(rows: Rows, contexts: int, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Forward passes of one shard."""
    given = 0
    while given < contexts and rows.number < most and (taken := rows.take()) is not None:
        given += len(taken[0])
        rows.forget(rows.number // rows.batching.block)  # writing continues at a shard's end, without a buffer
        yield taken[0], rows.forward(taken[0])
