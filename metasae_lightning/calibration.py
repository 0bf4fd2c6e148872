"""Firing thresholds for inference, where no batch is there to rank latents against."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning.errors import InputError


@torch.no_grad()
def global_threshold(
    pre_activations: Callable[[Tensor], Float[Tensor, "batch d_sae"]], samples: Sequence[Tensor], target_l0: float
) -> float:
    """The one threshold at which latents fire `target_l0` times a token on these samples, exactly but for ties.

    It is the `target_l0 * tokens`-th largest pre-activation of the sample. Each batch offers its largest few; where those might not
    have been enough, it offers twice as many.

    >>> global_threshold(lambda x: x, [torch.tensor([[3.0, 1.0], [2.0, 0.5]])], target_l0=1.0)
    1.5
    """
    tokens = sum(len(x) for x in samples)
    wanted = max(1, round(target_l0 * tokens))
    share = 4.0
    while True:
        offers: list[Tensor] = []
        floor = 0.0
        for x in samples:
            values = pre_activations(x).relu().flatten()
            if not values.isfinite().all():
                raise InputError("the SAE has diverged: its activations are not finite, and no threshold can be set")
            offered = values.topk(min(values.numel(), int(share * target_l0 * len(x)) + 1)).values
            floor = max(floor, offered[-1].item() if offered.numel() < values.numel() else 0.0)
            offers.append(offered)
        pooled = torch.cat(offers)
        if pooled.numel() <= wanted:
            return 0.0
        kept, dropped = pooled.topk(wanted + 1).values[-2:].tolist()
        if dropped >= floor:
            return (kept + dropped) / 2
        share *= 2
