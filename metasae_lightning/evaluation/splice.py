"""Run a language model with SAE reconstructions spliced into its activations, and measure its loss."""

from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.lm.base import LanguageModel
from metasae_lightning.metrics.loss_recovered import Splice

Rebuild = Callable[[Float[Tensor, "row d_in"]], Float[Tensor, "row d_in"]]


@torch.no_grad()
def losses(
    model: LanguageModel,
    tokens: Int[Tensor, "context position"],
    visible: Bool[Tensor, "context position position"] | None,
    where: Bool[Tensor, "context position"],
    rebuild: Mapping[str, Rebuild],
    mean: Float[Tensor, " d_in"],
) -> dict[str, Float[Tensor, "kind context next"]]:
    """Losses of each token after the first, by the names in `rebuild`, in the order of `loss_recovered.LOSS_KINDS` and in nats.

    The clean model and the ablations run once for all reconstructions. `where` marks the positions that are replaced. Positions that an SAE
    was not trained on (special tokens, the first few) keep their activations in every case.
    """
    replaced, targets = where.to(model.device), tokens[:, 1:].to(model.device)

    def logits_with(rebuild_rows: Rebuild) -> Tensor:
        def edit(activations: Tensor) -> Tensor:
            return activations.index_put((replaced,), rebuild_rows(activations[replaced]).to(activations.dtype))

        return model.logits(tokens, visible, edit=edit)[:, :-1]

    clean = model.logits(tokens, visible)[:, :-1]
    ce_clean = functional.cross_entropy(clean, targets)
    ce_zero = functional.cross_entropy(logits_with(torch.zeros_like), targets)
    ce_mean = functional.cross_entropy(logits_with(lambda rows: mean.to(rows).expand_as(rows)), targets)
    losses_by_name: dict[str, Tensor] = {}
    for name, rebuild_rows in rebuild.items():
        logits = logits_with(rebuild_rows)
        losses_by_name[name] = torch.stack(
            [ce_clean, functional.cross_entropy(logits, targets), ce_zero, ce_mean, functional.kl_divergence(clean, logits)]
        ).cpu()
    return losses_by_name


def splice(
    model: LanguageModel,
    contexts: Iterable[
        tuple[Int[Tensor, "context position"], Bool[Tensor, "context position position"] | None, Bool[Tensor, "context position"]]
    ],
    rebuild: Rebuild,
    mean: Float[Tensor, " d_in"],
    metric: Splice,
) -> None:
    """Add the losses of contexts to a `Splice` metric.

    Each context has its tokens, its attention mask, and the mask of positions that are replaced and counted.
    """
    for tokens, visible, where in contexts:
        values = losses(model, tokens, visible, where, {"sae": rebuild}, mean)["sae"]
        metric.update(values.to(metric.device), where[:, 1:].to(metric.device))
