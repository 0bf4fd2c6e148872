"""The memory plan of a run, made before anything is loaded, and compared with the available memory."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import psutil
import torch
from rich.console import Console

from metasae_lightning.errors import InputError
from metasae_lightning.lm.device import assign_device
from metasae_lightning.memory import measure, scaled_copies
from metasae_lightning.memory.available import available_bytes, processes_on_machine
from metasae_lightning.memory.measure import PeakMemory
from metasae_lightning.memory.objective_plan import objective_items, objectives_of
from metasae_lightning.memory.table import GIB, MemoryItem, MemoryPlan, format_mib
from metasae_lightning.training.argument_checks import check_widths
from metasae_lightning.training.checkpoint_files import AtomicCheckpointIO
from metasae_lightning.training.joint import JointSAE
from metasae_lightning.training.side_by_side import SideBySide, errors_name_arm


def print_and_check_plan(model: Any, data: Any, trainer: Any, limit_gib: float | None = None) -> None:
    """Raise an `InputError` if a run does not fit in memory, else print its plan to stderr.

    `limit_gib` replaces the available memory of each device. If the plan fails with any other error than an `InputError`, the error is
    printed and the run goes on without a plan.
    """
    check_limit(limit_gib)
    try:
        weights = weights_plan(model, trainer)
        if not weights.fits(
            available_by_device(weights, trainer, None)
        ):  # the dry run, which computes a part of a step, would not fit either
            weights.check(available_by_device(weights, trainer, limit_gib))
            sys.stderr.write("memory: no plan (--memory_gib allows more than there is, and the weights alone take more than there is)\n")
            return
        plan = memory_plan(model, data, trainer)
        available = available_by_device(plan, trainer, limit_gib)
    except InputError:
        raise
    # A failed plan is no reason not to train.
    except Exception as error:
        sys.stderr.write(f"memory: no plan ({type(error).__name__}: {error})\n")
        return
    check_and_print(plan, available, trainer)


def check_limit(limit_gib: float | None) -> None:
    """Reject a limit of memory that allows nothing."""
    if limit_gib is not None and limit_gib <= 0:
        raise InputError(f"memory_gib must be more than 0, or null for what is free, got {limit_gib}")


def planned_language_model(data: Any, strategy: Any) -> tuple[list[MemoryItem], list[str]]:
    """The items of the language model of `data`, and the names of what could not be planned, with the error."""
    try:
        return list(language_model_items(None, data, strategy)), []
    except InputError:
        raise
    # A failed plan is no reason not to run.
    except Exception as error:
        return [], [f"language model ({type(error).__name__}: {' '.join(str(error).split())[:200]})"]


def check_and_print(plan: MemoryPlan, available: dict[str, int], trainer: Any) -> None:
    """Raise an `InputError` if a plan does not fit in memory, else print it on rank zero."""
    plan.check(available)
    if trainer.is_global_zero:
        Console(stderr=True).print(plan.table(available))


def process_item(of_saes: int = 0) -> MemoryItem:
    """What this process holds, without the bytes `of_saes`, which have items of their own."""
    resident = psutil.Process().memory_info().rss - of_saes
    return MemoryItem("this process", "cpu", resident, "Python, its libraries and what is loaded already")


def available_by_device(plan: MemoryPlan, trainer: Any, limit_gib: float | None) -> dict[str, int]:
    """Bytes that the run may use on each device of a plan: the limit, or the available memory without one."""
    if limit_gib is not None:
        return dict.fromkeys(plan.devices, round(limit_gib * GIB))
    return {device: available_bytes(device, processes_on_machine(trainer)) for device in plan.devices}


def weights_plan(model: JointSAE | SideBySide, trainer: Any) -> MemoryPlan:
    """The weights and gradients of the SAEs of each arm: a lower bound of the plan, known without a dry run."""
    device, dtype_factor, shards = str(trainer.strategy.root_device), _dtype_factor(trainer), getattr(trainer.strategy, "shards", 1)
    arms = {"": model} if isinstance(model, JointSAE) else {f"{name}: ": arm for name, arm in model.arms.items()}
    parts = {name: scaled_copies.rank_part(arm, shards) if shards > 1 else arm for name, arm in arms.items()}
    items = (replace(item, name=arm + item.name) for arm, part in parts.items() for item in _sae_items(part, device, dtype_factor))
    return MemoryPlan(tuple(items), is_lower_bound=True)


def memory_plan(model: JointSAE | SideBySide, data: Any, trainer: Any) -> MemoryPlan:
    """The memory plan of a run. Nothing is loaded.

    A part of the plan that fails is named in `unplanned`, with its error. Only an `InputError` about the language model is raised.
    """
    device, dtype_factor = trainer.strategy.root_device, _dtype_factor(trainer)
    arms = [model] if isinstance(model, JointSAE) else list(model.arms.values())
    shards = getattr(trainer.strategy, "shards", 1)
    rank_parts = [scaled_copies.rank_part(arm, shards) if shards > 1 else arm for arm in arms]
    sections = {
        "language model": language_model_items(model, data, trainer.strategy),
        "shuffle buffer": _buffer_items(arms[0], data, trainer.strategy),
        "SAEs": _combine_arms([_sae_items(part, str(device), dtype_factor) for part in rank_parts]),
        "training": _combine_arms([_training_items(part, data, trainer, dtype_factor, shards) for part in rank_parts]),
        "host": _combine_arms([_host_items(arm, data, trainer, dtype_factor, shards) for arm in arms]),
        "outputs": _output_items(arms[1:], data, str(device), dtype_factor),
    }
    items, unplanned = list[MemoryItem](), list[str]()
    for section, section_items in sections.items():
        try:
            items += section_items
        # A user's own architecture, penalty or optimiser may fail at small sizes.
        except Exception as error:
            if isinstance(error, InputError) and section == "language model":
                raise
            unplanned.append(f"{section} ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
    # Last, because planning imports what the run imports anyway. SAEs that are built already have items of their own.
    process = process_item(measure.host_bytes(model) if device.type == "cpu" else 0)
    return MemoryPlan((process, *items), tuple(unplanned))


def _dtype_factor(trainer: Any) -> int:
    """Size of a parameter in training relative to float32: 2 in `64-true`, otherwise 1, since `bf16-mixed` keeps float32 parameters."""
    return 2 if trainer.precision == "64-true" else 1


def _combine_arms(arms: list[Iterator[MemoryItem]]) -> Iterator[MemoryItem]:
    """Items of all arms; the same item of several arms is combined into one."""
    if len(arms) == 1:
        yield from arms[0]
        return
    by_name: dict[tuple[str, str], list[MemoryItem]] = {}
    for item in chain(*arms):
        by_name.setdefault((item.name, item.device), []).append(item)
    for items in by_name.values():
        explanations = list(dict.fromkeys(item.explanation for item in items))
        others = ", and others" if len(explanations) > 1 else ""
        yield replace(sum(items[1:], items[0]), explanation=f"{len(items)} arms: {explanations[0]}{others}")


def _data_argument(data: Any, name: str, default: Any = None) -> Any:
    """An argument of the data module or of its `batching`; `default` if neither has it."""
    return getattr(data, name, getattr(getattr(data, "batching", None), name, default))


def _batches_ahead(data: Any, *devices: str) -> int:
    """Number of batches made ahead. If `prefetch` is None, it is 2 where any of the `devices` is a GPU, else 0."""
    prefetch = _data_argument(data, "prefetch", 0)
    return (2 if any(device.startswith("cuda") for device in devices) else 0) if prefetch is None else prefetch


def _temporary_item(name: str, device: str, peak: PeakMemory, explanation: str, remedy: str = "", *, phase: str) -> MemoryItem:
    """An item that exists during one phase of the run."""
    # A GPU's allocator reuses any freed block.
    return MemoryItem(name, device, peak.bytes, explanation, remedy, phase, small_bytes=peak.small_bytes if device == "cpu" else 0)


def language_model_items(saes: JointSAE | SideBySide | None, data: Any, strategy: Any) -> Iterator[MemoryItem]:
    """The language model's weights, its forward pass, and loading it. SAEs of another width than its activations are an `InputError`."""
    model = getattr(data, "language_model", None)
    if model is None or (getattr(data, "cache", None) is not None and getattr(data, "reading_cache", True)):
        return
    device = str(assign_device(model.requested_device, strategy))
    contexts, positions = _data_argument(data, "forward_batch"), _data_argument(data, "context_size")
    separate_documents = not _data_argument(data, "cross_document_attention", True)
    objectives, options = objectives_of(saes), {"separate_documents": separate_documents}
    memory = measure.measure_language_model(model, contexts, positions, **options, all_layers=bool(objectives))
    for arm, module in ({} if saes is None else {"": saes} if isinstance(saes, JointSAE) else saes.arms).items():
        with errors_name_arm(arm):
            check_widths(memory.widths, module.hook, module.primary.W_dec.shape[1])
    dtype, remedy = str(model.dtype).removeprefix("torch."), "dtype: bfloat16" if model.dtype == torch.float32 else "read an earlier layer"
    layers = "all layers" if objectives else f"up to {', '.join(model.hooks)}"
    yield MemoryItem("language model", device, memory.weights, f"{model.name} {layers}, {dtype}", remedy)
    yield from objective_items(objectives, data, device, positions=positions, **options)
    size = f"{contexts} contexts of {positions} tokens"
    forward = _temporary_item("its forward pass", device, memory.forward, size, "lower forward_batch", phase="contexts")
    # Batches are made ahead while the SAEs train.
    yield replace(forward, phase="") if _batches_ahead(data, device, str(strategy.root_device)) else forward
    if device != "cpu":
        loading = PeakMemory(memory.weights, 0)
        yield _temporary_item("loading it", "cpu", loading, "in the host's memory before it moves", remedy, phase="loading")


