"""Matrices whose latents are sharded among ranks as DTensors, and the autograd functions that sum across ranks."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from metasae_lightning.compute.process_group import Parallelism, ProcessGroup
from metasae_lightning.compute.transfers import copy_to


def shard_parameters(module: nn.Module, mesh: Any, dimensions: Mapping[str, int]) -> None:
    """Shard each of a module's own parameters that `dimensions` names along its dimension, and replicate the others.

    The module gets new parameters; those of its submodules are left alone. Every rank has the full values beforehand, so nothing is sent,
    and only a rank's shard moves to its device. The size of the mesh must divide each sharded dimension evenly.
    """
    for name, parameter in list(module.named_parameters(recurse=False)):
        placement = Shard(dimensions[name]) if name in dimensions else Replicate()
        # A copy, so that the full parameter can be freed.
        shard = _shard_of(parameter.detach(), mesh, placement).clone(memory_format=torch.contiguous_format)
        setattr(module, name, nn.Parameter(DTensor.from_local(shard, mesh, [placement], run_check=False)))


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds only a shard of the tensor."""
    return isinstance(tensor, DTensor) and isinstance(tensor.placements[0], Shard)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, as a view: gradients flow back to `tensor`, and writes change it. A plain tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The full tensor on every rank. Backward: each rank contributes a part of the gradient, and the parts are summed."""
    return tensor.full_tensor(grad_placements=[Partial()]) if isinstance(tensor, DTensor) else tensor


def shard_offset(tensor: Tensor, group: ProcessGroup) -> int:
    """Index in the full tensor of the first row of this rank's shard; 0 for a tensor that is no DTensor."""
    return group.rank * len(local(tensor)) if isinstance(tensor, DTensor) else 0


def local_indices(indices: Int[Tensor, " row"], tensor: Tensor, group: ProcessGroup) -> Int[Tensor, " local"]:
    """The row indices of the full tensor that lie in this rank's shard, as indices into the shard."""
    if not isinstance(tensor, DTensor):
        return indices
    begin = shard_offset(tensor, group)
    return indices[(indices >= begin) & (indices < begin + len(local(tensor)))] - begin


@torch.no_grad()
def copy_into(tensor: Tensor, values: Tensor) -> None:
    """Copy full values, which every rank has, into a tensor that may be sharded."""
    if isinstance(tensor, DTensor):
        values = _shard_of(values, tensor.device_mesh, tensor.placements[0])
    local(tensor).copy_(values)


@torch.no_grad()
def full_state_dict(state: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """All tensors in full, on the CPU, on ranks that pass `keep=True`; an empty dict on other ranks. All ranks must call it."""
    full_tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        full_tensor = full(tensor.detach())
        if keep:
            full_tensors[name] = full_tensor.cpu()
    return full_tensors


def local_rows(decoder: Tensor, indices: Int[Tensor, " row"] | None, parallelism: Parallelism) -> Int[Tensor, " local"] | None:
    """Indices, into this rank's shard, of the rows that this rank should process; None means every row of the shard.

    `indices` limits the work to some rows of the full decoder. Ranks of a data-parallel group divide the rows among them.
    """
    if indices is not None:
        indices = local_indices(indices, decoder, parallelism.tensor_group)
    if not parallelism.data_group.is_single:
        indices = torch.arange(len(local(decoder))) if indices is None else indices
        indices = indices[parallelism.data_group.even_slice(len(indices))]
    return None if indices is None else copy_to(indices, decoder.device)


def all_reduce_sum(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Forward: the sum over ranks. Backward: the identity."""
    return tensor if group.is_single else _AllReduceSum.apply(tensor, group)  # type: ignore[return-value]


def replicated(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """A replicated tensor that every rank uses in a part of the computation. Forward: the identity. Backward: the sum over ranks."""
    return tensor if group.is_single else _Replicated.apply(tensor, group)  # type: ignore[return-value]


class _AllReduceSum(torch.autograd.Function):
    """Forward: the sum over ranks. Backward: the identity."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        return group.sum_tensor(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradients[0], None


class _Replicated(torch.autograd.Function):
    """Forward: the identity. Backward: the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.group.sum_tensor(gradients[0]), None


def _shard_of(tensor: Tensor, mesh: Any, placement: Any) -> Tensor:
    """This rank's shard of a full tensor; a replicated tensor as it is."""
    return tensor.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()] if isinstance(placement, Shard) else tensor
