"""Firing thresholds for inference, where no batch is there to rank latents against."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning.errors import InputError
from metasae_lightning.sparse import largest


@torch.no_grad()
def global_threshold(
    pre_activations: Callable[[Tensor], Float[Tensor, "batch d_sae"]],
    samples: Sequence[Tensor],
    target_l0: float,
    *,
    now: Tensor | float = 0.0,
) -> tuple[float, float]:
    """The one threshold at which latents fire `target_l0` times a token on these samples, exactly but for ties; and L0 at the one of `now`.

    It is the `target_l0 * tokens`-th largest pre-activation of the sample. Each batch offers what lies above a cut, which the first
    batch's largest few set; where that was too little, they set it anew with twice as many.

    >>> global_threshold(lambda x: x, [torch.tensor([[3.0, 1.0], [2.0, 0.5]])], target_l0=1.0)
    (1.5, 2.0)
    """
    tokens = sum(len(x) for x in samples)
    wanted, share = max(1, round(target_l0 * tokens)), 2.0
    while True:
        offers: list[Tensor] = []
        cut, active = 0.0, 0
        for x in samples:
            values = pre_activations(x).relu().flatten()
            if not values.isfinite().all():
                raise InputError("the SAE has diverged: its activations are not finite, and no threshold can be set")
            active += int((values.view(len(x), -1) > now).count_nonzero())
            few = int(share * target_l0 * len(x)) + 1
            if not offers and few < int(values.count_nonzero()):
                cut = values[largest(values, few)].min().item()
            offers.append(values[values > cut])
        pooled = torch.cat(offers)
        if pooled.numel() > wanted:
            kept, dropped = pooled.topk(wanted + 1).values[-2:].tolist()
            return (kept + dropped) / 2, active / tokens
        if cut == 0:
            return 0.0, active / tokens
        share *= 2
