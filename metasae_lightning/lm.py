"""A language model up to the hook and no further, by the hook's name in either dialect."""

import contextlib
import copy
import inspect
import threading
from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens.load_model import load_model
from torch import Tensor, nn
from transformer_lens import HookedTransformer, loading_from_pretrained
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from metasae_lightning.embedded import EMBEDDED, embedded_folder
from metasae_lightning.errors import InputError
from metasae_lightning.hooks import (
    Point,
    cut,
    deepest,
    expected_leftovers,
    layers_path,
    lens_points,
    listen,
    locate,
    unknown_hook,
)
from metasae_lightning.loading import (
    CONFIG_KWARGS,
    LOADER_KWARGS,
    additive,
    check_kwargs,
    converting,
    dtype_of,
    hub,
    is_lens_folder,
    lens_folder,
    no_chatter,
)


# Hooks are the module's: a pass of another thread, of a stream that is made ahead, would end at them.
PASSING = threading.Lock()


class _Reached(Exception):
    """Ends a forward pass at the last hook."""


class LanguageModel(ABC):
    """A causal language model read at one hook, or at several in one pass; nothing is loaded before `load`."""

    def __init__(
        self, name: str, hook: str | list[str], *, device: str = "auto", dtype: str = "float32", model_kwargs: dict[str, Any] | None = None
    ):
        self.name = name
        self.hooks = [hook] if isinstance(hook, str) else list(hook)
        if not self.hooks or len(set(self.hooks)) < len(self.hooks):
            raise InputError(f"hook: one name, or a list of different ones, got {hook}")
        self.dtype = dtype_of(dtype)
        self.model_kwargs = dict(model_kwargs or {})
        self._device = device
        self._root: nn.Module | None = None
        self._points: list[Point] = []
        self._tokenizer: Any = None
        self._widths: dict[str, int] = {}
        self._separates: bool | None = None

    def load(self) -> None:
        """Load the model up to the hook, once, leaving the global random state alone."""
        if self._root is not None:
            return
        # Constructors initialise what the checkpoint then overwrites, from the global generator.
        with torch.random.fork_rng(), no_chatter():
            root, points, tokenizer = self._load(self._folder)
        self._root, self._points, self._tokenizer = root.eval().requires_grad_(False), points, tokenizer
        try:
            # Sizes that no table of positions or batch of one shares by accident.
            found = self._reach(torch.zeros(2, 3, dtype=torch.long), None)
        except InputError:
            self._root = None
            raise
        self._widths = dict(zip(self.hooks, (part.shape[-1] for part in found), strict=True))

    def skeleton(self) -> "LanguageModel":
        """This model on torch's meta device: it has sizes and no weights, and nothing is loaded."""
        twin = copy.copy(self)
        with torch.random.fork_rng(), no_chatter():
            twin._root, twin._points = self._skeleton(self._folder)
        return twin

    @property
    def _folder(self) -> str:
        return str(embedded_folder()) if self.name == EMBEDDED else self.name

    @abstractmethod
    def _load(self, folder: str) -> tuple[nn.Module, list[Point], Any]:
        """The root module, the hooks' places in it and the tokenizer."""

    @abstractmethod
    def _skeleton(self, folder: str) -> tuple[nn.Module, list[Point]]:
        """What `_load` loads, without weights and tokenizer."""

    @abstractmethod
    def _run(self, root: Any, tokens: Int[Tensor, "context position"], mask: Float[Tensor, "context 1 position position"] | None) -> None:
        """One forward pass, which the last hook ends."""

    def activations(
        self, tokens: Int[Tensor, "context position"], visible: Bool[Tensor, "context position position"] | None = None
    ) -> Float[Tensor, "context position d_model"]:
        """The hooks' float32 activations, heads flattened, one hook beside the other; the forward pass ends at the last.

        `visible[c, q, k]` tells which tokens k a token q of context c may attend to, where the model `separates`.
        """
        found = self._reach(tokens, visible)
        return found[0] if len(found) == 1 else torch.cat([part.to(self.device) for part in found], -1)

    def _reach(self, tokens: Int[Tensor, "context position"], visible: Tensor | None) -> list[Tensor]:
        with PASSING:
            return self._pass(self._require(), tokens, visible)

    def _pass(self, root: nn.Module, tokens: Tensor, visible: Tensor | None) -> list[Tensor]:
        found = dict[int, Tensor]()

        def keep(place: int, value: Any) -> None:
            found[place] = self._per_token(self.hooks[place], value, tokens)
            if len(found) == len(self._points):
                raise _Reached

        handles = [listen(root.get_submodule(point.path), point, partial(keep, place)) for place, point in enumerate(self._points)]
        mask = None if visible is None else additive(visible.to(self.device), self.dtype)
        # A caller's autocast would make the activations depend on who asks for them; the meta device has none.
        with torch.no_grad(), torch.autocast(self.device.type.replace("meta", "cpu"), enabled=False):
            try:
                self._run(root, tokens.to(self.device), mask)
            except _Reached:
                return [found[place] for place in range(len(self._points))]
            finally:
                for handle in handles:
                    handle.remove()
        missed = next(hook for place, hook in enumerate(self.hooks) if place not in found)
        raise InputError(f"hook: {missed!r} is not reached by a forward pass of {self.name!r}")

    @staticmethod
    def _per_token(hook: str, activations: Any, tokens: Tensor) -> Tensor:
        """The hook's output, where it is one vector a token."""
        if not isinstance(activations, Tensor) or activations.ndim < 3 or activations.shape[:2] != tokens.shape:
            shape = tuple(activations.shape) if isinstance(activations, Tensor) else type(activations).__name__
            raise InputError(f"hook: {hook!r} must give one vector a token (context x position x width), it gives {shape}")
        return activations.flatten(2).float()

    def read_tokenizer(self) -> Any:
        """The tokenizer without the model."""
        if self._tokenizer is None:
            shared = {k: v for k, v in self.model_kwargs.items() if k in CONFIG_KWARGS}
            with no_chatter(), hub(self.name):
                self._tokenizer = AutoTokenizer.from_pretrained(self._repository, **shared)
        return self._tokenizer

    @property
    def _repository(self) -> str:
        """Where the tokenizer is."""
        return self._folder

    def separates(self, length: int) -> bool:
        """Whether the backend can keep documents apart in contexts so long: tried, since an unknown mask is ignored in silence."""
        if self._separates is None:
            self._separates = self._try_separation()
        config: Any = getattr(self._require(), "config", None)
        window = getattr(config.get_text_config(), "sliding_window", None) if config is not None else None
        # A mask of ours replaces the layers' own, which longer contexts would need.
        return self._separates and (window is None or length <= window)

    def _try_separation(self) -> bool:
        """Two contexts of two documents that differ in the first: the second must not notice."""
        tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 7, 8, 4, 5, 6]])
        visible = torch.ones(6, 6).tril().bool()
        visible[3:, 1:3] = False
        try:
            found = self.activations(tokens, visible.expand(2, -1, -1))
        except (TypeError, ValueError, RuntimeError, NotImplementedError):
            return False
        one, two = found[:, 3:]
        return torch.allclose(one, two, rtol=1e-3, atol=1e-3 * one.abs().max().item())

    @property
    def widths(self) -> dict[str, int]:
        """Each hook's width, as seen in a forward pass, in the order of the activations' columns."""
        self._require()
        return self._widths

    @property
    def d_model(self) -> int:
        """The activations' width: the hook's, or all hooks' together."""
        return sum(self.widths.values())

    @property
    def tokenizer(self) -> Any:
        """The model's own tokenizer."""
        self._require()
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        if self._root is not None:
            return next(self._root.parameters()).device
        if self._device != "auto":
            return torch.device(self._device)
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def n_ctx(self) -> int | None:
        """The longest context the model takes, where its config says."""
        root = self._require()
        for config in (getattr(root, "cfg", None), getattr(root, "config", None)):
            for name in ("n_ctx", "max_position_embeddings"):
                if isinstance(getattr(config, name, None), int):
                    return getattr(config, name)
        return None

    def identity(self) -> dict[str, Any]:
        """Everything that activations are a function of, but for the hooks."""
        kwargs = {"model_kwargs": {key: str(value) for key, value in sorted(self.model_kwargs.items())}} if self.model_kwargs else {}
        return {"model": self.name, "read_by": type(self).__name__, "computed_in": str(self.dtype).removeprefix("torch."), **kwargs}

    def metadata(self, hook: str | None = None) -> dict[str, Any]:
        """What a published SAE of this hook (of the first, if none is named) tells of its model, by SAELens's names.

        `hook_name` is TransformerLens's where it has one, the dialect that the readers of SAELens folders speak;
        `hf_hook_name` is the module's path on the transformers backend.
        """
        self._require()
        point = self._points[self.hooks.index(hook) if hook else 0]
        return {
            "model_name": self.name,
            "model_class_name": "HookedTransformer" if point.lens else "AutoModelForCausalLM",
            "hook_name": point.lens or point.path,
            **({} if point.path == point.lens else {"hf_hook_name": point.path}),
            "model_from_pretrained_kwargs": self.model_kwargs,
        }

    def _require(self) -> nn.Module:
        if self._root is None:
            raise RuntimeError(f"{self.name}: load() comes first")
        return self._root


