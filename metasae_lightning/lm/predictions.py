"""Predictions of a complete language model with edited activations; the layers before the hook run once for all edits."""

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from metasae_lightning.errors import InputError
from metasae_lightning.lm.hooks import HookLocation, layer_stack_path, locate, locate_in_lens, unknown_hook

Edit = Callable[[Tensor], Tensor]
"""Receives the activations at the hook, in float32, and returns those that replace them, without a change of its argument."""


class Prediction(NamedTuple):
    """The results of one forward pass of a complete language model, in float32, or in float64 where the model computes in it."""

    logits: Float[Tensor, "context position vocabulary"]
    """The logits."""
    later: list[Float[Tensor, "context position width"]]
    """The activations at later hooks, with attention heads flattened."""


@dataclass
class LayersBeforeHook:
    """The layers before a hook. They run in the first forward pass; later passes on the same tokens get the last layer's output."""

    location: HookLocation
    """Where an edit is attached: the hook, or a layer's output that holds the same activations."""
    layers: list[nn.Module] = field(default_factory=list)
    """The layers that run once; none where the hook is at the input of the first layer or outside of the layers."""
    output: Any = None
    """What the last of these layers returned in the first pass, before an edit."""

    @classmethod
    def of(cls, root: nn.Module, location: HookLocation) -> "LayersBeforeHook":
        """The layers before a hook of a transformers or a TransformerLens model."""
        stack = "blocks" if hasattr(root, "hook_dict") else layer_stack_path(root)
        match = re.fullmatch(rf"{re.escape(stack)}\.(\d+)(?:\.(.+))?", location.path)
        if not match or location.at_input:
            return cls(location)
        layer, inside = int(match[1]), match[2]
        # A residual hook of TransformerLens is inside of a layer, but its activations are the output of this layer or of the one before.
        count = layer + 1 if inside in (None, "hook_resid_post") else layer
        if inside in ("hook_resid_pre", "hook_resid_post") and count:
            location = HookLocation(f"{stack}.{count - 1}", False, count, location.lens_name)
        return cls(location, list(root.get_submodule(stack).children())[:count])

    @contextlib.contextmanager
    def run_once(self) -> Generator[None, None, None]:
        """A block for one forward pass: the first runs the layers, each later one runs none of them."""
        if not self.layers:
            yield
            return
        is_first, last = self.output is None, self.layers[-1]
        replaced = {last: self._recorded(last.forward)} if is_first else dict.fromkeys(self.layers, self._replayed)
        before = {layer: vars(layer).get("forward") for layer in replaced}
        try:
            for layer, forward in replaced.items():
                layer.forward = forward
            yield
        finally:
            for layer, forward in before.items():
                if forward is None:
                    del layer.forward
                else:  # an instance's own, such as that of a layer on another device
                    layer.forward = forward

    def _recorded(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward method of the last layer, which also stores its output."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.output = forward(*args, **kwargs)
            return self.output

        return run

    def _replayed(self, *_: Any, **__: Any) -> Any:
        """The stored output, in place of a layer's forward method."""
        return self.output


def unembedding(root: Any) -> tuple[Tensor | None, nn.Module | None]:
    """The weight that turns the last activations into logits, of shape (vocabulary, d_model), and the norm before it; None if not found."""
    if hasattr(root, "hook_dict"):
        return root.W_U.T, getattr(root, "ln_final", None)
    head = root.get_output_embeddings()
    around_layers = root.get_submodule(layer_stack_path(root).rpartition(".")[0])
    norms = [module for module in around_layers.children() if "Norm" in type(module).__name__]
    return getattr(head, "weight", None), norms[-1] if norms else None


class Predictor(ABC):
    """The part of a language model that computes predictions. `LanguageModel` completes it."""

    name: str
    _locations: list[HookLocation]
    _is_complete: bool
    _layers_run_once: bool | None

    def logits(
        self,
        tokens: Int[Tensor, "context position"],
        visible: Bool[Tensor, "context position position"] | None = None,
        *,
        edit: Edit | None = None,
    ) -> Float[Tensor, "context position vocabulary"]:
        """Logits in float32. Only the model that `complete` returns has them: others lack the layers after their last hook.

        `visible` is the attention mask, as in `activations`. `edit` receives the activations at the first hook, in float32, and returns
        those that replace them.
        """
        return next(self.logits_of_edits(tokens, visible, [edit]))

    def logits_of_edits(
        self,
        tokens: Int[Tensor, "context position"],
        visible: Bool[Tensor, "context position position"] | None,
        edits: Sequence[Edit | None],
    ) -> Iterator[Float[Tensor, "context position vocabulary"]]:
        """Yield the logits for each edit of the activations at the first hook, as `logits` gives them; None edits nothing.

        The layers before the hook run in the first pass only, where the model allows it: a trial decides, which compares logits.
        """
        if not self._is_complete:
            raise RuntimeError(f"{self.name}: the layers after the hook are not loaded; use the model that complete() returns")
        once = len(edits) > 1 and self._can_run_layers_once()
        yield from (prediction.logits for prediction in self._passes(tokens, visible, edits, once=once))

    def predictions_of_edits(
        self,
        tokens: Int[Tensor, "context position"],
        visible: Bool[Tensor, "context position position"] | None,
        edits: Sequence[Edit | None],
        *,
        later: Sequence[HookLocation] = (),
    ) -> Iterator[Prediction]:
        """Yield the prediction for each edit, as `logits_of_edits`, with the activations at the `later` hooks and a gradient to the edit.

        The gradient begins at what an edit returns; a pass without an edit has none. The weights are frozen. `later_hooks` locates hooks.
        """
        yield from self._passes(tokens, visible, edits, once=self._can_run_layers_once(), later=later, with_gradient=True)

    def later_hooks(self, names: Sequence[str] | None = None) -> list[HookLocation]:
        """The locations of hooks that a pass reaches after the first hook, by name; by default the output of each later layer.

        A name of a hook that is not later is an `InputError`.
        """
        first = self._locations[0]
        if names is None:
            if first.n_layers is None:
                raise InputError(f"later_hooks: {first.path} is in no layer: name the hooks whose activations are compared")
            found = [self._locate(f"blocks.{layer}.hook_resid_post") for layer in range(first.n_layers - 1, self._n_layers)]
            # The output of the hook's own layer is later if the hook is inside of the layer.
            return [location for location, is_later in zip(found, self._are_later(found), strict=True) if is_later]
        found = [self._locate(name) for name in names]
        for name, is_later in zip(names, self._are_later(found), strict=True):
            if not is_later:
                raise InputError(f"later_hooks: {name!r} is not after the hook of the SAE, {first.lens_name or first.path}")
        return found

    def _locate(self, hook: str) -> HookLocation:
        """The location of a hook in the loaded model."""
        root: Any = self._loaded_root()
        if not hasattr(root, "hook_dict"):
            return locate(hook, root)
        (location,) = locate_in_lens([hook], self.name, root.cfg)
        if location.path not in root.hook_dict:
            raise unknown_hook(hook, self.name, root.hook_dict)
        return location

    @property
    def _n_layers(self) -> int:
        """The number of layers of the loaded model."""
        root: Any = self._loaded_root()
        return root.cfg.n_layers if hasattr(root, "hook_dict") else root.config.get_text_config().num_hidden_layers

    def _are_later(self, locations: Sequence[HookLocation]) -> list[bool]:
        """Whether a forward pass reaches each location after the first hook; a trial pass is run."""
        reached: list[int] = []
        everything = [self._locations[0], *locations]
        with self._hooked([partial(_note, reached, number) for number in range(len(everything))], everything):
            self._forward(torch.zeros(2, 3, dtype=torch.long), None)
        first = reached.index(0)
        places = [(location.path, location.at_input) for location in everything]
        return [place != places[0] and number in reached[first:] for number, place in enumerate(places[1:], 1)]

    def logits_of_directions(self, rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocabulary"] | None:
        """Logits that directions of the residual stream add, up to a scale for each row, as if no later layer read them.

        The rows are multiplied by the gain of the final norm, and centred where it centres. None if the model has no unembedding of this
        width. The model need not be complete.
        """
        weight, norm = unembedding(self._loaded_root())
        if weight is None or weight.shape[1] != rows.shape[1]:
            return None
        rows = rows.to(weight)
        if norm is not None:
            # Of variance 1 and mean 0, so that a norm changes nothing but the scale of each coordinate.
            signs = 1 - 2 * (torch.arange(rows.shape[1], device=rows.device) % 2).to(rows)
            normed, opposite, shifted = norm(torch.stack([signs, -signs, signs + 1])[:, None])[:, 0]
            if torch.allclose(normed, shifted, rtol=1e-2, atol=1e-3):
                rows = rows - rows.mean(1, keepdim=True)
            rows = rows * (normed - opposite) / 2 * signs
        return (rows @ weight.T).float()

    def _passes(
        self,
        tokens: Tensor,
        visible: Tensor | None,
        edits: Sequence[Edit | None],
        *,
        once: bool,
        later: Sequence[HookLocation] = (),
        with_gradient: bool = False,
    ) -> Iterator[Prediction]:
        """Yield the prediction of one forward pass for each edit."""
        first_hook = self._locations[0]
        before = LayersBeforeHook.of(self._loaded_root(), first_hook) if once else LayersBeforeHook(first_hook)
        for edit in edits:

            def replace(activations: Tensor, edit: Edit | None = edit) -> Tensor | None:
                return None if edit is None else edit(_widened(activations.flatten(2))).to(activations.dtype).view_as(activations)

            outputs: list[Tensor] = []
            callbacks = [replace, *(partial(_keep_output, outputs) for _ in later)]
            has_gradient = with_gradient and edit is not None
            with self._hooked(callbacks, [before.location, *later], with_gradient=has_gradient), before.run_once():
                logits = _widened(self._forward(tokens, visible))
            yield Prediction(logits, outputs)

    def _can_run_layers_once(self) -> bool:
        """Whether passes without the layers before the hook give the logits of whole passes, twice after each other."""
        if self._layers_run_once is None:
            tokens, edits = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 7, 8, 4, 5, 6]]), [None, lambda x: -2 * x, None, lambda x: -2 * x]
            try:
                pairs = zip(*(self._passes(tokens, None, edits, once=once) for once in (True, False)), strict=True)
                self._layers_run_once = all(torch.allclose(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item()) for (a, _), (b, _) in pairs)
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # a layer needs what an earlier one leaves behind
                self._layers_run_once = False
        return self._layers_run_once

    @abstractmethod
    def _loaded_root(self) -> nn.Module:
        """The root module; an error if the model is not loaded."""

    @abstractmethod
    def _hooked(
        self, callbacks: Sequence[Callable[[Any], Tensor | None]], locations: Sequence[HookLocation], *, with_gradient: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """A block with callback i attached to location i, for one forward pass. It holds the lock that all forward passes take."""

    @abstractmethod
    def _forward(self, tokens: Tensor, visible: Tensor | None) -> Any:
        """One forward pass on the model's device, with `visible` as an additive mask."""


def _widened(values: Tensor) -> Tensor:
    """Values of lower precision in float32, and others as they are."""
    return values if values.dtype == torch.float64 else values.float()


def _note(reached: list[int], number: int, _: Any) -> None:
    """Add the number of a hook to those that were reached."""
    reached.append(number)


def _keep_output(outputs: list[Tensor], activations: Tensor) -> None:
    """Add the activations at a hook to those of the pass."""
    outputs.append(_widened(activations.flatten(2)))
