"""What a language model loses when an SAE's reconstruction stands in for its activations."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

from metasae_lightning import functional
from metasae_lightning.reader import LanguageModel

Rebuild = Callable[[Float[Tensor, "row d_in"]], Float[Tensor, "row d_in"]]
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


@torch.no_grad()
def losses(
    model: LanguageModel,
    tokens: Int[Tensor, "context position"],
    visible: Bool[Tensor, "context position position"] | None,
    where: Bool[Tensor, "context position"],
    rebuild: Mapping[str, Rebuild],
    mean: Float[Tensor, " d_in"],
) -> dict[str, Float[Tensor, "kind context next"]]:
    """Losses of each token after the first, for each of several reconstructions; the clean model and the ablations run once.

    Positions that an SAE was not trained on (special tokens, the first few) keep their activations in all ways.
    """
    here, after = where.to(model.device), tokens[:, 1:].to(model.device)

    def run(by: Rebuild) -> Tensor:
        def edit(found: Tensor) -> Tensor:
            return found.index_put((here,), by(found[here]).to(found.dtype))

        return model.logits(tokens, visible, edit=edit)[:, :-1]

    clean = model.logits(tokens, visible)[:, :-1]
    ce_clean = functional.cross_entropy(clean, after)
    ce_zero = functional.cross_entropy(run(torch.zeros_like), after)
    ce_mean = functional.cross_entropy(run(lambda rows: mean.to(rows).expand_as(rows)), after)
    found: dict[str, Tensor] = {}
    for name, by in rebuild.items():
        logits = run(by)
        found[name] = torch.stack(
            [ce_clean, functional.cross_entropy(logits, after), ce_zero, ce_mean, functional.kl_divergence(clean, logits)]
        ).cpu()
    return found


def splice(
    model: LanguageModel,
    contexts: Iterable[
        tuple[Int[Tensor, "context position"], Bool[Tensor, "context position position"] | None, Bool[Tensor, "context position"]]
    ],
    rebuild: Rebuild,
    mean: Float[Tensor, " d_in"],
    metric: Splice,
) -> None:
    """Run a complete model on contexts: their tokens, what each may attend to, and which positions are replaced and count."""
    for tokens, visible, where in contexts:
        found = losses(model, tokens, visible, where, {"sae": rebuild}, mean)["sae"]
        metric.update(found.to(metric.device), where[:, 1:].to(metric.device))
