"""Communication among the processes of one run. With a single process every operation is the identity."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class ProcessGroup:
    """Processes that communicate, seen from one of them. Each calls the same methods in the same order."""

    rank: int = 0
    """Index of this process in the group."""
    world_size: int = 1
    """Number of processes in the group."""
    bytes_sent: list[int] | None = None
    """Sizes of the messages sent by this process; None does not count them."""
    group: Any = None
    """Torch's process group; None is torch's default group."""

    @classmethod
    def default(cls) -> "ProcessGroup":
        """All processes of torch's default group, or a single process if there is none."""
        initialized = dist.is_available() and dist.is_initialized()
        return cls(dist.get_rank(), dist.get_world_size()) if initialized else SINGLE

    def subgroup(self, group: Any) -> "ProcessGroup":
        """The processes of one of torch's process groups. The sizes of their messages go into the same list `bytes_sent`."""
        return ProcessGroup(dist.get_rank(group), dist.get_world_size(group), self.bytes_sent, group)

    @property
    def is_single(self) -> bool:
        """Whether the group has one process only."""
        return self.world_size == 1

    def even_slice(self, count: int) -> slice:
        """This rank's slice of `count` items that are divided among ranks as evenly as possible.

        >>> [ProcessGroup(rank, 3).even_slice(7) for rank in range(3)]
        [slice(0, 3, None), slice(3, 5, None), slice(5, 7, None)]
        """
        size, remainder = divmod(count, self.world_size)
        begin = self.rank * size + min(self.rank, remainder)
        return slice(begin, begin + size + (self.rank < remainder))

    def all_reduce_sum_(self, *tensors: Tensor | None) -> None:
        """Replace each tensor by its sum over ranks, in place; None is skipped. All ranks get the same bits."""
        self._all_reduce(tensors, dist.ReduceOp.SUM)

    def all_reduce_max_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its elementwise maximum over ranks, in place."""
        self._all_reduce(tensors, dist.ReduceOp.MAX)

    def all_reduce_min_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its elementwise minimum over ranks, in place."""
        self._all_reduce(tensors, dist.ReduceOp.MIN)

    def broadcast_(self, *tensors: Tensor | None) -> None:
        """Replace each tensor by rank 0's, in place; None is skipped."""
        for tensor in tensors if not self.is_single else ():
            if tensor is not None:
                dist.broadcast(in_memory_order(tensor), group=self.group, group_src=0)
                self._count_bytes(tensor if self.rank == 0 else tensor[:0])

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, through which no gradient flows: a new tensor, or a view of `tensor` in a single process."""
        if self.is_single:
            return tensor.detach()
        total = tensor.detach().clone()
        self.all_reduce_sum_(total)
        return total

    def sum_scalar(self, value: float, like: Tensor) -> float:
        """The sum of a number over ranks; messages use the device of `like`."""
        return value if self.is_single else self._reduce_scalar(value, like, self.all_reduce_sum_)

    def max_scalar(self, value: float, like: Tensor) -> float:
        """The maximum of a number over ranks; messages use the device of `like`."""
        return value if self.is_single else self._reduce_scalar(value, like, self.all_reduce_max_)

    def gather_int(self, value: int, like: Tensor) -> list[int]:
        """The integer of every rank, ordered by rank; messages use the device of `like`."""
        if self.is_single:
            return [value]
        values = torch.zeros(self.world_size, dtype=torch.int64, device=like.device)
        values[self.rank] = value
        self.all_reduce_sum_(values)
        return values.tolist()

    def rank_slice(self, count: int, like: Tensor) -> slice:
        """The slice of this rank's `count` items in the concatenation of all ranks' items; messages use the device of `like`."""
        begin = sum(self.gather_int(count, like)[: self.rank])
        return slice(begin, begin + count)

    def all_gather_rows(self, rows: Float[Tensor, "row d"]) -> Float[Tensor, "all d"]:
        """The rows of all ranks, concatenated by rank; ranks may have different numbers of rows."""
        if self.is_single:
            return rows
        counts = self.gather_int(len(rows), rows)
        parts = [rows.new_empty(count, *rows.shape[1:]) for count in counts]
        for rank, part in enumerate(parts):
            if rank == self.rank:
                part.copy_(rows)
            dist.broadcast(part, group=self.group, group_src=rank)
            self._count_bytes(part if rank == self.rank else part[:0])
        return torch.cat(parts)

    def all_gather_columns(self, matrix: Float[Tensor, "row column"]) -> Float[Tensor, "row all"]:
        """The matrices of all ranks, which have one shape, concatenated along columns by rank."""
        if self.is_single:
            return matrix
        parts = [torch.empty_like(matrix) for _ in range(self.world_size)]
        dist.all_gather(parts, matrix.contiguous(), group=self.group)
        self._count_bytes(matrix)
        return torch.cat(parts, 1)

    def _reduce_scalar(self, value: float, like: Tensor, all_reduce_: Any) -> float:
        number = torch.tensor(value, dtype=torch.float64, device=like.device)
        all_reduce_(number)
        return number.item()

    def _all_reduce(self, tensors: Iterable[Tensor | None], operation: Any) -> None:
        if self.is_single:
            return
        present = [in_memory_order(tensor) for tensor in tensors if tensor is not None]
        for work in [dist.all_reduce(tensor, op=operation, group=self.group, async_op=True) for tensor in present]:
            assert work is not None
            work.wait()
        self._count_bytes(*present)

    def _count_bytes(self, *tensors: Tensor) -> None:
        if self.bytes_sent is not None:
            self.bytes_sent.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def in_memory_order(tensor: Tensor) -> Tensor:
    """The same memory as a contiguous tensor, as NCCL demands: a matrix that is stored column by column is transposed.

    >>> in_memory_order(torch.zeros(2, 3).T).shape
    torch.Size([2, 3])
    """
    return tensor.T if tensor.ndim == 2 and not tensor.is_contiguous() else tensor


SINGLE = ProcessGroup()
"""A group of one process."""


@dataclass(frozen=True)
class Parallelism:
    """How ranks divide the training of one SAE: by tokens, by latents, or both."""

    world: ProcessGroup = SINGLE
    """All ranks."""
    data_group: ProcessGroup = SINGLE
    """Data-parallel group: same shard of latents, different tokens."""
    tensor_group: ProcessGroup = SINGLE
    """Tensor-parallel group: same tokens, different shard of latents."""

    @classmethod
    def of(cls, world: ProcessGroup, mesh: Any = None) -> "Parallelism":
        """Data parallelism over all ranks; with Lightning's device mesh, its groups `data_parallel` and `tensor_parallel`."""
        if mesh is None:
            return cls(world, world)
        return cls(world, world.subgroup(mesh.get_group("data_parallel")), world.subgroup(mesh.get_group("tensor_parallel")))

    @property
    def tensor_only(self) -> "Parallelism":
        """The tensor-parallel group alone, without data parallelism."""
        return Parallelism(self.tensor_group, SINGLE, self.tensor_group)
