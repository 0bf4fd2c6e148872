"""The stream of an activation cache, with the batches that the language model would give; and the writing of a cache."""

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
from metasae_lightning.data.batching import Batching, StreamSlice
from metasae_lightning.data.cache_folder import RECORD, ActivationCache, Folder, ShardWriter, finish
from metasae_lightning.data.forward_passes import RowReader
from metasae_lightning.data.masks import trainable_tokens
from metasae_lightning.data.shuffle import permutation
from metasae_lightning.data.stream import PreparedBatch, Stream
from metasae_lightning.errors import InputError

CONTEXTS_AT_ONCE = 16

log = logging.getLogger(__name__)


@final
class CachedStream(Stream):
    """Shuffled batches of the activations in a cache.

    Rows are numbered and shuffled as in `ActivationStream`. A run on one rank from a float32 cache of `metasae cache` therefore sees in its
    first epoch the same batches as a run of the model. Row indices into memory-mapped files are shuffled. Each context goes to one rank.
    Every later epoch reads the contexts in another order. A folder of SAELens has no documents: there the split of a context is chosen by
    a hash of its tokens, or of its index if the folder has no tokens.

    Args:
        cache: The opened cache.
        batching: Settings of the batches.
        part: The part of the data that this rank reads. Its `prefetch` of None is 0.
        special: Ids of the special tokens, which batches leave out.
    """

    def __init__(self, cache: ActivationCache, batching: Batching, part: StreamSlice, *, special: list[int]):
        super().__init__(batching, part)
        self.cache, self.special = cache, special
        self._split_contents: tuple[Tensor, Tensor] | None = None

    def description(self) -> dict[str, Any]:
        """The settings of the cache, the batches and the rank."""
        return {"cache": self.cache.record.get("identity", str(self.cache.path)), **asdict(self.batching), **self.part.settings}

    def load_other_world_size(self, states: list[dict[str, Any]]) -> None:
        """Continue from the states of a run with another number of ranks, after the last context that any of its ranks has read."""
        for state in states:
            self._check_description(state, ignored=("rank", "world_size"))
        n_batches = states[0]["batches"] * len(states) // self.part.world_size
        base = max((state["reached"] for state in states if state["reached"]), default=None)
        if base:
            log.warning(
                "restored on %d ranks instead of %d: goes on at context %d of epoch %d; batches are other ones",
                self.part.world_size,
                len(states),
                base[1],
                base[0],
            )
        self._position = {"batches": n_batches, "origin": n_batches, "base": base, "cursor": None, "reached": base}
        self._length = None

    def _base_after(self, reached: Any) -> Any:
        """The same epoch and context."""
        return reached

    def _contents(self) -> tuple[Tensor, Tensor]:
        """Indices of the split's contexts, and the mask of trainable tokens of all contexts in the folder."""
        if self._split_contents is None:
            folder = self.cache.folder(self.part.split)
            tokens = folder.tokens()
            mask = torch.ones(len(folder), folder.context_size, dtype=torch.bool)
            if tokens is None:
                mask[:, : max(int(self.batching.prepend_bos), self.batching.skip_positions)] = False
            else:
                mask = trainable_tokens(tokens, torch.tensor(self.special, dtype=torch.long), self.batching.skip_positions)
            contexts = _contexts_of_split(folder, tokens, self.part.split, self.batching.held_out, self.cache.ours)
            self._split_contents = contexts, mask
            if not mask[contexts].any():
                raise InputError(
                    f"cache: {folder.path} has not one row for the {self.part.split} split of held_out={self.batching.held_out}"
                )
        return self._split_contents

    def _available(self, base: Any) -> int:
        """Number of rows from `base` to the end of the split, at most the budget; the smallest number of any rank."""
        contexts, mask = self._contents()
        begin, world_size = base[1] if base else 0, self.part.world_size
        counts = [int(mask[contexts[begin:][rank::world_size]].sum()) for rank in range(world_size)]
        return min(min(counts), self.part.tokens)

    def _batches(self, position: dict[str, Any]) -> Generator[PreparedBatch, None, None]:
        """Every batch after a position; the buffer holds row indices in place of activations."""
        start = position["batches"] - position["origin"]
        first_row, moves = self._moves(position, start)
        total, block_size = (len(self) - position["origin"]) * self.batching.batch_size, self.batching.block_size
        folder, hooks = self.cache.folder(self.part.split), self.cache.widths
        source = self._row_indices(position["base"], first_row)
        buffer = torch.empty(min(block_size, total - first_row), dtype=torch.long)
        leftover, reached = _fill(buffer, torch.arange(len(buffer)), source, None)
        for move in moves:
            batch = None
            if move.number >= start:
                batch = self._batch(folder.rows(buffer[move.batch_slots]).to(self.batching.dtype), hooks)
            leftover, newly_reached = _fill(buffer, move.refill_slots, source, leftover)
            reached = newly_reached or reached
            if batch is not None:
                yield PreparedBatch(batch, {**position, "batches": position["origin"] + move.number + 1, "reached": reached})

    def _row_indices(self, base: Any, first_row: int) -> Iterator[tuple[Int[Tensor, " row"], tuple[int, int]]]:
        """Row indices in the order of the rows' numbers, from row `first_row` on, in pieces, each with the epoch and context after it."""
        split_contexts, mask = self._contents()
        context_size, number = mask.shape[1], 0
        rank, world_size = self.part.rank, self.part.world_size
        epoch, begin = base or (0, 0)
        while True:
            order = split_contexts
            if epoch:
                order = split_contexts[permutation(f"{self.batching.seed}/{self.part.split}/epoch {epoch}", len(split_contexts))]
            for at in range(begin, len(order), CONTEXTS_AT_ONCE * world_size):
                until = min(at + CONTEXTS_AT_ONCE * world_size, len(order))
                contexts = order[at:until][rank::world_size]
                within, positions = mask[contexts].nonzero(as_tuple=True)
                indices = contexts[within] * context_size + positions
                yield indices[max(first_row - number, 0) :], (epoch, until)
                number += len(indices)
            log.warning(
                "the cached %s split's %d contexts are exhausted; epoch %d begins, in another order", self.part.split, len(order), epoch + 1
            )
            epoch, begin = epoch + 1, 0