def _buffer_items(model: JointSAE, data: Any, strategy: Any) -> Iterator[MemoryItem]:
    """The shuffle buffer, the batches made ahead, and the buffer's copy in a checkpoint."""
    rows, language_model = _data_argument(data, "block_size"), getattr(data, "language_model", None)
    if rows is None or language_model is None or getattr(data, "cache", None) is not None:  # with a cache, rows stay on the disk
        return
    rows, width = min(rows, data.tokens), model.primary.W_dec.shape[1] * len(language_model.hooks)
    dtype = getattr(torch, _data_argument(data, "buffer_dtype", "float32"))
    lm_device, sae_device = str(assign_device(language_model.requested_device, strategy)), str(strategy.root_device)
    buffer_device = "cpu" if _data_argument(data, "buffer_device", "model") == "cpu" else lm_device
    size = f"{rows:,} rows of {width} numbers, {str(dtype).removeprefix('torch.')}"
    buffer = MemoryItem("shuffle buffer", buffer_device, rows * width * dtype.itemsize, size, "lower buffer_size")
    yield buffer
    if ahead := _batches_ahead(data, lm_device, sae_device):
        batch = _data_argument(data, "batch_size") * width * 4
        yield MemoryItem("batches made ahead", sae_device, ahead * batch, f"{ahead} of {format_mib(batch)} MiB, float32", "lower prefetch")
    if _data_argument(data, "checkpoint_buffer") == "activations":
        peak = measure.allocated_together([buffer.bytes] * 2)
        reason = "a copy in order, and in memory before the disk"
        yield _temporary_item("its checkpoint", "cpu", peak, reason, "checkpoint_buffer: tokens", phase="file")


