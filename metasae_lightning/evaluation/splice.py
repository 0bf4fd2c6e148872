"""Run a language model with SAE reconstructions spliced into its activations, and measure its loss."""

from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.lm.base import LanguageModel
from metasae_lightning.lm.predictions import Edit
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

    The clean model and the ablations run once for all reconstructions, and the layers before the hook once for all of these. `where` marks
    the positions that are replaced. Positions that an SAE was not trained on (special tokens, the first few) keep their activations in
    every case. The losses are on the model's device; with `tokens` and `where` on the CPU, the host does not wait for them.
    """
    # Indices of a mask on a GPU would make the host wait for their number.
    positions = where.flatten().nonzero().flatten().to(model.device, non_blocking=True)
    targets = tokens[:, 1:].to(model.device, non_blocking=True)

    def edit_with(rebuild_rows: Rebuild) -> Edit:
        def edit(activations: Tensor) -> Tensor:
            rows = activations.flatten(0, 1)
            rebuilt = rebuild_rows(rows.index_select(0, positions)).to(rows.dtype)
            return rows.index_copy(0, positions, rebuilt).view_as(activations)

        return edit

    ablations = [None, edit_with(torch.zeros_like), edit_with(lambda rows: mean.to(rows).expand_as(rows))]
    logits_of_edits = model.logits_of_edits(tokens, visible, [*ablations, *(edit_with(rows) for rows in rebuild.values())])
    clean = next(logits_of_edits)[:, :-1]
    ce_clean = functional.cross_entropy(clean, targets)
    ce_zero, ce_mean = (functional.cross_entropy(next(logits_of_edits)[:, :-1], targets) for _ in range(2))
    losses_by_name: dict[str, Tensor] = {}
    for name, logits in zip(rebuild, logits_of_edits, strict=True):
        ce_sae, kl = functional.cross_entropy(logits[:, :-1], targets), functional.kl_divergence(clean, logits[:, :-1])
        losses_by_name[name] = torch.stack([ce_clean, ce_sae, ce_zero, ce_mean, kl])
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
        metric.update(values.to(metric.device), where[:, 1:].to(metric.device, non_blocking=True))
