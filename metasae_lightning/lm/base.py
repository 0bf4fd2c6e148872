"""The base class of language models: activations at hooks, with a forward pass that ends at the last hook."""

import contextlib
import copy
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoTokenizer

from metasae_lightning.errors import InputError
from metasae_lightning.lm import device
from metasae_lightning.lm.embedded_model import EMBEDDED, embedded_folder
from metasae_lightning.lm.hooks import HookLocation, attach
from metasae_lightning.lm.loading import CONFIG_KWARGS, additive_mask, hub_errors, parse_dtype, quiet_loading
from metasae_lightning.lm.predictions import Predictor
from metasae_lightning.redaction import redact

log = logging.getLogger(__name__)

Tokens = Int[Tensor, "context position"]
Mask = Float[Tensor, "context 1 position position"] | None

# Hooks are attached to the module, which threads share: a forward pass of another thread would call them too.
FORWARD_LOCK = threading.Lock()


class _LastHookReached(Exception):
    """Ends a forward pass at the last hook."""


class LanguageModel(Predictor, ABC):
    """A causal language model whose activations are taken at one hook, or at several in one pass. `load` loads it, not the constructor.

    Args:
        name: A model's name on the Hub, or a local folder.
        hook: The hook at which activations are taken, or a list of hooks.
        device: `auto` for the GPU of its SAE, `own` for a GPU without an SAE, or a name such as `cuda:1` or `cpu`. If the SAE is on a
            CPU, `auto` is the current GPU, or the CPU without any GPU.
        dtype: The dtype of the model's weights and computations.
        model_kwargs: Further arguments of the backend's `from_pretrained`.
    """

    def __init__(
        self, name: str, hook: str | list[str], *, device: str = "auto", dtype: str = "float32", model_kwargs: dict[str, Any] | None = None
    ):
        self.name = name
        self.hooks = [hook] if isinstance(hook, str) else list(hook)
        if not self.hooks or len(set(self.hooks)) < len(self.hooks):
            raise InputError(f"hook: expected one name or a list of different names, got {hook}")
        self.dtype = parse_dtype(dtype)
        self.model_kwargs = dict(model_kwargs or {})
        self.requested_device = device
        self._device: torch.device | None = None
        self._root: nn.Module | None = None
        self._locations: list[HookLocation] = []
        self._tokenizer: Any = None
        self._widths: dict[str, int] = {}
        self._separates_documents: bool | None = None
        self._is_complete = False
        self._layers_run_once: bool | None = None

    def load(self) -> None:
        """Load the model up to its last hook, unless it is loaded. The global random state does not change."""
        if self._root is not None:
            return
        # The constructor draws random weights from the global generator before the checkpoint's weights replace them.
        with torch.random.fork_rng(), quiet_loading():
            root, locations, tokenizer = self._load(self._folder)
        self._root, self._locations, self._tokenizer = root.eval().requires_grad_(False), locations, tokenizer
        try:
            # 2 x 3 tokens: a tensor of another kind, such as a table of positions, hardly has these first two sizes.
            outputs = self._hook_outputs(torch.zeros(2, 3, dtype=torch.long), None)
        except InputError:
            self._root = None
            raise
        self._widths = dict(zip(self.hooks, (output.shape[-1] for output in outputs), strict=True))

    def load_all_layers(self) -> None:
        """Load the layers after the last hook too, unless they are loaded: predictions (`logits`) can then be computed."""
        if not self._is_complete:
            self._root, self._is_complete = None, True
        self.load()

    def set_device(self, device: torch.device | str) -> None:
        """Choose the device on which `load` will put the model."""
        self._device = torch.device(device)

    def skeleton(self, *, all_layers: bool = False) -> "LanguageModel":
        """A copy on torch's meta device, up to the last hook or with `all_layers`: its parameters have no values, and nothing is read."""
        twin = copy.copy(self)
        twin._is_complete = self._is_complete or all_layers
        with torch.random.fork_rng(), quiet_loading():
            twin._root, twin._locations = twin._skeleton(self._folder)
        return twin

    def complete(self) -> "LanguageModel":
        """A second, loaded copy with all layers, whose predictions (`logits`) can be computed."""
        twin = copy.copy(self)
        twin._root, twin._is_complete = None, True
        log.warning("%s is loaded a second time, with all layers, to measure its predictions", self.name)
        twin.load()
        return twin

    @property
    def _folder(self) -> str:
        """The name for the backend: a Hub name, a local folder, or the folder of the embedded model."""
        return str(embedded_folder()) if self.name == EMBEDDED else self.name

    @abstractmethod
    def _load(self, folder: str) -> tuple[nn.Module, list[HookLocation], Any]:
        """The model's root module, the hooks' locations in it, and the tokenizer."""

    @abstractmethod
    def _skeleton(self, folder: str) -> tuple[nn.Module, list[HookLocation]]:
        """The language model's root module on the meta device, without weights, and the hooks' locations in it."""

    @abstractmethod
    def _run(self, root: Any, tokens: Tokens, mask: Mask) -> Any:
        """One forward pass; returns the logits, unless a hook ends it earlier."""

    def activations(
        self, tokens: Int[Tensor, "context position"], visible: Bool[Tensor, "context position position"] | None = None
    ) -> Float[Tensor, "context position d_model"]:
        """The activations at the hooks, in float32, concatenated over hooks; the forward pass ends at the last hook.

        Args:
            tokens: The contexts.
            visible: An attention mask: `visible[c, q, k]` is true if token q of context c may attend to token k. Only a model for
                which `can_separate_documents` is true takes one.
        """
        outputs = self._hook_outputs(tokens, visible)
        return outputs[0] if len(outputs) == 1 else torch.cat([output.to(self.device) for output in outputs], -1)

    def _hook_outputs(self, tokens: Tokens, visible: Tensor | None) -> list[Tensor]:
        """The activations at each hook, from one forward pass that ends at the last hook."""
        outputs = dict[int, Tensor]()

        def collect(number: int, value: Any) -> None:
            outputs[number] = self._check_shape(self.hooks[number], value, tokens)
            if len(outputs) == len(self._locations):
                raise _LastHookReached

        callbacks = [partial(collect, number) for number in range(len(self._locations))]
        with self._hooked(callbacks, self._locations), contextlib.suppress(_LastHookReached):
            self._forward(tokens, visible)
        missing = [hook for number, hook in enumerate(self.hooks) if number not in outputs]
        if missing:
            raise InputError(f"hook: {missing[0]!r} is not reached by a forward pass of {self.name!r}")
        return [outputs[number] for number in range(len(self._locations))]

    @contextlib.contextmanager
    def _hooked(
        self, callbacks: Sequence[Callable[[Any], Tensor | None]], locations: Sequence[HookLocation], *, with_gradient: bool = False
    ) -> Generator[None, None, None]:
        """A block with callback i attached to location i, for one forward pass. It holds the lock that all forward passes take."""
        root, device = self._loaded_root(), self.device.type.replace("meta", "cpu")
        # Activations must not depend on a caller's autocast. The meta device has no autocast of its own to turn off.
        with FORWARD_LOCK, torch.set_grad_enabled(with_gradient), torch.autocast(device, enabled=False):
            pairs = zip(locations, callbacks, strict=True)
            handles = [attach(root.get_submodule(location.path), location, callback) for location, callback in pairs]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _forward(self, tokens: Tokens, visible: Tensor | None) -> Any:
        """One forward pass on the model's device, with `visible` as an additive mask."""
        mask = None if visible is None else additive_mask(visible.to(self.device), self.dtype)
        return self._run(self._loaded_root(), tokens.to(self.device), mask)

    @staticmethod
    def _check_shape(hook: str, activations: Any, tokens: Tensor) -> Tensor:
        """The activations in float32 with attention heads flattened; an error if they are not one vector per token."""
        if not isinstance(activations, Tensor) or activations.ndim < 3 or activations.shape[:2] != tokens.shape:
            shape = tuple(activations.shape) if isinstance(activations, Tensor) else type(activations).__name__
            raise InputError(f"hook: {hook!r} must give one vector a token (context x position x width), it gives {shape}")
        return activations.flatten(2).float()

    def load_tokenizer(self) -> Any:
        """The model's tokenizer; the model itself need not be loaded."""
        if self._tokenizer is None:
            kwargs = {k: v for k, v in self.model_kwargs.items() if k in CONFIG_KWARGS}
            with quiet_loading(), hub_errors(self.name):
                self._tokenizer = AutoTokenizer.from_pretrained(self._tokenizer_source, **kwargs)
        return self._tokenizer

    @property
    def _tokenizer_source(self) -> str:
        """The Hub name or local folder of the tokenizer."""
        return self._folder

    def can_separate_documents(self, length: int) -> bool:
        """Whether an attention mask can keep documents apart in contexts of this length.

        A trial forward pass decides, because models ignore an unsuitable mask without an error.
        """
        if self._separates_documents is None:
            self._separates_documents = self._try_separation()
        config: Any = getattr(self._loaded_root(), "config", None)
        window = getattr(config.get_text_config(), "sliding_window", None) if config is not None else None
        # The mask replaces the model's own sliding-window mask, which has an effect in contexts longer than the window.
        return self._separates_documents and (window is None or length <= window)

    def _try_separation(self) -> bool:
        """Whether a mask works: in two contexts that differ in the first document only, the second has the same activations."""
        tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 7, 8, 4, 5, 6]])
        visible = torch.ones(6, 6).tril().bool()
        visible[3:, 1:3] = False
        try:
            activations = self.activations(tokens, visible.expand(2, -1, -1))
        except (TypeError, ValueError, RuntimeError, NotImplementedError):
            return False
        first, second = activations[:, 3:]
        return torch.allclose(first, second, rtol=1e-3, atol=1e-3 * first.abs().max().item())

    @property
    def widths(self) -> dict[str, int]:
        """The width of each hook's activations, in the order of their columns; `load` measures it."""
        self._loaded_root()
        return self._widths

    @property
    def d_model(self) -> int:
        """The width of the activations: the sum of all hooks' widths."""
        return sum(self.widths.values())

    @property
    def tokenizer(self) -> Any:
        """The loaded model's tokenizer."""
        self._loaded_root()
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        """The device of a loaded model's first layer, to which tokens are moved; before loading, the chosen device."""
        if self._root is not None:
            return next(self._root.parameters()).device
        return self._device or device.parse_device(self.requested_device)

    @property
    def n_ctx(self) -> int | None:
        """The length of the longest context that the model takes; None if its config does not say."""
        root = self._loaded_root()
        for config in (getattr(root, "cfg", None), getattr(root, "config", None)):
            for name in ("n_ctx", "max_position_embeddings"):
                if isinstance(getattr(config, name, None), int):
                    return getattr(config, name)
        return None

    def check_context_size(self, size: int) -> None:
        """Refuse contexts of more tokens than the model takes."""
        if self.n_ctx is not None and size > self.n_ctx:
            raise InputError(f"context_size must be at most {self.n_ctx}, the model's longest context, got {size}")

    def description(self) -> dict[str, Any]:
        """The model, backend, dtype and arguments: everything that determines the activations, except the hooks."""
        kwargs = {key: str(value) for key, value in sorted(redact(self.model_kwargs).items())}
        dtype = str(self.dtype).removeprefix("torch.")
        return {"model": self.name, "read_by": type(self).__name__, "computed_in": dtype, "model_kwargs": kwargs}

    def metadata(self, hook: str | None = None) -> dict[str, Any]:
        """The entries about this model in the metadata of an SAE, with SAELens's keys.

        `hook_name` is the hook's TransformerLens name if it has one, because tools that read SAELens folders expect it.
        `hf_hook_name` is the module path of the transformers backend; TransformerLens's backend has none.

        Args:
            hook: The SAE's hook; by default the first.
        """
        self._loaded_root()
        location = self._locations[self.hooks.index(hook) if hook else 0]
        return {
            "model_name": self.name,
            "model_class_name": "HookedTransformer" if location.lens_name else "AutoModelForCausalLM",
            "hook_name": location.lens_name or location.path,
            **({} if location.path == location.lens_name else {"hf_hook_name": location.path}),
            "model_from_pretrained_kwargs": redact(self.model_kwargs),
        }

    def _loaded_root(self) -> nn.Module:
        """The root module; an error if the model is not loaded."""
        if self._root is None:
            raise RuntimeError(f"{self.name}: the model is not loaded, call load() first")
        return self._root
