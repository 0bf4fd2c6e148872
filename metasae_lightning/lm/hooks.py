"""Hook names, as TransformerLens names or module paths: where a model has them, and which layers are needed to reach them."""

import contextlib
import re
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from metasae_lightning.errors import InputError, did_you_mean

# The hooks of a layer's residual stream.
RESIDUAL_HOOKS = ("hook_resid_pre", "hook_resid_post")
# TransformerLens's hook of a sublayer's output, by the sublayer's name in transformers.
SUBLAYER_HOOKS = {"self_attn": "hook_attn_out", "attn": "hook_attn_out", "attention": "hook_attn_out", "mlp": "hook_mlp_out"}
# Gemma 2 and similar models normalise a sublayer's output before they add it to the residual stream: the hook is on the norm.
POST_NORM_HOOKS = {"post_attention_layernorm": "hook_attn_out", "post_feedforward_layernorm": "hook_mlp_out"}
LENS_HOOK = re.compile(r"blocks\.(\d+)\.(\w+)")


@dataclass(frozen=True)
class HookLocation:
    """The location of a hook in a model."""

    path: str
    """The module's path."""
    at_input: bool
    """Whether the activations are the module's input; else they are its output."""
    n_layers: int | None
    """The number of layers that a forward pass needs to reach the hook; None if the hook is outside of the layers."""
    lens_name: str | None
    """TransformerLens's name of the hook; None if it has none."""


def lens_name(path: str, sublayers: dict[str, str]) -> str | None:
    """TransformerLens's name for a module path of transformers; None if it has none.

    `sublayers` has TransformerLens's hook of each child module of a layer.

    >>> lens_name("model.layers.19", SUBLAYER_HOOKS), lens_name("transformer.h.3.mlp", SUBLAYER_HOOKS)
    ('blocks.19.hook_resid_post', 'blocks.3.hook_mlp_out')
    >>> print(lens_name("model.layers.3.mlp", POST_NORM_HOOKS))
    None
    """
    match = re.fullmatch(r"(?:\w+\.)*(?:layers|h)\.(\d+)(?:\.(\w+))?", path)
    if not match:
        return None
    kind = sublayers.get(match[2]) if match[2] else "hook_resid_post"
    return f"blocks.{match[1]}.{kind}" if kind else None


