"""A shuffle of numbered rows through a buffer of bounded size: pure index arithmetic."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class BatchMove:
    """The slots of the buffer that one batch is read from, and those of them that are refilled with rows of the next block."""

    number: int
    """Number of the batch."""
    block: int
    """Number of the block of rows that the batch belongs to."""
    block_slots: Int[Tensor, " row"]
    """The slot of each row of that block, in the order of the rows' numbers."""
    next_block_slots: Int[Tensor, " row"]
    """The slot of each row of the next block, once all of its rows are in the buffer, in the same order."""
    batch_slots: Int[Tensor, " batch"]
    """The slots that hold the rows of the batch."""
    refill_slots: Int[Tensor, " free"]
    """The slots of the batch that the following rows of the next block are written to, in this order."""


def batch_moves(
    block_size: int, total: int, *, first_block: int = 0, batch_size: int, order: Callable[[int, int], Int[Tensor, " row"]]
) -> Iterator[BatchMove]:
    """The moves of all batches, in order.

    The `total` rows are numbered in the order in which they are read. Block k holds the rows `k * block_size` to
    `(k + 1) * block_size - 1`, and its `length` rows leave the buffer in the order of the permutation `order(k, length)`. Each slot that a
    batch leaves is filled with a row of the next block, so the buffer never holds more than `block_size` rows. The first move belongs to
    block `first_block`, whose rows are in the buffer in order.

    >>> moves = batch_moves(4, 6, batch_size=2, order=lambda block, length: torch.arange(length).flip(0))
    >>> [(move.batch_slots.tolist(), move.refill_slots.tolist()) for move in moves]
    [([3, 2], [3, 2]), ([1, 0], []), ([2, 3], [])]
    """
    begin = first_block * block_size
    slots = torch.arange(min(block_size, total - begin))
    for start in range(begin, total, block_size):
        length, next_length = min(block_size, total - start), max(min(block_size, total - start - block_size), 0)
        block_slots = slots[:length]
        slots = block_slots[order(start // block_size, length)]
        for offset in range(0, length, batch_size):
            batch_slots = slots[offset : offset + batch_size]
            refill_slots = batch_slots[: max(next_length - offset, 0)]
            yield BatchMove((start + offset) // batch_size, start // block_size, block_slots, slots, batch_slots, refill_slots)


def permutation(key: str, length: int) -> Int[Tensor, " row"]:
    """A random order of `length` items that depends on `key` alone.

    >>> sorted(permutation("a", 3).tolist()), torch.equal(permutation("a", 99), permutation("b", 99))
    ([0, 1, 2], False)
    """
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))
