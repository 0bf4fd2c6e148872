"""Torchmetric of the language model's loss with an SAE's reconstruction spliced in."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric

# Kinds of loss of each predicted token: four cross-entropies, and the divergence of the spliced from the clean prediction.
LOSS_KINDS = ("ce_clean", "ce_sae", "ce_zero", "ce_mean", "kl")


class Splice(Metric):
    """Cross-entropy and KL divergence of a language model's predictions with activations replaced, in nats per predicted token.

    `ce_clean`, `ce_sae`, `ce_zero` and `ce_mean` are cross-entropies of the clean model, with the reconstruction, with zeros and with the
    mean activation. `recovered_zero = (ce_zero - ce_sae) / (ce_zero - ce_clean)` is the share of the loss of ablation that the
    reconstruction recovers: 1 for the clean model's loss, 0 for that of ablation. `recovered_mean` is the same with `ce_mean`. `kl` is
    the divergence of the spliced from the clean predictions. `evaluation.splice.losses` computes the input.

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
        self.add_state("sums", torch.zeros(len(LOSS_KINDS), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: Float[Tensor, "kind context next"], counted: Bool[Tensor, "context next"]) -> None:
        """Add contexts: losses of each predicted token in the order of `LOSS_KINDS`, and the mask of tokens that count."""
        self.sums += losses.double().masked_fill(~counted, 0).sum((1, 2))
        self.tokens += counted.sum()

    def compute(self) -> dict[str, Tensor]:
        """Mean losses over tokens and the shares recovered."""
        return with_recovered_shares(self.sums / self.tokens)


def with_recovered_shares(means: Float[Tensor, "kind *resample"]) -> dict[str, Tensor]:
    """Mean losses by name, from `means` in the order of `LOSS_KINDS`, with the shares that the reconstruction recovers."""
    clean, sae, zero, mean, _ = means
    return {
        **dict(zip(LOSS_KINDS, means, strict=True)),
        "recovered_zero": (zero - sae) / (zero - clean),
        "recovered_mean": (mean - sae) / (mean - clean),
    }
