"""Measure peak memory by counting tensor storages, on a model that is scaled down."""

import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metasae_lightning import functional
from metasae_lightning.compute.row_chunks import dry_run_scale
from metasae_lightning.lm.base import LanguageModel
from metasae_lightning.memory.scaled_copies import smaller
from metasae_lightning.sae.learner import Learner
from metasae_lightning.step import Batch
from metasae_lightning.training.joint import JointSAE

aten = torch.ops.aten
ARITHMETIC = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
# glibc's DEFAULT_MMAP_THRESHOLD_MAX: freed blocks below it stay in the heap, in holes that the next phase's blocks do not fit, so what
# phases hold in small blocks adds up; larger blocks go back to the system at once.
KEPT = 32 * 2**20
# Elements of the largest matrix of a dry run: half a MiB each, so that a run takes milliseconds and vectors stay small beside matrices.
TRIAL = 2**17


@dataclass(frozen=True)
class Rise:
    """Peak memory of a computation, above what was allocated before."""

    height: int
    """Bytes at the peak."""
    small: int
    """Peak of bytes in small blocks, which malloc keeps when they are freed."""

    def times(self, factor: float) -> "Rise":
        """Peak of a computation that is `factor` times as large."""
        return Rise(round(self.height * factor), round(self.small * factor))


class Live(TorchDispatchMode):
    """Counts the bytes of tensor storages that are allocated while it is active, for as long as each lives.

    It does not see memory that a kernel allocates for itself. Two cases matter, and are added. On a CPU torch.topk copies its input into
    pairs of value and index, 16 bytes an entry (aten/src/ATen/native/TopKImpl.h), and batch top-k ranks a whole batch. Arithmetic on two
    types copies one operand to the wider type (TensorIterator.cpp), such as JumpReLU's product of activations and a mask.

    Args:
        kept: Blocks of fewer bytes count as small.
    """

    def __init__(self, kept: float = KEPT) -> None:
        super().__init__()
        self.kept = kept
        self._now, self._top = [0, 0], [0, 0]
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Count the storages of the result."""
        # A model without weights asks whether each context is a single unmasked sequence; it is.
        if func is aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return True
        given = {id(storage) for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if id(storage) not in self._sizes and id(storage) not in given:  # a view of existing memory adds no bytes
                self._sizes[id(storage)] = storage.nbytes()
                self._move(storage.nbytes(), 1)
                weakref.finalize(storage, self._gone, id(storage))
        for scratch in [16 * args[0].shape[-1]] if func is aten.topk.default else _copied(args, out) if func in ARITHMETIC else []:
            self._move(scratch, 1)
            self._move(scratch, -1)
        return out

    def _gone(self, key: int) -> None:
        self._move(self._sizes.pop(key), -1)

    def _move(self, size: int, sign: int) -> None:
        small = size < self.kept
        self._now[0] += sign * size
        self._now[1] += sign * size * small
        self._top[1] = max(self._top[1], self._now[1])
        # A freed small block stays with malloc, below later large blocks.
        self._top[0] = max(self._top[0], self._now[0] - self._now[1] + self._top[1])

    @property
    def held(self) -> int:
        """Bytes allocated under this tracker that are still alive."""
        return self._now[0]

    def during(self, act: Callable[[], Any]) -> Rise:
        """Run a function and return its peak above what was allocated before."""
        before, self._top = list(self._now), list(self._now)
        with self:
            act()
        return Rise(*(top - start for top, start in zip(self._top, before, strict=True)))


def _copied(args: tuple[Any, ...], out: Tensor) -> list[int]:
    """Bytes of operands that are converted to the result's type."""
    return [t.numel() * out.itemsize for t in args if isinstance(t, Tensor) and t.ndim and t.dtype != out.dtype]


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """Storages of all tensors in a nested result, including the parts of sparse tensors."""
    for tensor in tree_leaves(tree):
        if isinstance(tensor, Tensor) and tensor.layout in (torch.strided, torch.sparse_coo):
            parts = (tensor,) if tensor.layout is torch.strided else (tensor._indices(), tensor._values())
            yield from (part.untyped_storage() for part in parts)


class _FusedAttention(TorchFunctionMode):
    """Attention without a matrix of scores. On the meta device torch would choose a kernel that stores all scores; real devices do not."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Count the storages of the result."""
        if func is nn.functional.scaled_dot_product_attention and args[0].is_meta:
            return args[0].new_empty(*args[0].shape[:-1], args[2].shape[-1])
        return func(*args, **(kwargs or {}))


def blocks(*sizes: list[int]) -> Rise:
    """Two allocations at the same time."""
    each = [size for some in sizes for size in some]
    return Rise(sum(each), sum(size for size in each if size < KEPT))


@dataclass(frozen=True)
class Reading:
    """Memory of a language model up to its hooks."""

    weights: int
    """Bytes of parameters and buffers; shared storages count once."""
    forward: Rise
    """Peak of one forward pass, including the activations."""