def attach(module: nn.Module, hook: HookLocation, callback: Callable[[Any], Tensor | None]) -> Any:
    """Call `callback` with a module's input or output in each forward pass; returns the handle that removes it.

    A tensor returned by `callback` replaces the input or output; None leaves it unchanged.
    """

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        new = callback(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        new = callback(output if isinstance(output, Tensor) else output[0])
        return None if new is None else new if isinstance(output, Tensor) else (new, *output[1:])

    return module.register_forward_pre_hook(before, with_kwargs=True) if hook.at_input else module.register_forward_hook(after)


def locate(hook: str, skeleton: nn.Module) -> HookLocation:
    """The location of a hook in a transformers model, from its TransformerLens name or its module path."""
    stack = layer_stack_path(skeleton)
    modules = dict(skeleton.named_modules())
    count = len(cast(nn.ModuleList, modules[stack]))
    sublayers = {kind: child for child, kind in _sublayer_hooks(modules[f"{stack}.0"]).items()}
    kinds = (*RESIDUAL_HOOKS, *sublayers)
    if (match := LENS_HOOK.fullmatch(hook)) and match[2] in kinds and int(match[1]) < count:
        layer, kind = int(match[1]), match[2]
        if kind == "hook_resid_pre":
            # A layer's input is the previous layer's output. The first layer has none: its own input is taken, because models may
            # scale the embeddings or add positions to them.
            return HookLocation(f"{stack}.{layer - 1}", False, layer, hook) if layer else HookLocation(f"{stack}.0", True, 1, hook)
        path = f"{stack}.{layer}" if kind == "hook_resid_post" else f"{stack}.{layer}.{sublayers[kind]}"
        return HookLocation(path, False, layer + 1, hook)
    if hook in modules and hook != "":
        match = re.match(rf"{re.escape(stack)}\.(\d+)", hook)
        return HookLocation(hook, False, int(match[1]) + 1 if match else None, lens_name(hook, _sublayer_hooks(modules[f"{stack}.0"])))
    known = [f"blocks.{i}.{kind}" for i in range(count) for kind in kinds]
    raise unknown_hook(hook, type(skeleton).__name__, [*known, *filter(None, modules)])


def locate_in_lens(hooks: list[str], model: str, config: Any) -> list[HookLocation]:
    """The locations of hooks in a TransformerLens model, from TransformerLens names or module paths of transformers.

    Args:
        hooks: The hooks' names.
        model: The model's name, for messages.
        config: TransformerLens's config of the model; a hook of a layer that it does not have raises an error.
    """
    sublayers = POST_NORM_HOOKS if config.use_normalization_before_and_after else SUBLAYER_HOOKS
    locations: list[HookLocation] = []
    for requested in hooks:
        hook = lens_name(requested, sublayers) or requested
        block = LENS_HOOK.match(hook)
        if block and int(block[1]) >= config.n_layers:
            kinds = (*RESIDUAL_HOOKS, "hook_attn_out", "hook_mlp_out")
            raise unknown_hook(requested, model, [f"blocks.{i}.{kind}" for i in range(config.n_layers) for kind in kinds])
        locations.append(HookLocation(hook, False, int(block[1]) + 1 if block else None, hook))
    return locations


def _sublayer_hooks(layer: nn.Module) -> dict[str, str]:
    """TransformerLens's hook names by the layer's child modules; empty if the child modules have unknown names."""
    names = dict(layer.named_children())
    if all(child in names for child in POST_NORM_HOOKS):
        return POST_NORM_HOOKS
    present = {child: kind for child, kind in SUBLAYER_HOOKS.items() if child in names}
    # Layers with other child names (BLOOM, MPT) may add the residual inside the sublayer: then its output is another quantity.
    return present if len(present) == 2 else {}


def layer_stack_path(skeleton: Any) -> str:
    """The module path of the list of layers of the language model."""
    count = skeleton.config.get_text_config().num_hidden_layers
    stacks = [name for name, module in skeleton.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    stacks = [name for name in stacks if "vision" not in name and "audio" not in name]
    if not stacks:
        raise InputError(f"name: {type(skeleton).__name__} has no stack of {count} layers that a hook could name")
    return stacks[0]


def layers_needed(locations: Iterable[HookLocation]) -> int | None:
    """The number of layers that reach all hooks. None means all layers: a hook outside of the layers may be after the last layer."""
    counts = [location.n_layers for location in locations]
    return None if None in counts else max(filter(None, counts), default=0)


def truncate_config(config: Any, layers: int | None) -> range:
    """Shorten a model's config, in place, to its first layers; returns the numbers of the layers left out.

    Lists in the config with one entry per layer are shortened too. Nothing is shortened if `layers` is None, or if the model's last layers
    reuse the keys of earlier layers.
    """
    text = config.get_text_config()
    count = text.num_hidden_layers
    # The last layers of Gemma 3n reuse the keys of earlier layers, counted from the end: in a shorter model other layers would.
    if layers is None or layers >= count or getattr(text, "num_kv_shared_layers", 0):
        return range(0)
    per_layer = {k: v for k, v in vars(text).items() if isinstance(v, list | tuple) and len(v) == count and k != "architectures"}
    text.num_hidden_layers = layers
    for key, values in per_layer.items():
        setattr(text, key, values[:layers])
    return range(layers, count)


@contextlib.contextmanager
def ignore_dropped_layers(model: Any, stack_path: str, dropped: range) -> Generator[None, None, None]:
    """A block in which a checkpoint loads without a warning about the weights of dropped layers. Other unexpected weights still give one.

    Args:
        model: The model's class in transformers.
        stack_path: The module path of the list of layers.
        dropped: The numbers of the dropped layers.
    """
    before = model._keys_to_ignore_on_load_unexpected
    stack = stack_path.rsplit(".", 1)[-1]
    model._keys_to_ignore_on_load_unexpected = [*(before or []), *(rf"(^|\.){stack}\.{i}\." for i in dropped)]
    try:
        yield
    finally:
        model._keys_to_ignore_on_load_unexpected = before


def unknown_hook(hook: str, model: str, known: Iterable[str]) -> InputError:
    """The error for a hook that a model does not have, with the most similar hook names."""
    return InputError(f"hook: {model} has no {hook!r}{did_you_mean(hook, known)}")