def _contexts_of_split(folder: Folder, tokens: Tensor | None, split: Split, held_out: float, ours: bool) -> Int[Tensor, " context"]:
    """Indices of a split's contexts in a folder: all of them in a cache of ours, which has a folder for each split."""
    if ours:
        return torch.arange(len(folder))
    contents = (row.tolist() for row in tokens) if tokens is not None else ([index] for index in range(len(folder)))
    return torch.tensor([index for index, ids in enumerate(contents) if split_of(ids, held_out) == split], dtype=torch.long)


def _fill(buffer: Tensor, slots: Tensor, source: Iterator[tuple[Tensor, Any]], leftover: Tensor | None) -> tuple[Tensor | None, Any]:
    """Write the next row indices into these slots of the buffer.

    Returns the indices of the last piece that are not in the buffer, and the position after that piece, or None if no piece was read.
    """
    reached = None
    while len(slots):
        if leftover is None or not len(leftover):
            leftover, reached = next(source)
            continue
        count = min(len(leftover), len(slots))
        buffer[slots[:count]] = leftover[:count]
        slots, leftover = slots[count:], leftover[count:]
    return leftover, reached


def write(
    path: Path, streams: Mapping[Split, ActivationStream], description: Mapping[str, Any], metadata: Mapping[str, Any], *,
    shard_contexts: int, dtype: str,
) -> None:  # fmt: skip
    """Write a cache of each stream's activations, in one folder for each split.

    A shard has `shard_contexts` contexts, rounded up to whole forward passes. After a stopped call, the next call continues after the last
    whole shard. An InputError is raised if `path` has a complete cache, or if a split does not fill one context.
    """
    if (path / RECORD).exists():
        raise InputError(f"cache: {path} is there and whole: name another folder, or train from it")
    shards: dict[Split, dict[str, int]] = {}
    for split, stream in streams.items():
        widths, context_size = stream.language_model.widths, stream.batching.context_size
        writer = ShardWriter(
            path / split, widths, context_size, dtype=dtype, description={**description, "dtype": dtype, "hooks": list(widths)}
        )
        reader = stream.row_reader(writer.reader_state)
        try:
            while reader.number < stream.part.tokens and writer.write(_passes(reader, shard_contexts, stream.part.tokens), reader.state):
                log.warning(
                    "%s: %s of %s tokens, %d shards", path / split, f"{reader.number:,}", f"{stream.part.tokens:,}", len(writer.shards)
                )
        finally:
            reader.close()
        if not writer.shards:
            raise InputError(f"corpus: the {split} split does not fill one context of {context_size} tokens")
        writer.finish()
        shards[split] = writer.shards
    finish(path, {**description, "dtype": dtype}, metadata, shards)


def _passes(reader: RowReader, shard_contexts: int, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens and activations of the forward passes of one shard; none begins after `limit` rows."""
    n_contexts = 0
    while n_contexts < shard_contexts and reader.number < limit and (contexts := reader.next_pass()) is not None:
        tokens, _ = contexts
        n_contexts += len(tokens)
        # A stopped call is resumed at the end of a shard and has no buffer: the positions of blocks are not needed.
        reader.forget_before(reader.number // reader.batching.block_size)
        yield tokens, reader.forward(tokens)