def reading(model: LanguageModel, contexts: int, positions: int, *, apart: bool = False) -> Reading:
    """Memory of a forward pass, from running the model's own code on torch's meta device.

    Args:
        model: The model, which is not loaded.
        contexts: Contexts in a forward pass.
        positions: Tokens in a context.
        apart: Whether a mask separates documents, if the model takes one.
    """
    skeleton = model.skeleton()
    tokens = torch.zeros(contexts, positions, dtype=torch.long, device="meta")
    visible = torch.ones(contexts, positions, positions, dtype=torch.bool, device="meta")
    with _FusedAttention():
        try:
            forward = Live().during(lambda: skeleton.activations(tokens, visible if apart else None))
        except (TypeError, ValueError, RuntimeError, NotImplementedError):  # a model that takes no such mask runs without it
            forward = Live().during(lambda: skeleton.activations(tokens))
    root = skeleton._loaded_root()  # pyright: ignore[reportPrivateUsage]
    return Reading(size(root), forward)


def learners(model: JointSAE) -> dict[str, Learner]:
    """The learners of a module: the primary, and the meta SAE if there is one."""
    return {"primary": model.primary} | ({} if model.meta is None else {"meta": model.meta})


def size(module: nn.Module) -> int:
    """Bytes of parameters and buffers; tied ones count once."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def allocated(module: nn.Module) -> int:
    """Bytes of parameters and buffers in the host's memory now: 0 for weights on the meta device or on a GPU."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()) if tensor.device.type == "cpu")


def parameters(module: nn.Module) -> int:
    """Bytes of trained parameters."""
    return sum(p.nbytes for p in module.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Training:
    """Memory of one step of joint training, beside weights and gradients."""

    optimizer: float
    """Bytes of optimiser state per byte of parameters."""
    kept: int
    """Bytes kept between steps, beside weights, gradients and optimiser state."""
    primary: Rise
    """Peak of a primary step, including penalties."""
    meta: Rise
    """Peak of a meta step; None without a meta SAE."""
    evaluation: Rise
    """Peak of a held-out batch."""


def training(model: JointSAE, rows: int, *, precision: str = "32-true", gpu: bool = False, ranks: int = 1) -> Training:
    """Memory of a step on `rows` rows, from steps of the same model scaled down in every dimension.

    Every array of a step is a product of two of rows, d_in, d_sae and d_meta: a factor `f` on each makes all of them `f^2` smaller.
    All latents are dead, which makes the auxiliary loss largest. With `gpu` the step takes the GPU's code path. Several `ranks` divide the
    rows of a meta step.
    """
    d_sae, d_in = model.primary.W_dec.shape
    widest = max(rows * d_sae, d_sae * d_in, 0 if model.meta is None else d_sae * model.meta.W_dec.shape[0])
    factor = max(1.0, min((widest / TRIAL) ** 0.5, d_in / 32))
    live, found, small_rows = Live(KEPT / factor**2), dict[str, Rise](), max(2, round(rows / factor))
    with (
        torch.random.fork_rng(),
        warnings.catch_warnings(),
        dry_run_scale(factor, gpu=gpu),
        torch.autocast("cpu", torch.bfloat16, enabled="bf16" in precision),
    ):
        warnings.simplefilter("ignore")
        dtype = torch.float64 if precision == "64-true" else model.primary.W_dec.dtype
        small = smaller(model, factor).to(dtype)
        optimizers = [small._optimizer_callables[name](learner.parameters()) for name, learner in learners(small).items()]  # pyright: ignore[reportPrivateUsage]

        def primary() -> None:
            _age(small.primary)
            small.step(Batch(torch.randn(small_rows, small.primary.sae.cfg.d_in, dtype=dtype)), *optimizers)

        def meta() -> None:
            if small.meta is not None:
                _age(small.meta)
                read = functional.unit_rows(small.primary.W_dec.detach())
                some = max(2, -(-(small.meta_rows or len(read)) // ranks))
                small.meta.learn(read[:some], optimizers[1], backward=Tensor.backward)

        def evaluation() -> None:
            small.evaluate(Batch(torch.randn(small_rows, small.primary.sae.cfg.d_in, dtype=dtype)))

        # The first step allocates gradients and optimiser state, which stay.
        for act in (primary, meta, primary, meta, evaluation):
            found[act.__name__] = live.during(act).times(factor**2)
    state = sum(v.nbytes for optimizer in optimizers for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor))
    kept = max(0, live.held - state - parameters(small))
    return Training(state / parameters(small), round(kept * factor**2), **found)


def _age(learner: Learner) -> None:
    """Set the module to a step at which everything acts: warm-ups are over, statistics exist and every latent is dead."""
    learner.initialized.fill_(True)
    learner.silent_for.fill_(learner.config.dead_after)
    learner.steps.fill_(2520 * 10**6)  # a multiple of every small number, for penalties with an interval
