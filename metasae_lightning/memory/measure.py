"""Measure peak memory by counting tensor storages, of training on scaled-down SAEs and of a language model on the meta device."""

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metasae_lightning import functional
from metasae_lightning.compute.row_chunks import dry_run_scale, is_blocked
from metasae_lightning.lm.base import LanguageModel
from metasae_lightning.memory.scaled_copies import scaled_down
from metasae_lightning.objectives import Objective
from metasae_lightning.sae.learner import Learner
from metasae_lightning.step import Batch, Contexts
from metasae_lightning.training.joint import JointSAE

aten = torch.ops.aten
ARITHMETIC = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
# glibc's DEFAULT_MMAP_THRESHOLD_MAX. Freed blocks below it stay in the heap, in holes that blocks of the next phase do not fit, so small
# blocks of phases add up. Larger blocks go back to the system at once.
LARGE_BLOCK = 32 * 2**20
# Elements of the largest matrix of a dry run: half a MiB each, so that a run takes milliseconds and vectors stay small beside matrices.
DRY_RUN_ELEMENTS = 2**17


@dataclass(frozen=True)
class PeakMemory:
    """Bytes that a computation adds, at its peak, to what was allocated before: the result of a measurement or an estimate."""

    bytes: int
    """Bytes at the peak."""
    small_bytes: int
    """Peak of bytes in small blocks, which malloc keeps when they are freed."""

    def scaled(self, factor: float) -> "PeakMemory":
        """Peak of a computation whose arrays are `factor` times as large."""
        return PeakMemory(round(self.bytes * factor), round(self.small_bytes * factor))


class AllocationTracker(TorchDispatchMode):
    """Counts the bytes of tensor storages that are allocated while it is active, for as long as each lives.

    It does not see memory that a kernel allocates for itself. Two kinds of kernels matter, and their memory is added. On a CPU
    torch.topk copies its input into pairs of value and index, 16 bytes an entry (aten/src/ATen/native/TopKImpl.h), and batch top-k ranks a
    whole batch. Arithmetic on two types copies one operand to the wider type (TensorIterator.cpp), such as JumpReLU's product of
    activations and a mask.

    Args:
        large_block: Blocks of fewer bytes count as small.
    """

    def __init__(self, large_block: float = LARGE_BLOCK) -> None:
        super().__init__()
        self.large_block = large_block
        # Pairs: bytes of all blocks, and of the small ones among them.
        self._current, self._peak = [0, 0], [0, 0]
        self._storage_bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run an operator; count the new storages of its result until they are freed, and the kernel's scratch memory.

        A bool read from a meta tensor is True: the language model asks so whether a context is one unmasked sequence.
        """
        # A model without weights asks whether each context is a single unmasked sequence; it is.
        if func is aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return True
        input_ids = {id(storage) for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if id(storage) not in self._storage_bytes and id(storage) not in input_ids:  # a view of existing memory adds no bytes
                self._storage_bytes[id(storage)] = storage.nbytes()
                self._count(storage.nbytes(), 1)
                weakref.finalize(storage, self._count_freed, id(storage))
        for scratch in _kernel_scratch(func, args, out):
            self._count(scratch, 1)
            self._count(scratch, -1)
        return out

    def _count_freed(self, storage_id: int) -> None:
        """Subtract a storage that was freed."""
        self._count(self._storage_bytes.pop(storage_id), -1)

    def _count(self, size: int, sign: int) -> None:
        """Add (sign 1) or subtract (sign -1) a block, and update the peaks."""
        is_small = size < self.large_block
        self._current[0] += sign * size
        self._current[1] += sign * size * is_small
        self._peak[1] = max(self._peak[1], self._current[1])
        # A freed small block stays with malloc, below later large blocks.
        self._peak[0] = max(self._peak[0], self._current[0] - self._current[1] + self._peak[1])

    @property
    def live_bytes(self) -> int:
        """Bytes allocated under this tracker that are still alive."""
        return self._current[0]

    def peak_of(self, computation: Callable[[], Any]) -> PeakMemory:
        """Run a function and return its peak above what was allocated before."""
        before, self._peak = list(self._current), list(self._current)
        with self:
            computation()
        return PeakMemory(*(peak - start for peak, start in zip(self._peak, before, strict=True)))


def _kernel_scratch(func: Any, args: tuple[Any, ...], out: Any) -> list[int]:
    """Bytes that a kernel allocates for itself: pairs that top-k sorts, and operands that arithmetic converts to the result's type."""
    if func is aten.topk.default:
        return [16 * args[0].shape[-1]] if is_blocked(args[0]) else []
    if func not in ARITHMETIC:
        return []
    return [t.numel() * out.itemsize for t in args if isinstance(t, Tensor) and t.ndim and t.dtype != out.dtype]


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """The storages of all strided tensors in a nested result, and of the indices and values of COO tensors. CSR tensors are left out."""
    for tensor in tree_leaves(tree):
        if isinstance(tensor, Tensor) and tensor.layout in (torch.strided, torch.sparse_coo):
            parts = (tensor,) if tensor.layout is torch.strided else (tensor._indices(), tensor._values())
            yield from (part.untyped_storage() for part in parts)


