"""The order in which numbered rows leave a buffer of bounded size: pure index arithmetic."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Turn:
    """One batch's move."""

    number: int
    """Which batch it is."""
    block: int
    """Which block of rows it is taken from."""
    base: Int[Tensor, " row"]
    """The slot of each row of that block, in the order of their numbers."""
    after: Int[Tensor, " row"]
    """The slot of each row of the block that follows, once it is whole, in the same order."""
    taken: Int[Tensor, " batch"]
    """The slots whose rows are the batch."""
    refill: Int[Tensor, " free"]
    """Those of them that the next rows of the next block are written to, in this order."""


def turns(block: int, total: int, *, first: int = 0, batch: int, order: Callable[[int, int], Int[Tensor, " row"]]) -> Iterator[Turn]:
    """Rows are numbered as they come; block k holds numbers `k * block` up to `(k + 1) * block` and leaves in an order of its own.

    A slot that a batch has emptied takes a row of the next block, so the buffer never holds more than one block. Begins with the
    block number `first`, whose rows lie in their slots in order.

    >>> [(t.taken.tolist(), t.refill.tolist()) for t in turns(4, 6, batch=2, order=lambda block, length: torch.arange(length).flip(0))]
    [([3, 2], [3, 2]), ([1, 0], []), ([2, 3], [])]
    """
    begin = first * block
    slots = torch.arange(min(block, total - begin))
    for at in range(begin, total, block):
        here, after = min(block, total - at), max(min(block, total - at - block), 0)
        base = slots[:here]
        slots = base[order(at // block, here)]
        for within in range(0, here, batch):
            taken = slots[within : within + batch]
            yield Turn((at + within) // batch, at // block, base, slots, taken, taken[: max(after - within, 0)])


def permutation(key: str, length: int) -> Int[Tensor, " row"]:
    """A random order that is a function of its key alone.

    >>> sorted(permutation("a", 3).tolist()), torch.equal(permutation("a", 99), permutation("b", 99))
    ([0, 1, 2], False)
    """
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))
