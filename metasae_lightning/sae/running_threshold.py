"""The running threshold of an SAE that ranks batches, by which it selects latents or groups at inference."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def update_threshold(sae: Any, threshold: float | Tensor, *, may_be_infinite: bool) -> None:
    """Move the SAE's running threshold towards a batch's threshold, as SAELens does, without a wait for a GPU.

    With `may_be_infinite`, an infinite tensor leaves the running threshold as it is; a float must be finite.
    """
    running, rate = sae.topk_threshold, sae.cfg.topk_threshold_lr
    if isinstance(threshold, Tensor) and may_be_infinite:
        running.copy_(torch.where(threshold.isinf(), running, torch.add((1 - rate) * running, threshold, alpha=rate)))
    elif isinstance(threshold, Tensor):
        running.mul_(1 - rate).add_(threshold, alpha=rate)
    else:
        sae.topk_threshold = (1 - rate) * running + rate * threshold
