"""The two backends of language models: transformers and TransformerLens.

Both load only the layers up to the last hook, unless the complete model is asked for.
"""

import contextlib
import inspect
from typing import Any

import torch
from sae_lens.load_model import load_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from metasae_lightning.lm.base import LanguageModel, Mask, Tokens
from metasae_lightning.lm.hooked_transformer import HookedTransformer, get_official_model_name, get_pretrained_model_config
from metasae_lightning.lm.hooks import (
    HookLocation,
    ignore_dropped_layers,
    layer_stack_path,
    layers_needed,
    locate,
    locate_in_lens,
    truncate_config,
    unknown_hook,
)
from metasae_lightning.lm.loading import (
    CONFIG_KWARGS,
    LOADER_KWARGS,
    check_kwargs,
    hub_errors,
    is_lens_folder,
    lens_errors,
    load_lens_folder,
    one_sequence_per_context,
)

__all__ = ["HuggingFaceLM", "LanguageModel", "TransformerLensLM"]


class HuggingFaceLM(LanguageModel):
    """A causal language model of transformers: any Hub name or local folder that `AutoModelForCausalLM` reads."""

    def _prepare(self, folder: str) -> tuple[dict[str, Any], list[HookLocation], contextlib.AbstractContextManager[None]]:
        """The arguments of `from_config` with the config cut after the last hook, the hooks' locations, and a context for loading.

        In that context the weights of the layers left out give no warning.
        """
        check_kwargs(self.model_kwargs, (*CONFIG_KWARGS, *LOADER_KWARGS))
        config_kwargs = {k: v for k, v in self.model_kwargs.items() if k in CONFIG_KWARGS}
        with hub_errors(self.name):
            config = AutoConfig.from_pretrained(folder, **config_kwargs)
            trust = {"trust_remote_code": True} if self.model_kwargs.get("trust_remote_code") else {}
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(config, **trust)
        locations, stack_path = [locate(hook, skeleton) for hook in self.hooks], layer_stack_path(skeleton)
        dropped = truncate_config(config, None if self._is_complete else layers_needed(locations))
        return {"config": config, **trust}, locations, ignore_dropped_layers(type(skeleton), stack_path, dropped)

    def _skeleton(self, folder: str) -> tuple[nn.Module, list[HookLocation]]:
        """The transformers model on the meta device, and the hooks' locations."""
        config_args, locations, _ = self._prepare(folder)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(**config_args, dtype=self.dtype).eval()
        skeleton.config.use_cache = False
        return skeleton, locations

    def _load(self, folder: str) -> tuple[nn.Module, list[HookLocation], Any]:
        """The transformers model with its weights, the hooks' locations, and the tokenizer."""
        config_args, locations, ignore_dropped = self._prepare(folder)
        with hub_errors(self.name), ignore_dropped:
            kwargs = {**self.model_kwargs, "dtype": self.dtype, **config_args}
            proxy: Any = load_model(
                "AutoModelForCausalLM", folder, self.device, kwargs, hook_names=[location.path for location in locations]
            )
        proxy.model.config.use_cache = False
        return proxy.model, locations, proxy.tokenizer

    def _run(self, root: Any, tokens: Tokens, mask: Mask) -> Any:
        """One forward pass; a mask replaces the model's own attention mask."""
        with one_sequence_per_context():
            return root(tokens, **({} if mask is None else {"attention_mask": mask})).logits


class TransformerLensLM(LanguageModel):
    """A language model as TransformerLens's `HookedTransformer`, with unprocessed weights.

    It reads the models that TransformerLens knows by name, and local folders of architectures that it can convert.
    """

    def _prepare(self, folder: str) -> tuple[dict[str, Any], list[HookLocation], bool]:
        """Arguments for TransformerLens, the locations of the hooks, and whether `folder` is a local folder and not a model's name."""
        known = (*inspect.signature(HookedTransformer.from_pretrained).parameters, *CONFIG_KWARGS, *LOADER_KWARGS)
        check_kwargs(self.model_kwargs, [k for k in known if k not in ("model_name", "device", "dtype", "from_pretrained_kwargs")])
        is_folder = is_lens_folder(folder)
        with lens_errors(self.name):
            config = get_pretrained_model_config(folder)
        locations = locate_in_lens(self.hooks, self.name, config)
        layers = {} if self._is_complete else {"first_n_layers": layers_needed(locations)}
        return {**self.model_kwargs, **layers, "dtype": self.dtype}, locations, is_folder

    @property
    def _tokenizer_source(self) -> str:
        """The local folder or the model's name on the Hub: TransformerLens has short names of its own, such as `gpt2-small`."""
        with lens_errors(self.name):
            return self._folder if is_lens_folder(self._folder) else get_official_model_name(self._folder)

    def _skeleton(self, folder: str) -> tuple[nn.Module, list[HookLocation]]:
        """The `HookedTransformer` on the meta device, and the hooks' locations."""
        args, locations, _ = self._prepare(folder)
        with lens_errors(self.name), torch.device("meta"):
            config = get_pretrained_model_config(folder, device="meta", **args)
            return HookedTransformer(config, move_to_device=False), locations

    def _load(self, folder: str) -> tuple[nn.Module, list[HookLocation], Any]:
        """The `HookedTransformer` with its weights, the hooks' locations, and the tokenizer."""
        args, locations, is_folder = self._prepare(folder)
        with lens_errors(self.name):
            if is_folder:
                model: Any = load_lens_folder(folder, self.device, args)
            else:
                model = load_model("HookedTransformer", folder, self.device, args)
        for hook, location in zip(self.hooks, locations, strict=True):
            if location.path not in model.hook_dict:
                raise unknown_hook(hook, self.name, model.hook_dict)
        return model, locations, model.tokenizer

    def _run(self, root: Any, tokens: Tokens, mask: Mask) -> Any:
        """One forward pass without a mask; a mask raises an error."""
        if mask is not None:
            raise NotImplementedError("TransformerLens takes masks for padding only")
        return root(tokens, return_type="logits", prepend_bos=False)
