"""A language model read at its hooks and no further: what every backend has in common."""

import contextlib
import copy
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoTokenizer

from metasae_lightning.errors import InputError
from metasae_lightning.lm import device
from metasae_lightning.lm.embedded_model import EMBEDDED, embedded_folder
from metasae_lightning.lm.hooks import Point, attach
from metasae_lightning.lm.loading import CONFIG_KWARGS, additive, dtype_of, hub, no_chatter
from metasae_lightning.redaction import redact

log = logging.getLogger(__name__)

Tokens = Int[Tensor, "context position"]
Mask = Float[Tensor, "context 1 position position"] | None

# Hooks are the module's: a pass of another thread, of a stream that is made ahead, would end at them.
PASSING = threading.Lock()


class _Reached(Exception):
    """Ends a forward pass at the last hook."""


class LanguageModel(ABC):
    """A causal language model read at one hook, or at several in one pass; nothing is loaded before `load`.

    Args:
        name: A name on the hub, or a local folder.
        hook: Where activations are taken, or several such places.
        device: Where it lies: `auto` is its SAE's GPU, `own` one that no SAE of this machine is on, or a name such as `cuda:1` or `cpu`.
        dtype: What it computes in.
        model_kwargs: More for the backend's `from_pretrained`.
    """

    def __init__(
        self, name: str, hook: str | list[str], *, device: str = "auto", dtype: str = "float32", model_kwargs: dict[str, Any] | None = None
    ):
        self.name = name
        self.hooks = [hook] if isinstance(hook, str) else list(hook)
        if not self.hooks or len(set(self.hooks)) < len(self.hooks):
            raise InputError(f"hook: one name, or a list of different ones, got {hook}")
        self.dtype = dtype_of(dtype)
        self.model_kwargs = dict(model_kwargs or {})
        self.asked = device
        self._placed: torch.device | None = None
        self._root: nn.Module | None = None
        self._points: list[Point] = []
        self._tokenizer: Any = None
        self._widths: dict[str, int] = {}
        self._separates: bool | None = None
        self._whole = False

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

    def place(self, device: torch.device | str) -> None:
        """Load it there."""
        self._placed = torch.device(device)

    def skeleton(self) -> "LanguageModel":
        """This model on torch's meta device: it has sizes and no weights, and nothing is loaded."""
        twin = copy.copy(self)
        with torch.random.fork_rng(), no_chatter():
            twin._root, twin._points = self._skeleton(self._folder)
        return twin

    def complete(self) -> "LanguageModel":
        """This model loaded to its end, a second time: for what only its predictions tell."""
        twin = copy.copy(self)
        twin._root, twin._whole = None, True
        log.warning("%s is loaded whole, to measure its predictions", self.name)
        twin.load()
        return twin

    def logits(
        self,
        tokens: Int[Tensor, "context position"],
        visible: Bool[Tensor, "context position position"] | None = None,
        *,
        edit: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "context position vocabulary"]:
        """The predictions of a complete model, where wanted with the first hook's activations replaced by what `edit` makes of them."""
        if not self._whole:
            raise RuntimeError(f"{self.name}: it ends at its hook; complete() has the rest")

        def by(found: Tensor) -> Tensor | None:
            return None if edit is None else edit(found.flatten(2).float()).to(found.dtype).view_as(found)

        with self._attached([by]):
            return self._forward(tokens, visible).float()

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
    def _run(self, root: Any, tokens: Tokens, mask: Mask) -> Any:
        """One forward pass: its predictions, unless a hook ends it before."""

    def activations(
        self, tokens: Int[Tensor, "context position"], visible: Bool[Tensor, "context position position"] | None = None
    ) -> Float[Tensor, "context position d_model"]:
        """The hooks' float32 activations, heads flattened, one hook beside the other; the forward pass ends at the last.

        `visible[c, q, k]` tells which tokens k a token q of context c may attend to, where the model `separates`.
        """
        found = self._reach(tokens, visible)
        return found[0] if len(found) == 1 else torch.cat([part.to(self.device) for part in found], -1)

    def _reach(self, tokens: Tokens, visible: Tensor | None) -> list[Tensor]:
        found = dict[int, Tensor]()

        def keep(place: int, value: Any) -> None:
            found[place] = self._per_token(self.hooks[place], value, tokens)
            if len(found) == len(self._points):
                raise _Reached

        with self._attached([partial(keep, place) for place in range(len(self._points))]), contextlib.suppress(_Reached):
            self._forward(tokens, visible)
        missed = [hook for place, hook in enumerate(self.hooks) if place not in found]
        if missed:
            raise InputError(f"hook: {missed[0]!r} is not reached by a forward pass of {self.name!r}")
        return [found[place] for place in range(len(self._points))]

    @contextlib.contextmanager
    def _attached(self, uses: list[Callable[[Any], Tensor | None]]) -> Generator[None, None, None]:
        """One forward pass with these at the first hooks, and no other thread's pass beside it."""
        root = self._require()
        # A caller's autocast would make the activations depend on who asks for them; the meta device has none.
        with PASSING, torch.no_grad(), torch.autocast(self.device.type.replace("meta", "cpu"), enabled=False):
            handles = [attach(root.get_submodule(point.path), point, use) for point, use in zip(self._points, uses, strict=False)]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _forward(self, tokens: Tokens, visible: Tensor | None) -> Any:
        mask = None if visible is None else additive(visible.to(self.device), self.dtype)
        return self._run(self._require(), tokens.to(self.device), mask)

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
        return self._placed or device.found(self.asked)

    @property
    def n_ctx(self) -> int | None:
        """The longest context the model takes, where its config says."""
        root = self._require()
        for config in (getattr(root, "cfg", None), getattr(root, "config", None)):
            for name in ("n_ctx", "max_position_embeddings"):
                if isinstance(getattr(config, name, None), int):
                    return getattr(config, name)
        return None

    def description(self) -> dict[str, Any]:
        """Everything that activations are a function of, but for the hooks."""
        kwargs = {key: str(value) for key, value in sorted(redact(self.model_kwargs).items())}
        dtype = str(self.dtype).removeprefix("torch.")
        return {"model": self.name, "read_by": type(self).__name__, "computed_in": dtype, "model_kwargs": kwargs}

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
            "model_from_pretrained_kwargs": redact(self.model_kwargs),
        }

    def _require(self) -> nn.Module:
        if self._root is None:
            raise RuntimeError(f"{self.name}: load() comes first")
        return self._root