class HuggingFaceLM(LanguageModel):
    """Any hub name or local folder that transformers' `AutoModelForCausalLM` reads; layers after the hook are not loaded."""

    def _outline(self, folder: str) -> tuple[dict[str, Any], list[Point], contextlib.AbstractContextManager[None]]:
        """The config cut to the hooks, their places, and a context in which the checkpoint's other layers are no surprise."""
        check_kwargs(self.model_kwargs, (*CONFIG_KWARGS, *LOADER_KWARGS))
        shared = {k: v for k, v in self.model_kwargs.items() if k in CONFIG_KWARGS}
        with hub(self.name):
            config = AutoConfig.from_pretrained(folder, **shared)
            trust = {"trust_remote_code": True} if self.model_kwargs.get("trust_remote_code") else {}
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(config, **trust)
        points, stack = [locate(hook, skeleton) for hook in self.hooks], layers_path(skeleton)
        dropped = cut(config, deepest(points))
        return {"config": config, **trust}, points, expected_leftovers(type(skeleton), stack, dropped)

    def _skeleton(self, folder: str) -> tuple[nn.Module, list[Point]]:
        given, points, _ = self._outline(folder)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(**given, dtype=self.dtype).eval()
        skeleton.config.use_cache = False
        return skeleton, points

    def _load(self, folder: str) -> tuple[nn.Module, list[Point], Any]:
        given, points, leftovers = self._outline(folder)
        with hub(self.name), leftovers:
            kwargs = {**self.model_kwargs, "dtype": self.dtype, **given}
            proxy: Any = load_model("AutoModelForCausalLM", folder, self.device, kwargs, hook_names=[point.path for point in points])
        proxy.model.config.use_cache = False
        return proxy.model, points, proxy.tokenizer

    def _run(self, root: Any, tokens: Int[Tensor, "context position"], mask: Float[Tensor, "context 1 position position"] | None) -> None:
        root(tokens, **({} if mask is None else {"attention_mask": mask}))


