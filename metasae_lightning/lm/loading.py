"""What loading a model from the hub or a folder says and refuses, in lines."""

import contextlib
import io
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import HookedTransformer, loading_from_pretrained
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from metasae_lightning.errors import InputError, did_you_mean
from metasae_lightning.lm.embedded_model import EMBEDDED

# `from_pretrained` hands what it does not know to the model's constructor, whose complaint names neither argument nor remedy.
CONFIG_KWARGS = (
    *("cache_dir", "code_revision", "force_download", "local_files_only", "proxies"),
    *("revision", "subfolder", "token", "trust_remote_code"),
)
LOADER_KWARGS = (
    *("attn_implementation", "device_map", "max_memory", "offload_buffers"),
    *("offload_folder", "quantization_config", "use_safetensors", "variant"),
)


@contextlib.contextmanager
def no_chatter() -> Generator[None, None, None]:
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
def hub(name: str) -> Generator[None, None, None]:
    """A model that cannot be had, as a line."""
    try:
        yield
    except OSError as error:
        where = "is no local folder and the hub did not give it" if not Path(name).is_dir() else "cannot be read as a model folder"
        raise InputError(f"name: {name!r} {where}{did_you_mean(name, [EMBEDDED])}: {line(error)}") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"name: {name!r} cannot be loaded: {line(error)}") from error


def line(error: Exception) -> str:
    """An exception's message on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def check_kwargs(given: dict[str, Any], known: Any) -> None:
    """Refuse what no `from_pretrained` takes."""
    for key in given:
        if key not in known:
            raise InputError(f"model_kwargs: {key!r} is not an argument of from_pretrained{did_you_mean(key, known)}")


def dtype_of(name: str) -> torch.dtype:
    """The floating type of that name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype: a floating type of torch such as float32 or bfloat16, not {name!r}")
    return dtype


def additive(visible: Bool[Tensor, "context position position"], dtype: torch.dtype) -> Float[Tensor, "context 1 position position"]:
    """A mask that every attention of transformers takes as it is: zero where visible, the least number elsewhere."""
    hidden = torch.full(visible.shape, torch.finfo(dtype).min, dtype=dtype, device=visible.device)
    return hidden.masked_fill_(visible, 0)[:, None]


@contextlib.contextmanager
def converting(name: str) -> Generator[None, None, None]:
    """TransformerLens's complaint about a model it cannot convert, as a line."""
    try:
        with hub(name):
            yield
    except (NotImplementedError, AttributeError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"name: TransformerLens cannot convert {name!r} ({line(error)}); HuggingFaceLM may") from error


def is_lens_folder(name: str) -> bool:
    """Whether it is a local folder; if it is not, it must be a name of TransformerLens's own."""
    local = Path(name).is_dir()
    aliases = loading_from_pretrained.make_model_alias_map()
    if not local and name.lower() not in aliases:
        near = did_you_mean(name, aliases)
        raise InputError(f"name: TransformerLens knows no model {name!r}{near}; HuggingFaceLM takes any")
    return local


def lens_folder(folder: str, device: torch.device, kwargs: dict[str, Any]) -> HookedTransformer:
    """TransformerLens's own steps for a folder, which its `from_pretrained` asks to be one of its names."""
    config = loading_from_pretrained.get_pretrained_model_config(folder, device=str(device), **kwargs)
    weights = loading_from_pretrained.get_pretrained_state_dict(folder, config, dtype=kwargs["dtype"])
    model = HookedTransformer(config, AutoTokenizer.from_pretrained(folder), move_to_device=False)
    model.load_and_process_state_dict(weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    return model.to(device)
