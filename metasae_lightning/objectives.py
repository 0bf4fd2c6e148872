"""Objectives: losses of the primary's reconstruction in place of the architecture's squared error."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from metasae_lightning import functional
from metasae_lightning.errors import InputError
from metasae_lightning.step import Contexts, ReconstructionLoss

if TYPE_CHECKING:  # importing it takes seconds, which training without an objective need not wait for
    from metasae_lightning.lm.base import LanguageModel
    from metasae_lightning.lm.hooks import HookLocation
    from metasae_lightning.lm.predictions import Prediction

Kind = Literal["kl", "kl+downstream"]
Terms = Mapping[str, Tensor]


class Objective(ABC):
    """A loss of the primary's reconstruction in place of the architecture's squared error; its other terms and penalties are added."""

    contexts_at_once: int
    """Contexts in one pass of the language model."""

    @abstractmethod
    def check(self, data: Any) -> None:
        """Raise an `InputError` for data that the objective cannot be computed on, before anything is loaded."""

    @abstractmethod
    def use(self, model: "LanguageModel") -> None:
        """Run this language model, whose first hook is the SAE's; its layers after the hook are loaded too."""

    @abstractmethod
    def loss(self, reconstruction: Float[Tensor, "row d_in"], contexts: Contexts) -> tuple[Float[Tensor, ""], Terms]:
        """The loss with its gradient, as a mean over the rows, and its terms by name, for the logs."""

    def setup(self, data: Any) -> None:
        """Called before training, after the language model of the data is loaded: check the data, and load the model's other layers."""
        self.check(data)
        self.use(data.language_model)

    def of(self, contexts: Contexts | None) -> "ReconstructionLoss":
        """The objective on the rows of a batch."""
        if contexts is None:
            raise InputError(f"objective: {type(self).__name__} needs batches of whole contexts, got rows alone")
        return ContextsLoss(self, contexts)


@dataclass(frozen=True)
class ContextsLoss(ReconstructionLoss):
    """An objective on the rows of some contexts."""

    objective: Objective
    contexts: Contexts

    def __call__(self, reconstruction: Float[Tensor, "row d_in"]) -> tuple[Float[Tensor, ""], Terms]:
        """The loss and its terms."""
        return self.objective.loss(reconstruction, self.contexts)

    def split(self, count: int) -> list[tuple[slice, ReconstructionLoss]]:
        """`count` parts of whole contexts."""
        return [(rows, ContextsLoss(self.objective, part)) for rows, part in self.contexts.split(count)]