class _FusedAttention(TorchFunctionMode):
    """Attention without a matrix of scores. On the meta device torch would store all scores, unlike on real devices."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Replace attention on the meta device by an empty result of the same shape."""
        if func is nn.functional.scaled_dot_product_attention and args[0].is_meta:
            return args[0].new_empty(*args[0].shape[:-1], args[2].shape[-1])
        return func(*args, **(kwargs or {}))


def allocated_together(sizes: Sequence[int]) -> PeakMemory:
    """Peak of several blocks that are allocated at the same time.

    >>> allocated_together([100 * 2**20, 2**20])
    PeakMemory(bytes=105906176, small_bytes=1048576)
    """
    return PeakMemory(sum(sizes), sum(size for size in sizes if size < LARGE_BLOCK))


@dataclass(frozen=True)
class LanguageModelMemory:
    """Memory of a language model up to its hooks."""

    weights: int
    """Bytes of parameters and buffers; shared storages count once."""
    forward: PeakMemory
    """Peak of one forward pass, including the activations."""
    widths: dict[str, int]
    """The width of the activations at each hook."""


def measure_language_model(
    model: LanguageModel, contexts: int, positions: int, *, separate_documents: bool = False, all_layers: bool = False
) -> LanguageModelMemory:
    """Memory of a language model's weights and forward pass, from running the model's own code on torch's meta device.

    More `positions` than the model takes are an `InputError`.

    Args:
        model: The model, which is not loaded.
        contexts: Contexts in a forward pass.
        positions: Tokens in a context.
        separate_documents: Whether a mask separates documents, if the model takes one.
        all_layers: Whether the layers after the last hook are loaded too.
    """
    skeleton = model.skeleton(all_layers=all_layers)
    skeleton.check_context_size(positions)
    tokens = torch.zeros(contexts, positions, dtype=torch.long, device="meta")
    mask = torch.ones(contexts, positions, positions, dtype=torch.bool, device="meta") if separate_documents else None
    with _FusedAttention():
        try:
            forward = AllocationTracker().peak_of(lambda: skeleton.activations(tokens, mask))
        except (TypeError, ValueError, RuntimeError, NotImplementedError):  # a model that takes no such mask runs without it
            forward = AllocationTracker().peak_of(lambda: skeleton.activations(tokens))
        outputs = skeleton._hook_outputs(tokens[:1, :2], None)  # pyright: ignore[reportPrivateUsage]
    root, widths = skeleton._loaded_root(), [output.shape[-1] for output in outputs]  # pyright: ignore[reportPrivateUsage]
    return LanguageModelMemory(module_bytes(root), forward, dict(zip(skeleton.hooks, widths, strict=True)))


def measure_objective(objective: Objective, model: LanguageModel, positions: int, *, separate_documents: bool) -> PeakMemory:
    """Peak of a pass of an objective and its gradient, on torch's meta device, without the memory that attention keeps for its gradient."""
    objective, skeleton, n_contexts = copy.copy(objective), model.skeleton(all_layers=True), objective.contexts_at_once
    with _FusedAttention():
        objective.use(skeleton)
        tokens, rows = torch.zeros(n_contexts, positions, dtype=torch.long), torch.arange(n_contexts * positions)
        visible = torch.ones(n_contexts, positions, positions, dtype=torch.bool) if separate_documents else None
        width = skeleton._hook_outputs(tokens[:1, :2], None)[0].shape[-1]  # pyright: ignore[reportPrivateUsage]
        reconstruction = torch.zeros(len(rows), width, device="meta", requires_grad=True)
        try:
            return AllocationTracker().peak_of(lambda: objective.loss(reconstruction, Contexts(tokens, rows, visible)))
        except (TypeError, ValueError, RuntimeError, NotImplementedError):  # a model that takes no such mask runs without it
            return AllocationTracker().peak_of(lambda: objective.loss(reconstruction, Contexts(tokens, rows)))


