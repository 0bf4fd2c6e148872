"""Torchmetric of the language model's loss with an SAE's reconstruction spliced in."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric

# What is known of each predicted token: its loss in four ways, and the divergence of the spliced prediction from the clean one.
KINDS = ("ce_clean", "ce_sae", "ce_zero", "ce_mean", "kl")


class Splice(Metric):
    """Cross-entropy and KL divergence of a model's predictions with activations replaced, against its own.

    `ce_clean`, `ce_sae`, `ce_zero` (activations replaced by 0) and `ce_mean` (by their mean); `recovered_zero` and `recovered_mean`, the
    share of the loss between ablation and the clean model that the reconstruction keeps; `kl`, of the spliced from the clean predictions.
    `losses` makes what it adds up.

    >>> metric = Splice()
    >>> metric.update(torch.tensor([[1.0], [2.0], [5.0], [3.0], [0.5]])[:, :, None], torch.ones(1, 1, dtype=torch.bool))
    >>> figures = metric.compute()
    >>> figures["recovered_zero"].item(), figures["recovered_mean"].item(), figures["kl"].item()
    (0.75, 0.5, 0.5)
    """

    full_state_update = False
    tokens: Tensor
    sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(len(KINDS), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: Float[Tensor, "kind context next"], counted: Bool[Tensor, "context next"]) -> None:
        """Add contexts: what is known of each predicted token, and which of them count."""
        self.sums += losses.double().masked_fill(~counted, 0).sum((1, 2))
        self.tokens += counted.sum()

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        return recovered(self.sums / self.tokens)


def recovered(means: Float[Tensor, "kind *resample"]) -> dict[str, Tensor]:
    """The figures of mean losses: these, and the share of them that the reconstruction keeps."""
    clean, sae, zero, mean, _ = means
    return {
        **dict(zip(KINDS, means, strict=True)),
        "recovered_zero": (zero - sae) / (zero - clean),
        "recovered_mean": (mean - sae) / (mean - clean),
    }
