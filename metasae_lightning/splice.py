"""What a language model loses when an SAE's reconstruction stands in for its activations."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

from metasae_lightning import functional
from metasae_lightning.reader import LanguageModel

WAYS = ("clean", "sae", "zero", "mean")


class Splice(Metric):
    """Cross-entropy and KL divergence of a model's predictions with activations replaced, against its own.

    `ce_clean`, `ce_sae`, `ce_zero` (activations replaced by 0) and `ce_mean` (by their mean); `recovered_zero` and `recovered_mean`, the
    share of the loss between ablation and the clean model that the reconstruction keeps; `kl`, of the spliced from the clean predictions.

    >>> metric = Splice()
    >>> logits = {"clean": torch.tensor([[[9.0, 0.0], [0.0, 0.0]]]), "zero": torch.zeros(1, 2, 2), "mean": torch.zeros(1, 2, 2)}
    >>> metric.update(torch.tensor([[0, 0]]), {**logits, "sae": logits["clean"]})
    >>> figures = metric.compute()
    >>> figures["recovered_zero"].item(), figures["kl"].item()
    (1.0, 0.0)
    """

    full_state_update = False
    tokens: Tensor
    losses: Tensor
    divergence: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("losses", torch.zeros(len(WAYS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("divergence", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        tokens: Int[Tensor, "context position"],
        logits: dict[str, Float[Tensor, "context position vocabulary"]],
        counted: Bool[Tensor, "context position"] | None = None,
    ) -> None:
        """Add contexts: their tokens, the predictions in each of the four ways, and which tokens' prediction counts (all, if not told)."""
        # The prediction at a position is of the token that follows.
        chosen = torch.ones_like(tokens[:, 1:], dtype=torch.bool) if counted is None else counted[:, 1:]
        for place, way in enumerate(WAYS):
            self.losses[place] += functional.cross_entropy(logits[way][:, :-1], tokens[:, 1:])[chosen].double().sum()
        self.divergence += functional.kl_divergence(logits["clean"][:, :-1], logits["sae"][:, :-1])[chosen].double().sum()
        self.tokens += chosen.sum()

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        clean, sae, zero, mean = self.losses / self.tokens
        figures = {f"ce_{way}": value for way, value in zip(WAYS, (clean, sae, zero, mean), strict=True)}
        figures |= {"recovered_zero": (zero - sae) / (zero - clean), "recovered_mean": (mean - sae) / (mean - clean)}
        return {**figures, "kl": self.divergence / self.tokens}


@torch.no_grad()
def splice(
    model: LanguageModel,
    contexts: Iterable[
        tuple[Int[Tensor, "context position"], Bool[Tensor, "context position position"] | None, Bool[Tensor, "context position"]]
    ],
    rebuild: Callable[[Float[Tensor, "row d_in"]], Float[Tensor, "row d_in"]],
    mean: Float[Tensor, " d_in"],
    metric: Splice,
) -> None:
    """Run a complete model in the four ways on contexts: their tokens, what each may attend to, and which positions are replaced.

    Positions that an SAE was not trained on (special tokens, the first few) keep their activations in all four, and the prediction of
    special tokens does not count.
    """

    def edited(by: Callable[[Tensor], Tensor], where: Tensor) -> Callable[[Tensor], Tensor]:
        def edit(found: Tensor) -> Tensor:
            return found.index_put((where,), by(found[where]).to(found.dtype))

        return edit

    for tokens, visible, where in contexts:
        here = where.to(model.device)
        edits = {
            "sae": rebuild,
            "zero": torch.zeros_like,
            "mean": lambda rows: mean.to(rows).expand_as(rows),
        }
        logits = {"clean": model.logits(tokens, visible)}
        logits |= {way: model.logits(tokens, visible, edit=edited(by, here)) for way, by in edits.items()}
        metric.update(tokens.to(here.device), logits, here)
