"""The order in which numbered rows leave a buffer of bounded size: pure index arithmetic."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Turn:
    """The moves of one batch."""

    number: int
    """Number of the batch."""
    block: int
    """Number of its block of rows."""
    base: Int[Tensor, " row"]
    """Slot of each row of that block, by row number."""
    after: Int[Tensor, " row"]
    """Slot of each row of the next block, once it is complete."""
    taken: Int[Tensor, " batch"]
    """Slots of the batch's rows."""
    refill: Int[Tensor, " free"]
    """Slots among them that the next rows are written to, in order."""


def turns(block: int, total: int, *, first: int = 0, batch: int, order: Callable[[int, int], Int[Tensor, " row"]]) -> Iterator[Turn]:
    """Yield the moves of each batch. Rows are numbered; block k holds rows `k * block` to `(k + 1) * block`, and is shuffled by itself.

    A slot that a batch has emptied takes a row of the next block, so the buffer holds one block. Starts with block `first`, whose rows
    lie in their slots in order.

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
    """A random permutation that depends on its key alone.

    >>> sorted(permutation("a", 3).tolist()), torch.equal(permutation("a", 99), permutation("b", 99))
    ([0, 1, 2], False)
    """
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))