def learners(model: JointSAE) -> dict[str, Learner]:
    """The learners of a module: the primary, and the meta SAE if there is one."""
    return {"primary": model.primary} | ({} if model.meta is None else {"meta": model.meta})


def module_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers; tied ones count once."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def host_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers in the host's memory now: 0 for weights on the meta device or on a GPU."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()) if tensor.device.type == "cpu")


def trained_bytes(module: nn.Module) -> int:
    """Bytes of the parameters that are trained."""
    return sum(p.nbytes for p in module.parameters() if p.requires_grad)


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of joint training beside weights and gradients: optimiser state, other bytes kept between steps, and peaks of steps."""

    optimizer: float
    """Bytes of optimiser state per byte of parameters."""
    cached_bytes: int
    """Bytes that stay allocated between steps, beside weights, gradients and optimiser state."""
    primary: PeakMemory
    """Peak of a primary step, including penalties."""
    meta: PeakMemory
    """Peak of a meta step; zero without a meta SAE."""
    evaluation: PeakMemory
    """Peak of a held-out batch."""


def measure_training(model: JointSAE, rows: int, *, precision: str = "32-true", gpu: bool = False, ranks: int = 1) -> TrainingMemory:
    """Memory of a step on `rows` rows, from steps of the same model scaled down in every dimension.

    The large arrays of a step have two of the sizes rows, d_in, d_sae and d_meta: sizes divided by `f` make all of them `f^2` smaller. All
    latents are dead, which makes the auxiliary loss largest. With `gpu` the step takes the GPU's code path. Several `ranks` divide the rows
    of a meta step. `precision` is Lightning's.
    """
    d_sae, d_in = model.primary.W_dec.shape
    widest = max(rows * d_sae, d_sae * d_in, 0 if model.meta is None else d_sae * model.meta.W_dec.shape[0])
    factor = max(1.0, min((widest / DRY_RUN_ELEMENTS) ** 0.5, d_in / 32))
    tracker, peaks, small_rows = AllocationTracker(LARGE_BLOCK / factor**2), dict[str, PeakMemory](), max(2, round(rows / factor))
    with (
        torch.random.fork_rng(),
        warnings.catch_warnings(),
        dry_run_scale(factor, gpu=gpu),
        torch.autocast("cpu", torch.bfloat16, enabled="bf16" in precision),
    ):
        warnings.simplefilter("ignore")
        dtype = torch.float64 if precision == "64-true" else model.primary.W_dec.dtype
        small = scaled_down(model, factor).to(dtype)
        optimizers = [small._optimizer_callables[name](learner.parameters()) for name, learner in learners(small).items()]  # pyright: ignore[reportPrivateUsage]

        def primary() -> None:
            _set_to_late_training(small.primary)
            small.step(Batch(torch.randn(small_rows, small.primary.sae.cfg.d_in, dtype=dtype)), *optimizers)

        def meta() -> None:
            if small.meta is not None:
                _set_to_late_training(small.meta)
                decoder_rows = functional.unit_rows(small.primary.W_dec.detach())
                rows_of_rank = max(2, -(-(small.meta_rows or len(decoder_rows)) // ranks))
                small.meta.learn(decoder_rows[:rows_of_rank], optimizers[1], backward=Tensor.backward)

        def evaluation() -> None:
            small.evaluate(Batch(torch.randn(small_rows, small.primary.sae.cfg.d_in, dtype=dtype)))

        # The first step allocates gradients and optimiser state, which stay.
        for phase in (primary, meta, primary, meta, evaluation):
            peaks[phase.__name__] = tracker.peak_of(phase).scaled(factor**2)
    state = sum(v.nbytes for optimizer in optimizers for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor))
    cached_bytes = max(0, tracker.live_bytes - state - trained_bytes(small))
    return TrainingMemory(state / trained_bytes(small), round(cached_bytes * factor**2), **peaks)


def _set_to_late_training(learner: Learner) -> None:
    """Set a learner to a late step, at which every part of the loss acts: warm-ups are over, statistics exist, all latents are dead."""
    learner.initialized = True
    learner.silent_for.fill_(learner.config.dead_after)
    learner.steps = 2520 * 10**6  # a multiple of every small number, for penalties with an interval
