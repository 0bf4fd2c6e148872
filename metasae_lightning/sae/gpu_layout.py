"""The order of an encoder's weights in a GPU's memory: latent by latent, the order in which its gradient is computed."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from metasae_lightning.compute.row_chunks import is_blocked


def store_encoder_for_device(sae: nn.Module) -> None:
    """Store `W_enc` latent by latent on a GPU, and row by row on a CPU; its shape stays. A `W_enc` divided among ranks is not changed.

    Optimisers must be made after this.
    """
    W_enc = getattr(sae, "W_enc", None)
    if isinstance(W_enc, nn.Parameter) and not isinstance(W_enc, DTensor):
        W_enc.data = W_enc.data.contiguous() if is_blocked(W_enc) else W_enc.data.T.contiguous().T


def match_parameters(optimizer: Optimizer) -> None:
    """Store each tensor of the optimiser's state in its parameter's order; a checkpoint from another device may have another order."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            is_plain = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
            if is_plain and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
