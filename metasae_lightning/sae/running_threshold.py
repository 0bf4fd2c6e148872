"""The running threshold of a batch top-k SAE, by which it selects latents at inference."""

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from torch import Tensor


@torch.no_grad()
def update_threshold(sae: BatchTopKTrainingSAE, threshold: float | Tensor, *, may_be_infinite: bool) -> None:
    """Move the SAE's running threshold towards a batch's threshold, as SAELens does, without a wait for a GPU.

    With `may_be_infinite`, an infinite tensor leaves the running threshold where it is; a float must be finite.
    """
    old, rate = sae.topk_threshold, sae.cfg.topk_threshold_lr
    if isinstance(threshold, Tensor):
        new = torch.where(threshold.isinf(), old, threshold) if may_be_infinite else threshold
        old.mul_(1 - rate).add_(new, alpha=rate)
    else:
        sae.topk_threshold = (1 - rate) * old + rate * threshold
