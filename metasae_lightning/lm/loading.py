"""Helpers to load a language model: quiet loading, errors of one line, argument checks, attention masks."""

import contextlib
import io
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, masking_utils
from transformers.utils import logging as transformers_logging

from metasae_lightning.errors import InputError, did_you_mean, one_line
from metasae_lightning.lm.embedded_model import EMBEDDED
from metasae_lightning.lm.hooked_transformer import (
    HookedTransformer,
    get_pretrained_model_config,
    get_pretrained_state_dict,
    make_model_alias_map,
)

# The arguments of `from_pretrained`. It passes unknown ones to the model's constructor, whose error does not name the argument.
CONFIG_KWARGS = (
    *("cache_dir", "code_revision", "force_download", "local_files_only", "proxies"),
    *("revision", "subfolder", "token", "trust_remote_code"),
)
LOADER_KWARGS = (
    *("attn_implementation", "device_map", "max_memory", "offload_buffers"),
    *("offload_folder", "quantization_config", "use_safetensors", "variant"),
)


@contextlib.contextmanager
def quiet_loading() -> Generator[None, None, None]:
    """Turn off progress bars and printed text while a model is loaded, but keep the warnings of transformers about missing weights."""
    progress_bar, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    # Importing transformer_lens turns these warnings off: then a layer missing from a checkpoint would silently get random weights.
    transformers_logging.set_verbosity_warning()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", message="HookedTransformer", category=DeprecationWarning)
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if progress_bar:
                transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def hub_errors(name: str) -> Generator[None, None, None]:
    """Turn the errors of transformers about a model that cannot be loaded into an `InputError` of one line."""
    try:
        yield
    except SafetensorError as error:
        raise InputError(f"name: the weights of {name!r} cannot be read: {one_line(error)}") from error
    except OSError as error:
        problem = "is no local folder and the hub did not give it" if not Path(name).is_dir() else "cannot be read as a model folder"
        raise InputError(f"name: {name!r} {problem}{did_you_mean(name, [EMBEDDED])}: {one_line(error)}") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"name: {name!r} cannot be loaded: {one_line(error)}") from error


def check_kwargs(kwargs: dict[str, Any], known: Any) -> None:
    """Raise an error for a key of `model_kwargs` that `from_pretrained` does not know."""
    for key in kwargs:
        if key not in known:
            raise InputError(f"model_kwargs: {key!r} is not an argument of from_pretrained{did_you_mean(key, known)}")


def parse_dtype(name: str) -> torch.dtype:
    """The floating-point dtype of torch with that name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype: expected a floating-point dtype of torch such as float32 or bfloat16, not {name!r}")
    return dtype


def additive_mask(visible: Bool[Tensor, "context position position"], dtype: torch.dtype) -> Float[Tensor, "context 1 position position"]:
    """An additive attention mask: zero where `visible`, the lowest number of the dtype elsewhere.

    The eager, SDPA and flex attention of transformers use such a mask unchanged; flash attention cannot use it.
    """
    mask = torch.full(visible.shape, torch.finfo(dtype).min, dtype=dtype, device=visible.device)
    return mask.masked_fill_(visible, 0)[:, None]


@contextlib.contextmanager
def one_sequence_per_context() -> Generator[None, None, None]:
    """A block in which transformers takes each context for one sequence, which it is: all positions are consecutive.

    transformers would search the positions of every pass for several sequences. The host reads the result, so that it waits for the GPU.
    """
    search: Any = getattr(masking_utils, "find_packed_sequence_indices", None)
    if search is None:
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda position_ids: None  # pyright: ignore
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = search


@contextlib.contextmanager
def lens_errors(name: str) -> Generator[None, None, None]:
    """Turn the errors of TransformerLens about a model that it cannot convert into an `InputError` of one line."""
    try:
        with hub_errors(name):
            yield
    except (NotImplementedError, AttributeError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"name: TransformerLens cannot convert {name!r} ({one_line(error)}); try HuggingFaceLM") from error


def is_lens_folder(name: str) -> bool:
    """Whether the name is a local folder. Raise an error if it is neither a folder nor a model of TransformerLens."""
    is_folder = Path(name).is_dir()
    aliases = make_model_alias_map()
    if not is_folder and name.lower() not in aliases:
        raise InputError(f"name: TransformerLens knows no model {name!r}{did_you_mean(name, aliases)}; HuggingFaceLM reads any model")
    return is_folder


def load_lens_folder(folder: str, device: torch.device, kwargs: dict[str, Any]) -> HookedTransformer:
    """Load a local folder as a `HookedTransformer`, whose own `from_pretrained` accepts only its list of model names."""
    config = get_pretrained_model_config(folder, device=str(device), **kwargs)
    weights = get_pretrained_state_dict(folder, config, dtype=kwargs["dtype"])
    model = HookedTransformer(config, AutoTokenizer.from_pretrained(folder), move_to_device=False)
    model.load_and_process_state_dict(weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    return model.to(device)
