"""The memory plan of a run, made before anything is loaded, and compared with the free memory."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from metasae_lightning.errors import InputError
from metasae_lightning.lm.device import assign_device
from metasae_lightning.memory import measure, scaled_copies
from metasae_lightning.memory.measure import Rise
from metasae_lightning.memory.table import GIB, Line, Plan, mib
from metasae_lightning.training.checkpoint_files import AtomicCheckpointIO
from metasae_lightning.training.joint import JointSAE
from metasae_lightning.training.side_by_side import SideBySide

# Memory limit of a control group, version 2 and 1: containers and batch systems enforce it; the machine's own figures ignore it.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def announce(model: Any, data: Any, trainer: Any, limit_gib: float | None = None) -> None:
    """Print the plan of a run to stderr, and refuse the run if it does not fit; a plan that fails stops no run."""
    if limit_gib is not None and limit_gib <= 0:
        raise InputError(f"memory_gib must be more than 0, or null for what is free, got {limit_gib}")
    try:
        weights = weights_plan(model, trainer)
        if not weights.fits(_free(weights, trainer, None)):  # a dry run, which has a part of the sizes, would not fit either
            weights.check(_free(weights, trainer, limit_gib))
        made = memory_plan(model, data, trainer)
        free = _free(made, trainer, limit_gib)
    except InputError:
        raise
    # A failed plan is no reason not to train.
    except Exception as error:
        sys.stderr.write(f"memory: no plan ({type(error).__name__}: {error})\n")
        return
    if trainer.is_global_zero:
        Console(stderr=True).print(made.table(free))
    made.check(free)


def _free(plan: Plan, trainer: Any, limit_gib: float | None) -> dict[str, int]:
    """Bytes that the run may use on each device of a plan."""
    return {device: may_be_had(device, beside(trainer)) if limit_gib is None else round(limit_gib * GIB) for device in plan.devices}


def weights_plan(model: JointSAE | SideBySide, trainer: Any) -> Plan:
    """The weights and gradients of all SAEs, arm by arm: a lower bound of the plan that is known without a dry run."""
    device, wide, shards = str(trainer.strategy.root_device), _dtype_factor(trainer), getattr(trainer.strategy, "shards", 1)
    arms = {"": model} if isinstance(model, JointSAE) else {f"{name}: ": arm for name, arm in model.arms.items()}
    parts = {name: scaled_copies.part(arm, shards) if shards > 1 else arm for name, arm in arms.items()}
    lines = (replace(line, what=name + line.what) for name, arm in parts.items() for line in _saes(arm, device, wide))
    return Plan(tuple(lines), is_lower_bound=True)


def _dtype_factor(trainer: Any) -> int:
    """Size of a parameter during training, relative to the float32 of its config."""
    return 2 if trainer.precision == "64-true" else 1


def beside(trainer: Any) -> int:
    """Number of processes of the run on this machine."""
    return max(1, getattr(trainer.strategy, "num_processes", 1))


def may_be_had(device: str, processes: int = 1) -> int:
    """Bytes that this process may use: free memory plus what it holds already, divided among the run's processes on this machine."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0] + torch.cuda.memory_reserved(torch.device(device))
    held = psutil.Process().memory_info().rss
    free = psutil.virtual_memory().available // processes + held
    for limit in (Path(path) for path in LIMITS):
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            free = min(free, int(text) // processes)
    return free


def memory_plan(model: JointSAE | SideBySide, data: Any, trainer: Any) -> Plan:
    """The memory plan of a run. Nothing is loaded; items that cannot be planned are named."""
    here, wide = trainer.strategy.root_device, _dtype_factor(trainer)
    arms = [model] if isinstance(model, JointSAE) else list(model.arms.values())
    shards = getattr(trainer.strategy, "shards", 1)
    own = [scaled_copies.part(arm, shards) if shards > 1 else arm for arm in arms]
    parts = {
        "language model": _language_model(data, trainer.strategy),
        "shuffle buffer": _buffer(arms[0], data, trainer.strategy),
        "SAEs": _together([_saes(arm, str(here), wide) for arm in own]),
        "training": _together([_training(arm, data, trainer, wide, shards) for arm in own]),
        "host": _together([_host(arm, data, trainer, wide, shards) for arm in arms]),
        "outputs": _outputs(arms[1:], data, str(here), wide),
    }
    lines, unknown = list[Line](), list[str]()
    for what, part in parts.items():
        try:
            lines += part
        # A user's own architecture, penalty or optimiser may fail at small sizes.
        except Exception as error:
            if isinstance(error, InputError) and what == "language model":
                raise
            unknown.append(f"{what} ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
    # Last, because planning imports what the run imports anyway.
    held = psutil.Process().memory_info().rss - (measure.allocated(model) if here.type == "cpu" else 0)
    return Plan((Line("this process", "cpu", held, "Python, its libraries and what is there already"), *lines), tuple(unknown))


def _together(arms: list[Iterator[Line]]) -> Iterator[Line]:
    """Items of all arms; equal items of several arms are combined into one."""
    if len(arms) == 1:
        yield from arms[0]
        return
    found: dict[tuple[str, str], list[Line]] = {}
    for line in chain(*arms):
        found.setdefault((line.what, line.device), []).append(line)
    for lines in found.values():
        hows = list(dict.fromkeys(line.how for line in lines))
        yield replace(sum(lines[1:], lines[0]), how=f"{len(lines)} arms: {hows[0]}" + (", and others" if len(hows) > 1 else ""))


def _setting(data: Any, name: str, default: Any = None) -> Any:
    """An argument of the data module, which may be stored in its `batching`."""
    return getattr(data, name, getattr(getattr(data, "batching", None), name, default))


def _ahead(data: Any, *devices: str) -> int:
    """Number of batches made ahead; the default depends on the devices of model and SAEs."""
    given = _setting(data, "prefetch", 0)
    return (2 if any(device.startswith("cuda") for device in devices) else 0) if given is None else given


def _phase(what: str, device: str, rise: Rise, how: str, remedy: str = "", *, kind: str) -> Line:
    # A GPU's allocator reuses any freed block.
    return Line(what, device, rise.height, how, remedy, phase=kind, small=rise.small if device == "cpu" else 0)


def _language_model(data: Any, strategy: Any) -> Iterator[Line]:
    model = getattr(data, "language_model", None)
    if model is None or getattr(data, "cache", None) is not None:
        return
    device = str(assign_device(model.requested_device, strategy))
    contexts, positions = _setting(data, "forward_batch"), _setting(data, "context_size")
    seen = measure.reading(model, contexts, positions, apart=not _setting(data, "cross_document_attention", True))
    dtype = str(model.dtype).removeprefix("torch.")
    remedy = "dtype: bfloat16" if model.dtype == torch.float32 else "read an earlier layer"
    yield Line("language model", device, seen.weights, f"{model.name} up to {', '.join(model.hooks)}, {dtype}", remedy)
    forward = _phase(
        "its forward pass", device, seen.forward, f"{contexts} contexts of {positions} tokens", "lower forward_batch", kind="contexts"
    )
    # Batches are made ahead while the SAEs train.
    yield replace(forward, phase="") if _ahead(data, device, str(strategy.root_device)) else forward
    if device != "cpu":
        yield _phase("loading it", "cpu", Rise(seen.weights, 0), "in the host's memory before it moves", remedy, kind="loading")


def _buffer(model: JointSAE, data: Any, strategy: Any) -> Iterator[Line]:
    rows, language_model = _setting(data, "buffer_size"), getattr(data, "language_model", None)
    if rows is None or language_model is None or getattr(data, "cache", None) is not None:  # with a cache, rows stay on the disk
        return
    rows, width = min(rows, data.tokens), model.primary.W_dec.shape[1] * len(language_model.hooks)
    dtype = getattr(torch, _setting(data, "buffer_dtype", "float32"))
    device, here = str(assign_device(language_model.requested_device, strategy)), str(strategy.root_device)
    ahead, device = _ahead(data, device, here), "cpu" if _setting(data, "buffer_device", "model") == "cpu" else device
    how = f"{rows:,} rows of {width} numbers, {str(dtype).removeprefix('torch.')}"
    buffer = Line("shuffle buffer", device, rows * width * dtype.itemsize, how, "lower buffer_size")
    yield buffer
    if ahead:
        size = _setting(data, "batch_size") * width * 4
        yield Line("batches made ahead", here, ahead * size, f"{ahead} of {mib(size)} MiB, float32", "lower prefetch")
    if _setting(data, "checkpoint_buffer") == "activations":
        rise = measure.blocks([buffer.bytes] * 2)
        yield _phase(
            "its checkpoint", "cpu", rise, "a copy in order, and in memory before the disk", "checkpoint_buffer: tokens", kind="file"
        )


def _saes(model: JointSAE, here: str, wide: int) -> Iterator[Line]:
    for name, learner in measure.learners(model).items():
        (latents, width), remedy = learner.W_dec.shape, f"lower {name}.d_sae"
        yield Line(f"{name} SAE", here, measure.size(learner) * wide, f"{latents:,} latents of {width} numbers", remedy)
        yield Line(f"{name} gradients", here, measure.parameters(learner) * wide, "one a parameter, kept between steps", remedy)


def _training(model: JointSAE, data: Any, trainer: Any, wide: int, shards: int) -> Iterator[Line]:
    rows, here = _setting(data, "batch_size") * shards, str(trainer.strategy.root_device)
    kind, ranks = trainer.strategy.root_device.type, max(1, trainer.world_size // shards)
    seen = measure.training(model, rows, precision=str(trainer.precision), gpu=kind == "cuda", ranks=ranks)
    state = round(seen.optimizer * measure.parameters(model) * wide)
    yield Line("optimisers' state", here, state, f"{seen.optimizer:.3g} times the parameters", "another optimiser, or lower primary.d_sae")
    if model.meta is not None and seen.kept and kind == "cpu":  # incremental top-k runs only here
        yield Line("decoder rows as they were", here, round(seen.kept * wide), "what the critic's candidates are from", "kernels: dense")
    split = f" in {model.primary.config.micro_batches} parts" if model.primary.config.micro_batches > 1 else ""
    how = f"{rows:,} rows{split} and the penalties, when latents are dead"
    yield _phase("a primary step", here, seen.primary, how, "raise micro_batches or lower batch_size", kind="batch")
    if model.meta is not None:
        read = model.meta_rows or len(model.primary.W_dec)
        how = f"{-(-read // ranks):,} decoder rows, when latents are dead"
        yield _phase("a meta step", here, seen.meta, how, "lower meta.d_sae or meta_rows", kind="decoder")
    yield _phase("a held-out batch", here, seen.evaluation, f"{rows:,} rows", "lower batch_size", kind="batch")
    if trainer.world_size > 1 and shards == 1:
        yield Line("DDP's buckets", here, measure.parameters(model) * wide, "as large as the gradients, on each rank", "fewer latents")
    if trainer.checkpoint_callbacks and not isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO) and shards == 1:
        # lightning.fabric.utilities.cloud_io._atomic_save
        rise = measure.blocks([sum(measure.size(learner) * wide for learner in measure.learners(model).values()) + state])
        yield replace(_phase("a checkpoint", "cpu", rise, "written to memory before the disk", kind="file"), arms="each")


def _host(model: JointSAE, data: Any, trainer: Any, wide: int, shards: int) -> Iterator[Line]:
    """Host memory for whole SAEs while they are built, checkpointed and exported."""
    rows, kind = _setting(data, "batch_size"), trainer.strategy.root_device.type
    saes = [measure.size(learner) * wide for learner in measure.learners(model).values()]
    if shards > 1 or (kind != "cpu" and model.primary.W_dec.is_meta):
        how = "whole, before each rank keeps its part" if shards > 1 else "in the host's memory before they move"
        yield replace(_phase("building them", "cpu", measure.blocks([sum(saes)]), how, kind="loading"), arms="each")
    for callback in trainer.callbacks:
        if (kept := getattr(callback, "calibration_tokens", None)) is not None:
            kept = min(-(-kept // rows) * rows, data.validation_tokens)
            yield from _export(model, rows, kept, saes, getattr(callback, "rows", None), beside(trainer), once=kind == "cpu")


def _outputs(others: list[JointSAE], data: Any, here: str, wide: int) -> Iterator[Line]:
    """Step outputs of earlier arms, which callbacks see after the last arm's step."""
    if others:
        size = sum(_setting(data, "batch_size") * arm.primary.W_dec.shape[1] * 4 * wide for arm in others)
        yield Line("steps to be shown", here, size, f"reconstructions by {len(others)} other arms", "lower batch_size")


def _export(model: JointSAE, rows: int, kept: int, saes: list[int], read: int | None, ranks: int, *, once: bool) -> Iterator[Line]:
    d_sae, d_in = model.primary.W_dec.shape
    how = f"{kept:,}, kept to check exports on"
    yield Line("held-out rows", "cpu", kept * d_in * 4, how, "lower calibration_tokens", arms="once" if once else "")
    # One SAE after the other: its twin and what is read back, and calibration.global_threshold on a batch, or on some decoder rows: the
    # positive pre-activations and torch.topk's 16 bytes for each.
    latents = max(rows * d_sae, 0 if model.meta is None else min(read or d_sae, d_sae) * len(model.meta.W_dec))
    rise = measure.blocks([max(saes)] * 2, [latents * 4, latents * 16])
    how = "a twin, what is read back and a threshold" + (f"; of one of {ranks} ranks, so a share for each" if ranks > 1 else "")
    yield _phase("an export", "cpu", rise.times(1 / ranks), how, kind="batch")
