"""A language model up to the hook and no further, by the hook's name in either dialect."""

import contextlib
import inspect
import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens.load_model import load_model
from torch import Tensor, nn
from transformer_lens import HookedTransformer, loading_from_pretrained
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from metasae_lightning.embedded import EMBEDDED, embedded_folder
from metasae_lightning.errors import InputError, did_you_mean
from metasae_lightning.hooks import (
    LENS,
    PLAIN,
    POST_NORM,
    RESIDUAL,
    Point,
    cut,
    expected_leftovers,
    layers_path,
    lens_name,
    locate,
    unknown_hook,
)

# `from_pretrained` hands what it does not know to the model's constructor, whose complaint names neither argument nor remedy.
CONFIG_KWARGS = (
    *("cache_dir", "code_revision", "force_download", "local_files_only", "proxies"),
    *("revision", "subfolder", "token", "trust_remote_code"),
)
LOADER_KWARGS = (
    *("attn_implementation", "device_map", "max_memory", "offload_buffers"),
    *("offload_folder", "quantization_config", "use_safetensors", "variant"),
)


class _Reached(Exception):
    """Carries the activations out of a forward pass that ends at the hook."""

    def __init__(self, activations: Tensor):
        self.activations = activations


class LanguageModel(ABC):
    """A causal language model read at one hook; nothing is loaded before `load`."""

    def __init__(self, name: str, hook: str, *, device: str = "auto", dtype: str = "float32", model_kwargs: dict[str, Any] | None = None):
        self.name = name
        self.hook = hook
        self.dtype = _dtype(dtype)
        self.model_kwargs = dict(model_kwargs or {})
        self._device = device
        self._root: nn.Module | None = None
        self._point: Point | None = None
        self._tokenizer: Any = None
        self._d_model = 0

    def load(self) -> None:
        """Load the model up to the hook, once, leaving the global random state alone."""
        if self._root is not None:
            return
        folder = str(embedded_folder()) if self.name == EMBEDDED else self.name
        # Constructors initialise what the checkpoint then overwrites, from the global generator.
        with torch.random.fork_rng(), _no_chatter():
            root, point, tokenizer = self._load(folder)
        self._root, self._point, self._tokenizer = root.eval().requires_grad_(False), point, tokenizer
        try:
            # Sizes that no table of positions or batch of one shares by accident.
            self._d_model = self.activations(torch.zeros(2, 3, dtype=torch.long)).shape[-1]
        except InputError:
            self._root = None
            raise

    @abstractmethod
    def _load(self, folder: str) -> tuple[nn.Module, Point, Any]:
        """The root module, the hook's place in it and the tokenizer."""

    @abstractmethod
    def _run(self, root: Any, tokens: Int[Tensor, "context position"]) -> None:
        """One forward pass, which the hook ends."""

    def activations(self, tokens: Int[Tensor, "context position"]) -> Float[Tensor, "context position d_model"]:
        """The hook's float32 activations, heads flattened; the forward pass ends there."""
        root, point = self._require()
        module = root.get_submodule(point.path)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(args[0] if args else kwargs["hidden_states"])

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            raise _Reached(output if isinstance(output, Tensor) else output[0])

        handle = module.register_forward_pre_hook(before, with_kwargs=True) if point.takes_input else module.register_forward_hook(after)
        # A caller's autocast would make the activations depend on who asks for them.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            try:
                self._run(root, tokens.to(self.device))
            except _Reached as reached:
                return self._per_token(reached.activations, tokens)
            finally:
                handle.remove()
        raise InputError(f"hook: {self.hook!r} is not reached by a forward pass of {self.name!r}")

    def _per_token(self, activations: Any, tokens: Tensor) -> Tensor:
        """The hook's output, where it is one vector a token."""
        if not isinstance(activations, Tensor) or activations.ndim < 3 or activations.shape[:2] != tokens.shape:
            shape = tuple(activations.shape) if isinstance(activations, Tensor) else type(activations).__name__
            raise InputError(f"hook: {self.hook!r} must give one vector a token (context x position x width), it gives {shape}")
        return activations.flatten(2).float()

    @property
    def d_model(self) -> int:
        """The hook's width, as seen in a forward pass."""
        self._require()
        return self._d_model

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
        root, _ = self._require()
        for config in (getattr(root, "cfg", None), getattr(root, "config", None)):
            for name in ("n_ctx", "max_position_embeddings"):
                if isinstance(getattr(config, name, None), int):
                    return getattr(config, name)
        return None

    def metadata(self) -> dict[str, Any]:
        """What a published SAE tells of its model, by SAELens's names.

        `hook_name` is TransformerLens's where it has one, the dialect that the readers of SAELens folders speak;
        `hf_hook_name` is the module's path on the transformers backend.
        """
        _, point = self._require()
        return {
            "model_name": self.name,
            "model_class_name": "HookedTransformer" if point.lens else "AutoModelForCausalLM",
            "hook_name": point.lens or point.path,
            **({} if point.path == point.lens else {"hf_hook_name": point.path}),
            "model_from_pretrained_kwargs": self.model_kwargs,
        }

    def _require(self) -> tuple[nn.Module, Point]:
        if self._root is None or self._point is None:
            raise RuntimeError(f"{self.name}: load() comes first")
        return self._root, self._point


