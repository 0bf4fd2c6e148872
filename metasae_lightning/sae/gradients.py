"""The gradients of an SAE and its head: summed over ranks, and clipped."""

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from metasae_lightning.compute.process_group import Parallelism
from metasae_lightning.compute.sharding import is_sharded, local


def reduce_gradients(module: nn.Module, parallelism: Parallelism) -> None:
    """Sum gradients over data ranks, and equalise those of replicated parameters. A rank without a gradient counts as zeros."""
    if parallelism.world.is_single:
        return
    if not parallelism.data_group.is_single:
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad and parameter.grad is None else parameter.grad
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    parallelism.data_group.all_reduce_sum_(*(local(gradient) for gradient in gradients))
    # Each rank adds up a replicated gradient in an order of its own: the first rank's result replaces the others.
    parallelism.tensor_group.broadcast_(*(local(gradient) for gradient in gradients if not is_sharded(gradient)))


def clip_gradients(sae: nn.Module, head: nn.Module | None, max_norm: float, *, together: bool) -> None:
    """Clip the norm of the gradient of SAE and head `together`, or of each separately: a head's gradient then does not change the SAE's."""
    modules = [sae] if head is None else [sae, head]
    for parts in [modules] if together else [[module] for module in modules]:
        clip_grad_norm_([parameter for part in parts for parameter in part.parameters()], max_norm)