def _sae_items(model: JointSAE, device: str, dtype_factor: int) -> Iterator[MemoryItem]:
    """Weights and gradients of the SAEs."""
    for name, learner in measure.learners(model).items():
        (latents, width), remedy = learner.W_dec.shape, f"lower {name}.d_sae"
        size = f"{latents:,} latents of {width} numbers"
        yield MemoryItem(f"{name} SAE", device, measure.module_bytes(learner) * dtype_factor, size, remedy)
        gradients = measure.trained_bytes(learner) * dtype_factor
        yield MemoryItem(f"{name} gradients", device, gradients, "one per parameter, kept between steps", remedy)


def _training_items(model: JointSAE, data: Any, trainer: Any, dtype_factor: int, shards: int) -> Iterator[MemoryItem]:
    """The optimisers' state, cached decoder rows, DDP's buckets, and the peaks of steps, held-out batches and checkpoints."""
    rows, device = _data_argument(data, "batch_size") * shards, str(trainer.strategy.root_device)
    device_type, ranks = trainer.strategy.root_device.type, max(1, trainer.world_size // shards)
    memory = measure.measure_training(model, rows, precision=str(trainer.precision), gpu=device_type == "cuda", ranks=ranks)
    state = round(memory.optimizer * measure.trained_bytes(model) * dtype_factor)
    remedy = "another optimiser, or lower primary.d_sae"
    yield MemoryItem("optimisers' state", device, state, f"{memory.optimizer:.3g} times the parameters", remedy)
    if model.meta is not None and memory.cached_bytes and device_type == "cpu":  # incremental top-k runs only here
        cached = round(memory.cached_bytes * dtype_factor)
        yield MemoryItem("cached decoder rows", device, cached, "of the critic's last full top-k", "kernels: dense")
    parts = f" in {model.primary.config.micro_batches} parts" if model.primary.config.micro_batches > 1 else ""
    size = f"{rows:,} rows{parts} and the penalties, when latents are dead"
    yield _temporary_item("a primary step", device, memory.primary, size, "raise micro_batches or lower batch_size", phase="batch")
    if model.meta is not None:
        decoder_rows = model.meta_rows or len(model.primary.W_dec)
        size = f"{-(-decoder_rows // ranks):,} decoder rows, when latents are dead"
        yield _temporary_item("a meta step", device, memory.meta, size, "lower meta.d_sae or meta_rows", phase="decoder")
    if device_type == "cuda" and trainer.world_size == 1 and str(trainer.precision) != "64-true":
        decoder_rows = model.meta_rows or len(model.primary.W_dec)
        steps = ((model.primary, memory.primary, rows), *(() if model.meta is None else ((model.meta, memory.meta, decoder_rows),)))
        kept = sum(peak.bytes for learner, peak, n in steps if learner.step_graph is not None and learner.step_graph.pays(n))
        if kept:
            yield MemoryItem("CUDA graphs", device, kept, "what recorded steps keep between steps", "cuda_graph: false")
    yield _temporary_item("a held-out batch", device, memory.evaluation, f"{rows:,} rows", "lower batch_size", phase="batch")
    if trainer.world_size > 1 and shards == 1:
        buckets = measure.trained_bytes(model) * dtype_factor
        yield MemoryItem("DDP's buckets", device, buckets, "as large as the gradients, on each rank", "fewer latents")
    if trainer.checkpoint_callbacks and not isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO) and shards == 1:
        # lightning.fabric.utilities.cloud_io._atomic_save
        peak = measure.allocated_together([sum(_sae_bytes(model, dtype_factor)) + state])
        yield replace(_temporary_item("a checkpoint", "cpu", peak, "written to memory before the disk", phase="file"), arms="each")