class HuggingFaceLM(LanguageModel):
    """Any hub name or local folder that transformers' `AutoModelForCausalLM` reads; layers after the hook are not loaded."""

    def _load(self, folder: str) -> tuple[nn.Module, Point, Any]:
        _check_kwargs(self.model_kwargs, (*CONFIG_KWARGS, *LOADER_KWARGS))
        shared = {k: v for k, v in self.model_kwargs.items() if k in CONFIG_KWARGS}
        with _hub(self.name):
            config = AutoConfig.from_pretrained(folder, **shared)
            trust = {"trust_remote_code": True} if self.model_kwargs.get("trust_remote_code") else {}
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(config, **trust)
        point, stack = locate(self.hook, skeleton), layers_path(skeleton)
        dropped = cut(config, point.layers)
        with _hub(self.name), expected_leftovers(type(skeleton), stack, dropped):
            kwargs = {**self.model_kwargs, "dtype": self.dtype, "config": config}
            proxy: Any = load_model("AutoModelForCausalLM", folder, self.device, kwargs, hook_names=[point.path])
        proxy.model.config.use_cache = False
        return proxy.model, point, proxy.tokenizer

    def _run(self, root: Any, tokens: Int[Tensor, "context position"]) -> None:
        root(tokens)


class TransformerLensLM(LanguageModel):
    """A model as TransformerLens's `HookedTransformer` has it, unprocessed; a local folder where it converts that architecture."""

    def _load(self, folder: str) -> tuple[nn.Module, Point, Any]:
        known = (*inspect.signature(HookedTransformer.from_pretrained).parameters, *CONFIG_KWARGS, *LOADER_KWARGS)
        _check_kwargs(self.model_kwargs, [k for k in known if k not in ("model_name", "device", "dtype", "from_pretrained_kwargs")])
        local = Path(folder).is_dir()
        aliases = loading_from_pretrained.make_model_alias_map()
        if not local and folder.lower() not in aliases:
            near = did_you_mean(self.name, aliases)
            raise InputError(f"name: TransformerLens knows no model {self.name!r}{near}; HuggingFaceLM takes any")
        with self._converting():
            config = loading_from_pretrained.get_pretrained_model_config(folder)
        post_norm = bool(config.use_normalization_before_and_after)
        hook = lens_name(self.hook, POST_NORM if post_norm else PLAIN) or self.hook
        block = LENS.match(hook)
        names = [f"blocks.{i}.{kind}" for i in range(config.n_layers) for kind in (*RESIDUAL, "hook_attn_out", "hook_mlp_out")]
        if block and int(block[1]) >= config.n_layers:
            raise unknown_hook(self.hook, self.name, names)
        kwargs = {**self.model_kwargs, "first_n_layers": int(block[1]) + 1 if block else None}
        with self._converting():
            given = {**kwargs, "dtype": self.dtype}
            model: Any = _lens_folder(folder, self.device, given) if local else load_model("HookedTransformer", folder, self.device, given)
        if hook not in model.hook_dict:
            raise unknown_hook(self.hook, self.name, model.hook_dict)
        return model, Point(hook, False, kwargs["first_n_layers"], hook), model.tokenizer

    @contextlib.contextmanager
    def _converting(self) -> Generator[None, None, None]:
        """TransformerLens's complaint about a model it cannot convert, as a line."""
        try:
            with _hub(self.name):
                yield
        except (NotImplementedError, AttributeError, KeyError, ValueError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"name: TransformerLens cannot convert {self.name!r} ({_line(error)}); HuggingFaceLM may") from error

    def _run(self, root: Any, tokens: Int[Tensor, "context position"]) -> None:
        root(tokens, return_type=None, prepend_bos=False)


@contextlib.contextmanager
def _no_chatter() -> Generator[None, None, None]:
    """Loading without progress bars and greetings, but with transformers' warnings of weights that are missing."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    # transformer-lens turns these warnings off when it is imported: a layer missing from a checkpoint would be random in silence.
    transformers_logging.set_verbosity_warning()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", message="HookedTransformer", category=DeprecationWarning)
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _hub(name: str) -> Generator[None, None, None]:
    """A model that cannot be had, as a line."""
    try:
        yield
    except OSError as error:
        where = "is no local folder and the hub did not give it" if not Path(name).is_dir() else "cannot be read as a model folder"
        raise InputError(f"name: {name!r} {where}{did_you_mean(name, [EMBEDDED])}: {_line(error)}") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"name: {name!r} cannot be loaded: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_kwargs(given: dict[str, Any], known: Any) -> None:
    for key in given:
        if key not in known:
            raise InputError(f"model_kwargs: {key!r} is not an argument of from_pretrained{did_you_mean(key, known)}")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype: a floating type of torch such as float32 or bfloat16, not {name!r}")
    return dtype


def _lens_folder(folder: str, device: torch.device, kwargs: dict[str, Any]) -> HookedTransformer:
    """TransformerLens's own steps for a folder, which its `from_pretrained` asks to be one of its names."""
    config = loading_from_pretrained.get_pretrained_model_config(folder, device=str(device), **kwargs)
    weights = loading_from_pretrained.get_pretrained_state_dict(folder, config, dtype=kwargs["dtype"])
    model = HookedTransformer(config, AutoTokenizer.from_pretrained(folder), move_to_device=False)
    model.load_and_process_state_dict(weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    return model.to(device)
