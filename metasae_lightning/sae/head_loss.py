"""The loss of a head on codes, and how a head is trained with its SAE."""

import copy
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from metasae_lightning.sae.forward import ForwardPass
from metasae_lightning.sae.forward_result import HEAD_LOSS, ForwardResult

HeadTraining = Literal["joint", "detached", "frozen_sae"]
"""How a head is trained. `joint`: SAE and head minimise the error of the sum. `detached`: the head alone does so, and the SAE trains as
without a head. `frozen_sae`: as `detached`, and the SAE does not change."""


def build_head(head: Any, sae: Any, *, seed: int, freeze: bool) -> nn.Module:
    """A copy of a head with parameters for an SAE's codes, on the SAE's device and in its type, drawn from `seed` alone.

    `freeze` leaves the SAE's own parameters untrained.
    """
    head = copy.deepcopy(head)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with torch.device(sae.W_dec.device):
            head.build(sae.cfg.d_sae, sae.cfg.d_in)
    if freeze:
        sae.requires_grad_(False)
    return head.to(sae.W_dec.dtype)


def initialize_head(head: Any, forward_pass: ForwardPass, z: Float[Tensor, "row d_in"], dead: Bool[Tensor, " unit"]) -> None:
    """Initialise a head from the codes of the first rows."""
    result = forward_frozen(forward_pass, z, dead=dead, step=0)
    assert result.latent_codes is not None
    head.initialize(result.latent_codes())


def add_head(result: ForwardResult, head: nn.Module, z: Float[Tensor, "row d_in"], training: HeadTraining) -> ForwardResult:
    """A result with the head's loss: the change of the squared error by the head's output `h`.

    The mean over rows of `||xhat + h - x||^2 - ||xhat - x||^2` is that of `h . (h + 2 (xhat - x))`. It is 0 where the output is 0: the
    loss is then bit-equal to that without a head. Each row has the weight that it has in the architecture's own squared error: with other
    weights the sum of both could fall without limit. The architecture's other terms stay those of the SAE alone.
    """
    assert result.latent_codes is not None and result.differentiable is not None
    codes, linear, replaced = result.latent_codes(), result.reconstruction, result.replaced_by_objective
    if is_joint := training == "joint":
        linear, replaced = result.differentiable(), (*replaced, HEAD_LOSS)
    else:
        codes = replace(codes, values=codes.values.detach())
    output = head(codes).to(z.dtype)
    products, weights = output * (output + 2 * (linear - z)), result.error_weights
    change = (products if weights is None else weights * products).sum() / max(len(z), 1)
    rebuild, detached = result.rebuild, output.detach()
    return replace(
        result,
        loss=result.loss + change,
        losses={**result.losses, HEAD_LOSS: change},
        differentiable=(lambda: linear + output) if is_joint else result.differentiable,
        rebuild_with_head=lambda: rebuild() + detached,
        replaced_by_objective=replaced,
    )


@torch.no_grad()
def forward_frozen(
    forward_pass: ForwardPass,
    z: Float[Tensor, "row d_in"],
    *,
    dead: Bool[Tensor, " unit"],
    step: int,
    fresh_gradients: bool = False,
) -> ForwardResult:
    """The training forward pass without a gradient and without a change of the SAE's running statistics."""
    buffers = {name: buffer.clone() for name, buffer in forward_pass.sae.named_buffers()}
    with torch.random.fork_rng():
        result = forward_pass.train(z, dead=dead, step=step, fresh_gradients=fresh_gradients)
    for name, buffer in forward_pass.sae.named_buffers():
        buffer.copy_(buffers[name])
    return result
