"""Matrices whose latents are divided among ranks, as torch's DTensor has them, and the sums that gradients take across ranks."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from metasae_lightning.compute.process_group import Crew, Ranks


def divide(module: nn.Module, mesh: Any, along: Mapping[str, int]) -> None:
    """Have each rank of a mesh keep its part of these parameters, each along its dimension, and all of every other one.

    Every rank has the same values before: nothing is sent, and no more than its part moves to its device. Dimensions divide evenly.
    """
    for name, parameter in list(module.named_parameters(recurse=False)):
        place = Shard(along[name]) if name in along else Replicate()
        # In memory of its own: what was divided can be let go of.
        part = _part(parameter.detach(), mesh, place).clone(memory_format=torch.contiguous_format)
        setattr(module, name, nn.Parameter(DTensor.from_local(part, mesh, [place], run_check=False)))


def divided(tensor: Tensor) -> bool:
    """Whether a rank has no more than its part of it."""
    return isinstance(tensor, DTensor) and isinstance(tensor.placements[0], Shard)


def own(tensor: Tensor) -> Tensor:
    """This rank's part of what is divided; a gradient goes back to it, and what is written into it stays."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of what is divided, on every rank: each makes a part of its gradient, and they add up."""
    return tensor.full_tensor(grad_placements=[Partial()]) if isinstance(tensor, DTensor) else tensor


def first(tensor: Tensor, ranks: Ranks) -> int:
    """Which row of the whole is the first of this rank's part, of those that have other rows of it."""
    return ranks.rank * len(own(tensor)) if isinstance(tensor, DTensor) else 0


def mine(chosen: Int[Tensor, " row"], tensor: Tensor, ranks: Ranks) -> Int[Tensor, " own"]:
    """Those of some rows of the whole that this rank has, by their numbers in its part."""
    if not isinstance(tensor, DTensor):
        return chosen
    begin = first(tensor, ranks)
    return chosen[(chosen >= begin) & (chosen < begin + len(own(tensor)))] - begin


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Give a tensor, divided or not, these values, which every rank has all of."""
    if isinstance(tensor, DTensor):
        values = _part(values, tensor.device_mesh, tensor.placements[0])
    own(tensor).copy_(values)


@torch.no_grad()
def gathered(state: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Everything whole, in ordinary memory, where it is to be kept; every rank takes part."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        all_of_it = whole(tensor.detach())
        if keep:
            found[name] = all_of_it.cpu()
    return found


def share(decoder: Tensor, chosen: Int[Tensor, " row"] | None, crew: Crew) -> Int[Tensor, " own"] | None:
    """Which of this rank's decoder rows are its share of the work on those `chosen` of the whole, or on all; none is all it has."""
    if chosen is not None:
        chosen = mine(chosen, decoder, crew.latents)
    if not crew.rows.alone:
        chosen = torch.arange(len(own(decoder))) if chosen is None else chosen
        chosen = chosen[crew.rows.share(len(chosen))]
    return None if chosen is None else chosen.to(decoder.device)


def added(part: Tensor, ranks: Ranks) -> Tensor:
    """The sum of what each rank has made, on all of them: each one's part takes the gradient of the sum."""
    return part if ranks.alone else _Added.apply(part, ranks)  # type: ignore[return-value]


def shared(tensor: Tensor, ranks: Ranks) -> Tensor:
    """What all ranks have alike and each makes a part of what follows from: its gradient is the sum of theirs."""
    return tensor if ranks.alone else _Shared.apply(tensor, ranks)  # type: ignore[return-value]


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        return ranks.summed(part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradients[0], None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.ranks.summed(gradients[0]), None


def _part(tensor: Tensor, mesh: Any, place: Any) -> Tensor:
    """A rank's part of what it has all of."""
    return tensor.chunk(mesh.size(), place.dim)[mesh.get_local_rank()] if isinstance(place, Shard) else tensor
