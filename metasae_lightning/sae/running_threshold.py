"""Running statistics of an SAE in training, such as the threshold by which it selects latents or groups at inference."""

from typing import Any

import torch
from torch import Tensor, nn

from metasae_lightning.compute.process_group import ProcessGroup


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


@torch.no_grad()
def average_buffers(sae: nn.Module, ranks: ProcessGroup) -> None:
    """Replace the running statistics, which are the floating-point buffers, by their means over ranks that each updated their own."""
    statistics = [buffer for buffer in sae.buffers() if buffer.is_floating_point()]
    ranks.all_reduce_sum_(*statistics)
    for statistic in statistics:
        statistic /= ranks.world_size
