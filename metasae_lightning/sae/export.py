"""Export of a training SAE as an inference SAE on raw activations, checked on held-out ones."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metasae_lightning.atomic_files import draft_of
from metasae_lightning.errors import InputError
from metasae_lightning.sae.conversion import to_jumprelu
from metasae_lightning.sae.normalizers import Normalizer
from metasae_lightning.sae.pretrained import AnySAE, add_metadata, load_pretrained, measure, pre_activations, set_thresholds
from metasae_lightning.sae.thresholds import global_threshold


@dataclass(frozen=True)
class ExportRecord:
    """An exported SAE, measured on raw held-out activations."""

    folder: str
    """The SAELens folder."""
    l0: float | None = None
    """Mean active latents per token; None if it was measured on no tokens."""
    fvu: float | None = None
    """Fraction of variance unexplained."""
    target_l0: float | None = None
    """The L0 in training, for architectures with a k; None for others."""
    calibrated: bool = False
    """Whether the running threshold missed `target_l0` by more than the tolerance, and was replaced."""
    tokens: int = 0
    """Number of tokens it was measured on."""


def export(
    sae: AnySAE,
    folder: str | Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    normalizer: Normalizer,
    updates: int,
    metadata: Mapping[str, Any] | None = None,
    samples: Sequence[Tensor] = (),
    tolerance: float = 0.01,
    device: torch.device | None = None,
    as_jumprelu: bool = False,
) -> ExportRecord:
    """Save a SAELens inference SAE for raw activations in a folder, and measure it on `samples` of them.

    It is measured on `device`, or on the CPU where that device has too little memory.

    `weights`: the full state dict, for an SAE that has only a shard of it.

    `updates`: how often the SAE's running threshold was updated. SAELens starts this running mean at 0, so after few updates the
    threshold is too low by the factor `1 - (1 - lr)^updates`, which is divided out. Where the exported L0 still misses the training L0
    by more than the fraction `tolerance`, the threshold is computed from the samples and the record says so. The measured `l0` goes into
    the metadata. The folder is written atomically: an older folder stays until the new one is complete.
    """
    folder = Path(folder)
    inference = _inference_copy(sae, weights or sae.state_dict(), normalizer, updates, metadata or {})
    try:
        with draft_of(folder) as draft:
            inference.save_inference_model(draft)
            if as_jumprelu:
                to_jumprelu(load_pretrained(draft)).save_model(draft)
            measured_on = partial(_measured, draft, samples, target_l0=_target_l0(sae), tolerance=tolerance)
            try:
                record = measured_on(device=torch.device("cpu") if device is None else device)
            except torch.OutOfMemoryError:
                record = measured_on(device=torch.device("cpu"))
            if record.l0 is not None:
                add_metadata(draft, {"l0": record.l0})
    except OSError as error:
        raise InputError(f"cannot write the SAE folder {folder}: {error.strerror or error}") from error
    return replace(record, folder=str(folder))


def _inference_copy(
    sae: AnySAE, weights: Mapping[str, Tensor], normalizer: Normalizer, updates: int, metadata: Mapping[str, Any]
) -> AnySAE:
    """A copy on the CPU with a corrected threshold and the normaliser folded in; the SAE in training is not changed."""
    cfg = copy.deepcopy(sae.cfg)
    cfg.device = "cpu"
    for name, value in metadata.items():
        cfg.metadata[name] = value
    with torch.random.fork_rng():
        inference: AnySAE = type(sae)(cfg)
    inference.load_state_dict({name: tensor.detach().cpu() for name, tensor in weights.items()})
    if (lr := getattr(cfg, "topk_threshold_lr", None)) is not None and updates and hasattr(inference, "topk_threshold"):
        inference.topk_threshold = inference.topk_threshold / (1 - (1 - lr) ** updates)
    copy.deepcopy(normalizer).cpu().fold(inference)
    if str(metadata.get("hook_name", "")).endswith("hook_z"):  # SAELens must flatten the heads, as training did
        inference.cfg.reshape_activations = "hook_z"
    return inference


def _target_l0(sae: AnySAE) -> float | None:
    """The L0 that an architecture with a k has in training; None for others."""
    k = getattr(sae.cfg, "k", None)
    return None if k is None else float(k)


class _OnDevice(Sequence[Tensor]):
    """Samples of which each is copied to a device when it is read."""

    def __init__(self, samples: Sequence[Tensor], device: torch.device) -> None:
        self._samples, self._device = samples, device

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: Any) -> Any:
        return self._samples[index].to(self._device)


@torch.no_grad()
def _measured(folder: Path, samples: Sequence[Tensor], *, target_l0: float | None, tolerance: float, device: torch.device) -> ExportRecord:
    """L0 and FVU of an exported SAE on the samples, None without samples; its threshold is replaced where L0 misses the target."""
    if not samples:
        return ExportRecord(str(folder), target_l0=target_l0)
    exported: Any = load_pretrained(folder, device=device)
    samples = _OnDevice(samples, device)
    scores, calibrated = pre_activations(exported), False
    if target_l0 is not None and scores is not None:
        value, l0 = global_threshold(scores, samples, target_l0, now=exported.threshold)
        if calibrated := abs(l0 / target_l0 - 1) > tolerance:
            set_thresholds(folder, torch.full_like(exported.threshold, value, device="cpu"), {})
            exported = load_pretrained(folder, device=device)
    l0, fvu = measure(exported, samples)
    return ExportRecord(str(folder), l0, fvu, target_l0, calibrated, sum(len(x) for x in samples))
