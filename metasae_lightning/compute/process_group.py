"""What the processes of one run tell each other, and nothing where there is but one."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one SAE. Each calls the same methods in the same order."""

    rank: int = 0
    """Which it is."""
    world_size: int = 1
    """How many there are."""
    sent: list[int] | None = None
    """Bytes that were given away so far, where somebody counts."""
    group: Any = None
    """Torch's group of them; its default one where none is named."""

    @classmethod
    def joined(cls) -> "Ranks":
        """All that have joined torch's default group; this one alone where there is none."""
        there = dist.is_available() and dist.is_initialized()
        return cls(dist.get_rank(), dist.get_world_size()) if there else ALONE

    def within(self, group: Any) -> "Ranks":
        """Those of these that are in a group of torch's."""
        return Ranks(dist.get_rank(group), dist.get_world_size(group), self.sent, group)

    @property
    def alone(self) -> bool:
        """Whether there is nobody to talk to."""
        return self.world_size == 1

    def share(self, count: int) -> slice:
        """This rank's of so many things, in the order of ranks, as even as can be.

        >>> [Ranks(rank, 3).share(7) for rank in range(3)]
        [slice(0, 3, None), slice(3, 5, None), slice(5, 7, None)]
        """
        size, more = divmod(count, self.world_size)
        begin = self.rank * size + min(self.rank, more)
        return slice(begin, begin + size + (self.rank < more))

    def sum_(self, *tensors: Tensor | None) -> None:
        """Each tensor the sum over ranks, in place: the same bits on all of them."""
        self._reduce(tensors, dist.ReduceOp.SUM)

    def first_(self, *tensors: Tensor | None) -> None:
        """Each tensor what the first rank has, in place."""
        for tensor in tensors if not self.alone else ():
            if tensor is not None:
                dist.broadcast(tensor, group=self.group, group_src=0)
                self._count(tensor if self.rank == 0 else tensor[:0])

    def summed(self, part: Tensor) -> Tensor:
        """The sum over ranks; the part stays what it is."""
        whole = part.detach().clone()
        self.sum_(whole)
        return whole

    def largest_(self, *tensors: Tensor) -> None:
        """Each tensor the largest over ranks, in place."""
        self._reduce(tensors, dist.ReduceOp.MAX)

    def total(self, value: float, like: Tensor) -> float:
        """The sum over ranks of a number; `like` lies where messages are made."""
        return value if self.alone else self._of(value, like, self.sum_)

    def most(self, value: float, like: Tensor) -> float:
        """The largest over ranks of a number."""
        return value if self.alone else self._of(value, like, self.largest_)

    def each(self, value: int, like: Tensor) -> list[int]:
        """A number of every rank, in their order."""
        if self.alone:
            return [value]
        numbers = torch.zeros(self.world_size, dtype=torch.int64, device=like.device)
        numbers[self.rank] = value
        self.sum_(numbers)
        return numbers.tolist()

    def place(self, count: int, like: Tensor) -> slice:
        """Where this rank's are among so many things of each, in the order of ranks."""
        begin = sum(self.each(count, like)[: self.rank])
        return slice(begin, begin + count)

    def together(self, rows: Float[Tensor, "row d"]) -> Float[Tensor, "all d"]:
        """The rows of every rank, in their order."""
        if self.alone:
            return rows
        counts = self.each(len(rows), rows)
        parts = [rows.new_empty(count, *rows.shape[1:]) for count in counts]
        for rank, part in enumerate(parts):
            if rank == self.rank:
                part.copy_(rows)
            dist.broadcast(part, group=self.group, group_src=rank)
            self._count(part if rank == self.rank else part[:0])
        return torch.cat(parts)

    def beside(self, matrix: Float[Tensor, "row column"]) -> Float[Tensor, "row all"]:
        """Matrices of one shape, one of each rank, beside each other in their order."""
        if self.alone:
            return matrix
        parts = [torch.empty_like(matrix) for _ in range(self.world_size)]
        dist.all_gather(parts, matrix.contiguous(), group=self.group)
        self._count(matrix)
        return torch.cat(parts, 1)

    def _of(self, value: float, like: Tensor, by: Any) -> float:
        number = torch.tensor(value, dtype=torch.float64, device=like.device)
        by(number)
        return number.item()

    def _reduce(self, tensors: Iterable[Tensor | None], op: Any) -> None:
        if self.alone:
            return
        given = [tensor for tensor in tensors if tensor is not None]
        for work in [dist.all_reduce(tensor, op=op, group=self.group, async_op=True) for tensor in given]:
            assert work is not None
            work.wait()
        self._count(*given)

    def _count(self, *tensors: Tensor) -> None:
        if self.sent is not None:
            self.sent.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


ALONE = Ranks()
"""One process."""


@dataclass(frozen=True)
class Crew:
    """How the ranks divide the work on one SAE."""

    all: Ranks = ALONE
    """Every rank."""
    rows: Ranks = ALONE
    """Those that have this rank's latents, and other rows."""
    latents: Ranks = ALONE
    """Those that have this rank's rows, and other latents."""

    @classmethod
    def of(cls, ranks: Ranks, mesh: Any = None) -> "Crew":
        """Each has all latents, or, on a mesh of Lightning's, its part of them."""
        if mesh is None:
            return cls(ranks, ranks)
        return cls(ranks, ranks.within(mesh.get_group("data_parallel")), ranks.within(mesh.get_group("tensor_parallel")))

    @property
    def within(self) -> "Crew":
        """Those that have this rank's rows, as if there were no others."""
        return Crew(self.latents, ALONE, self.latents)
