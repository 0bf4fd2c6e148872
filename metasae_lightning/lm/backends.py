"""Language models by the hook's name in either dialect, loaded up to the hook and no further."""

import contextlib
import inspect
from typing import Any

import torch
from sae_lens.load_model import load_model
from torch import nn
from transformer_lens import HookedTransformer, loading_from_pretrained
from transformers import AutoConfig, AutoModelForCausalLM

from metasae_lightning.lm.base import LanguageModel, Mask, Tokens
from metasae_lightning.lm.hooks import Point, cut, deepest, expected_leftovers, layers_path, lens_points, locate, unknown_hook
from metasae_lightning.lm.loading import CONFIG_KWARGS, LOADER_KWARGS, check_kwargs, converting, hub, is_lens_folder, lens_folder

__all__ = ["HuggingFaceLM", "LanguageModel", "TransformerLensLM"]


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
        dropped = cut(config, None if self._whole else deepest(points))
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

    def _run(self, root: Any, tokens: Tokens, mask: Mask) -> Any:
        return root(tokens, **({} if mask is None else {"attention_mask": mask})).logits


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
        layers = {} if self._whole else {"first_n_layers": deepest(points)}
        return {**self.model_kwargs, **layers, "dtype": self.dtype}, points, local

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

    def _run(self, root: Any, tokens: Tokens, mask: Mask) -> Any:
        if mask is not None:
            raise NotImplementedError("TransformerLens masks padding only")
        return root(tokens, return_type="logits", prepend_bos=False)
