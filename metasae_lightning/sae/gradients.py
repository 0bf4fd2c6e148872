"""The gradients of an SAE that several ranks train."""

import torch
from torch import nn

from metasae_lightning.compute.process_group import Parallelism
from metasae_lightning.compute.sharding import is_sharded, local


def reduce_gradients(sae: nn.Module, parallelism: Parallelism) -> None:
    """Sum gradients over data ranks, of which one without a gradient gives zeros, and equalise those of replicated parameters."""
    if parallelism.world.is_single:
        return
    if not parallelism.data_group.is_single:
        for parameter in sae.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad and parameter.grad is None else parameter.grad
    gradients = [parameter.grad for parameter in sae.parameters() if parameter.grad is not None]
    parallelism.data_group.all_reduce_sum_(*(local(gradient) for gradient in gradients))
    # Each rank adds up a replicated gradient in an order of its own: the first rank's result replaces the others.
    parallelism.tensor_group.broadcast_(*(local(gradient) for gradient in gradients if not is_sharded(gradient)))
