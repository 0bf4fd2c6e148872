"""Hook names of both dialects, TransformerLens's and module paths, and where they sit in a transformers model."""

import contextlib
import re
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from metasae_lightning.errors import InputError, did_you_mean

RESIDUAL = ("hook_resid_pre", "hook_resid_post")
PLAIN = {"self_attn": "hook_attn_out", "attn": "hook_attn_out", "attention": "hook_attn_out", "mlp": "hook_mlp_out"}
# Gemma 2 and its kin normalise a sublayer's output before adding it: what is added to the stream is the norm's output.
POST_NORM = {"post_attention_layernorm": "hook_attn_out", "post_feedforward_layernorm": "hook_mlp_out"}
LENS = re.compile(r"blocks\.(\d+)\.(\w+)")


@dataclass(frozen=True)
class Point:
    """Where a hook sits in a loaded model."""

    path: str
    """The module's path."""
    takes_input: bool
    """Whether the hook is what enters the module rather than what leaves it."""
    layers: int | None
    """How many layers are needed to reach it; nothing where it belongs to no layer."""
    lens: str | None
    """TransformerLens's name for it; nothing where it has none."""


def lens_name(path: str, sublayers: dict[str, str]) -> str | None:
    """TransformerLens's name for a transformers module path, where it has one.

    >>> lens_name("model.layers.19", PLAIN), lens_name("transformer.h.3.mlp", PLAIN), lens_name("model.layers.3.mlp", POST_NORM)
    ('blocks.19.hook_resid_post', 'blocks.3.hook_mlp_out', None)
    """
    found = re.fullmatch(r"(?:\w+\.)*(?:layers|h)\.(\d+)(?:\.(\w+))?", path)
    if not found:
        return None
    kind = sublayers.get(found[2]) if found[2] else "hook_resid_post"
    return f"blocks.{found[1]}.{kind}" if kind else None


def attach(module: nn.Module, point: Point, use: Callable[[Any], Tensor | None]) -> Any:
    """Hand over what enters or leaves a module, and go on with what comes back, if anything does; returns the handle that ends it."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        new = use(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        new = use(output if isinstance(output, Tensor) else output[0])
        return None if new is None else new if isinstance(output, Tensor) else (new, *output[1:])

    return module.register_forward_pre_hook(before, with_kwargs=True) if point.takes_input else module.register_forward_hook(after)


def locate(hook: str, skeleton: nn.Module) -> Point:
    """The place of a hook, named in either dialect, in a transformers model."""
    layers = layers_path(skeleton)
    modules = dict(skeleton.named_modules())
    count = len(cast(nn.ModuleList, modules[layers]))
    sublayers = {kind: child for child, kind in _sublayers(modules[f"{layers}.0"]).items()}
    kinds = (*RESIDUAL, *sublayers)
    if (named := LENS.fullmatch(hook)) and named[2] in kinds and int(named[1]) < count:
        layer, kind = int(named[1]), named[2]
        if kind == "hook_resid_pre":
            # What enters a layer is what left the one before; only the first has none, and models scale or add positions before it.
            return Point(f"{layers}.{layer - 1}", False, layer, hook) if layer else Point(f"{layers}.0", True, 1, hook)
        path = f"{layers}.{layer}" if kind == "hook_resid_post" else f"{layers}.{layer}.{sublayers[kind]}"
        return Point(path, False, layer + 1, hook)
    if hook in modules and hook != "":
        within = re.match(rf"{re.escape(layers)}\.(\d+)", hook)
        return Point(hook, False, int(within[1]) + 1 if within else None, lens_name(hook, _sublayers(modules[f"{layers}.0"])))
    known = [f"blocks.{i}.{kind}" for i in range(count) for kind in kinds]
    raise unknown_hook(hook, type(skeleton).__name__, [*known, *filter(None, modules)])


def lens_points(hooks: list[str], model: str, config: Any) -> list[Point]:
    """The places of hooks, named in either dialect, in TransformerLens's model of this config; a layer it has not is refused."""
    sublayers = POST_NORM if config.use_normalization_before_and_after else PLAIN
    points: list[Point] = []
    for asked in hooks:
        hook = lens_name(asked, sublayers) or asked
        block = LENS.match(hook)
        if block and int(block[1]) >= config.n_layers:
            kinds = (*RESIDUAL, "hook_attn_out", "hook_mlp_out")
            raise unknown_hook(asked, model, [f"blocks.{i}.{kind}" for i in range(config.n_layers) for kind in kinds])
        points.append(Point(hook, False, int(block[1]) + 1 if block else None, hook))
    return points


def _sublayers(layer: nn.Module) -> dict[str, str]:
    names = dict(layer.named_children())
    if all(child in names for child in POST_NORM):
        return POST_NORM
    present = {child: kind for child, kind in PLAIN.items() if child in names}
    # A layer of other names (BLOOM, MPT) may add the residual inside its sublayer: then its output is another quantity.
    return present if len(present) == 2 else {}


def layers_path(skeleton: Any) -> str:
    """The path of the stack of layers that the language model is."""
    count = skeleton.config.get_text_config().num_hidden_layers
    stacks = [name for name, module in skeleton.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    stacks = [name for name in stacks if "vision" not in name and "audio" not in name]
    if not stacks:
        raise InputError(f"name: {type(skeleton).__name__} has no stack of {count} layers that a hook could name")
    return stacks[0]


def deepest(points: Iterable[Point]) -> int | None:
    """How many layers reach all of these; nothing where one belongs to no layer, which may come after all."""
    layers = [point.layers for point in points]
    return None if None in layers else max(filter(None, layers), default=0)


def cut(config: Any, layers: int | None) -> range:
    """Shorten a config to its first layers, lists of one entry a layer included; returns the layers dropped."""
    text = config.get_text_config()
    count = text.num_hidden_layers
    # Gemma 3n's last layers borrow the keys of earlier ones, counted from the end: cut, others would borrow.
    if layers is None or layers >= count or getattr(text, "num_kv_shared_layers", 0):
        return range(0)
    per_layer = {k: v for k, v in vars(text).items() if isinstance(v, list | tuple) and len(v) == count and k != "architectures"}
    text.num_hidden_layers = layers
    for key, values in per_layer.items():
        setattr(text, key, values[:layers])
    return range(layers, count)


@contextlib.contextmanager
def expected_leftovers(model: Any, layers: str, dropped: range) -> Generator[None, None, None]:
    """The checkpoint's keys of dropped layers are no surprise; any other still warns."""
    before = model._keys_to_ignore_on_load_unexpected
    stack = layers.rsplit(".", 1)[-1]
    model._keys_to_ignore_on_load_unexpected = [*(before or []), *(rf"(^|\.){stack}\.{i}\." for i in dropped)]
    try:
        yield
    finally:
        model._keys_to_ignore_on_load_unexpected = before


def unknown_hook(hook: str, model: str, known: Iterable[str]) -> InputError:
    """The line for a hook that a model does not have."""
    return InputError(f"hook: {model} has no {hook!r}{did_you_mean(hook, known)}")