class TransformerLensLM(LanguageModel):
    """A model as TransformerLens's `HookedTransformer` has it, unprocessed; a local folder where it converts that architecture."""

    def _outline(self, folder: str) -> tuple[dict[str, Any], list[Point], bool]:
        """What TransformerLens is given, the hooks' places, and whether the folder is a local one."""
        known = (*inspect.signature(HookedTransformer.from_pretrained).parameters, *CONFIG_KWARGS, *LOADER_KWARGS)
        check_kwargs(self.model_kwargs, [k for k in known if k not in ("model_name", "device", "dtype", "from_pretrained_kwargs")])
        local = is_lens_folder(folder)
        with converting(self.name):
            config = loading_from_pretrained.get_pretrained_model_config(folder)
        points = lens_points(self.hooks, self.name, config)
        return {**self.model_kwargs, "first_n_layers": deepest(points), "dtype": self.dtype}, points, local

    @property
    def _repository(self) -> str:
        with converting(self.name):
            return self._folder if is_lens_folder(self._folder) else loading_from_pretrained.get_official_model_name(self._folder)

    def _skeleton(self, folder: str) -> tuple[nn.Module, list[Point]]:
        given, points, _ = self._outline(folder)
        with converting(self.name), torch.device("meta"):
            config = loading_from_pretrained.get_pretrained_model_config(folder, device="meta", **given)
            return HookedTransformer(config, move_to_device=False), points

    def _load(self, folder: str) -> tuple[nn.Module, list[Point], Any]:
        given, points, local = self._outline(folder)
        with converting(self.name):
            model: Any = lens_folder(folder, self.device, given) if local else load_model("HookedTransformer", folder, self.device, given)
        for asked, point in zip(self.hooks, points, strict=True):
            if point.path not in model.hook_dict:
                raise unknown_hook(asked, self.name, model.hook_dict)
        return model, points, model.tokenizer

    def _run(self, root: Any, tokens: Int[Tensor, "context position"], mask: Float[Tensor, "context 1 position position"] | None) -> None:
        if mask is not None:
            raise NotImplementedError("TransformerLens masks padding only")
        root(tokens, return_type=None, prepend_bos=False)