def _sae_bytes(model: JointSAE, dtype_factor: int) -> list[int]:
    """Bytes of each SAE of a module in the dtype of training."""
    return [measure.module_bytes(learner) * dtype_factor for learner in measure.learners(model).values()]


def _host_items(model: JointSAE, data: Any, trainer: Any, dtype_factor: int, shards: int) -> Iterator[MemoryItem]:
    """Host memory of whole SAEs while they are built and exported, and of the held-out rows that exports are checked on."""
    batch_size, device_type = _data_argument(data, "batch_size"), trainer.strategy.root_device.type
    if shards > 1 or (device_type != "cpu" and model.primary.W_dec.is_meta):
        peak = measure.allocated_together([sum(_sae_bytes(model, dtype_factor))])
        reason = "whole, before each rank keeps its part" if shards > 1 else "in the host's memory before they move"
        yield replace(_temporary_item("building them", "cpu", peak, reason, phase="loading"), arms="each")
    for callback in trainer.callbacks:
        if (tokens := getattr(callback, "calibration_tokens", None)) is not None:
            tokens = min(-(-tokens // batch_size) * batch_size, data.validation_tokens)
            width = model.primary.W_dec.shape[1]
            held_out = MemoryItem(
                "held-out rows", "cpu", tokens * width * 4, f"{tokens:,}, to check exports on", "lower calibration_tokens"
            )
            yield replace(held_out, arms="once" if device_type == "cpu" else "")
            decoder_rows, ranks = getattr(callback, "rows_per_batch", None), processes_on_machine(trainer)
            yield _export_item(model, batch_size, _sae_bytes(model, dtype_factor), decoder_rows, ranks)


def _export_item(model: JointSAE, batch_size: int, sae_bytes: list[int], decoder_rows: int | None, ranks: int) -> MemoryItem:
    """The memory of an export: a copy of the SAE, the SAE that is read back, and the search for its threshold.

    SAEs are exported one after the other, so the largest counts. One rank exports: the item is its memory divided by `ranks`, since each
    rank may use an equal share of the machine's memory.
    """
    d_sae = len(model.primary.W_dec)
    # `sae.thresholds.global_threshold` holds positive pre-activations of a batch or of some decoder rows; torch.topk takes 16 bytes each.
    latents = max(batch_size * d_sae, 0 if model.meta is None else min(decoder_rows or d_sae, d_sae) * len(model.meta.W_dec))
    peak = measure.allocated_together([*[max(sae_bytes)] * 2, latents * 4, latents * 16])
    reason = "a copy, the SAE that is read back and a threshold"
    if ranks > 1:
        reason += f"; on one of {ranks} ranks, so divided by {ranks} here"
    return _temporary_item("an export", "cpu", peak.scaled(1 / ranks), reason, phase="batch")


def _output_items(other_arms: list[JointSAE], data: Any, device: str, dtype_factor: int) -> Iterator[MemoryItem]:
    """Reconstructions in the step outputs of all arms but one. They stay until the last arm's step, after which callbacks run."""
    if other_arms:
        size = sum(_data_argument(data, "batch_size") * arm.primary.W_dec.shape[1] * 4 * dtype_factor for arm in other_arms)
        yield MemoryItem("step outputs", device, size, f"reconstructions by {len(other_arms)} other arms", "lower batch_size")