@final
class EndToEnd(Objective):
    """The change of a frozen language model's predictions by the reconstruction at the hook (end-to-end SAEs, arXiv 2405.12241).

    `kl` is `KL(clean || spliced)`, in nats. `kl+downstream` is `0.5 KL + beta / |K| sum_k MSE_k` over the later hooks `K`, where `MSE_k` is
    the mean over `d_model` of the squared error of the activations. Both are means over the tokens that the SAE is trained on; all others,
    such as BOS and attention sinks, keep their activations.

    Args:
        kind: `kl`, or `kl+downstream`.
        later_hooks: The hooks after the SAE's at which activations are compared; null is the output of every later layer.
        beta: Weight of the mean of the later squared errors.
        kl_weight: Weight of the KL divergence; null is 1 for `kl` and 0.5 for `kl+downstream`.
        contexts_at_once: Contexts in one pass of the language model. It changes memory and speed, not the loss.
    """

    def __init__(
        self,
        kind: Kind = "kl",
        later_hooks: list[str] | None = None,
        beta: float = 2.5,
        kl_weight: float | None = None,
        contexts_at_once: int = 8,
    ) -> None:
        if kind not in get_args(Kind):
            raise InputError(f"EndToEnd: kind must be {' or '.join(get_args(Kind))}, got {kind!r}")
        if later_hooks is not None and (kind == "kl" or not later_hooks):
            raise InputError(f"EndToEnd: later_hooks are for kl+downstream and must not be empty, got {later_hooks} for {kind}")
        self.kind, self.beta, self.contexts_at_once = kind, beta, contexts_at_once
        self.kl_weight = kl_weight if kl_weight is not None else 0.5 if kind == "kl+downstream" else 1.0
        if self.kl_weight < 0 or beta < 0 or contexts_at_once < 1:
            values = f"{self.kl_weight}, {beta} and {contexts_at_once}"
            raise InputError(f"EndToEnd: kl_weight and beta must not be negative and contexts_at_once at least 1, got {values}")
        self.later_hooks = later_hooks
        self._model: LanguageModel | None = None
        self._later: list[HookLocation] = []

    def check(self, data: Any) -> None:
        """Raise an `InputError` for data without a language model, with several hooks or a cache, or with shuffled rows."""
        model, batching = getattr(data, "language_model", None), getattr(data, "batching", None)
        if model is None or batching is None:
            raise InputError(f"objective: EndToEnd runs a language model, and {type(data).__name__} has none")
        if getattr(data, "cache", None) is not None:
            raise InputError(
                "objective: EndToEnd runs the language model, and a cache has activations alone: set data.init_args.cache: null"
            )
        if len(model.hooks) > 1:
            raise InputError(f"objective: EndToEnd replaces the activations at one hook, and the data have {', '.join(model.hooks)}")
        if batching.order != "contexts":
            raise InputError(f"objective: EndToEnd needs whole contexts, set data.init_args.order: contexts, got {batching.order}")

    def use(self, model: "LanguageModel") -> None:
        """Run this language model, whose first hook is the SAE's; its layers after the hook are loaded too."""
        model.load_all_layers()
        self._model = model
        self._later = model.later_hooks(self.later_hooks) if self.kind == "kl+downstream" else []
        if self.kind == "kl+downstream" and not self._later:
            raise InputError(f"later_hooks: {model.name} has no layer after {model.hooks[0]}: set kind: kl")

    def loss(self, reconstruction: Float[Tensor, "row d_in"], contexts: Contexts) -> tuple[Float[Tensor, ""], Terms]:
        """The loss with its gradient, and the terms `kl` and `later_mse`, the mean of the later squared errors.

        The gradient is computed with the value, pass by pass, so that the logits of one pass are in memory and not those of a batch.
        """
        totals: dict[str, Tensor] = {}

        def loss_and_gradient(rows: Tensor) -> tuple[Tensor, Tensor]:
            gradient, total = torch.zeros_like(rows), rows.new_zeros(())
            for part, of_part in contexts.split(-(-len(contexts.tokens) // self.contexts_at_once) or 1):
                if part.start == part.stop:
                    continue
                share = (part.stop - part.start) / len(rows)
                leaf = rows[part].requires_grad_()
                with torch.enable_grad():
                    terms = self._terms(leaf, of_part)
                    loss = share * sum((self._weights[name] * term for name, term in terms.items()), start=rows.new_zeros(()))
                    (gradient[part],) = torch.autograd.grad(loss, leaf)
                total += loss.detach()
                for name, term in terms.items():
                    totals[name] = totals.get(name, 0) + share * term.detach()
            return total, gradient

        loss = _WithGradient.apply(reconstruction, loss_and_gradient)
        return loss, totals or {name: reconstruction.new_zeros(()) for name in self._weights}

    @property
    def _weights(self) -> dict[str, float]:
        """The weight of each term."""
        return {"kl": self.kl_weight} | ({"later_mse": self.beta} if self.kind == "kl+downstream" else {})

    def _terms(self, rows: Float[Tensor, "row d_in"], contexts: Contexts) -> dict[str, Float[Tensor, ""]]:
        """The terms for one pass of the language model without, and one with, these rows as the activations."""
        model = self._model
        if model is None:
            raise RuntimeError("the objective has no language model, call setup() or use() first")
        positions = contexts.positions.to(model.device)

        def edit(activations: Tensor) -> Tensor:
            flat = activations.flatten(0, 1)
            return flat.index_copy(0, positions, rows.to(flat)).view_as(activations)

        def of_rows(prediction: "Prediction") -> list[Tensor]:
            return [values.flatten(0, 1).index_select(0, positions) for values in (prediction.logits, *prediction.later)]

        passes = model.predictions_of_edits(contexts.tokens, contexts.visible, [None, edit], later=self._later)
        # Each pass ends as the rows of the SAE alone, so that the logits of all tokens are in memory once.
        (clean_logits, *clean), (logits, *spliced) = map(of_rows, passes)
        terms = {"kl": functional.kl_divergence(clean_logits[None], logits[None]).mean().to(rows)}
        if self._later:
            errors = [(a - b).square().mean().to(rows) for a, b in zip(clean, spliced, strict=True)]
            terms["later_mse"] = torch.stack(errors).mean()
        return terms


class _WithGradient(torch.autograd.Function):
    """A function of a tensor that computes its gradient together with its value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        value, gradient = value_and_gradient(x.detach())
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.saved_tensors[0] * gradients[0], None
