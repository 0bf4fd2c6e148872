"""A training SAE saved as an inference SAE that works on raw activations, and checked on them."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metasae_lightning.atomic_files import draft_of
from metasae_lightning.errors import InputError
from metasae_lightning.sae.normalizers import Normalizer
from metasae_lightning.sae.pretrained import AnySAE, load_pretrained, measure, pre_activations, set_thresholds
from metasae_lightning.sae.thresholds import global_threshold


@dataclass(frozen=True)
class ExportRecord:
    """What an exported SAE does on raw held-out activations."""

    folder: str
    """Where it is."""
    l0: float | None = None
    """Mean active latents a token; none where there was nothing to measure on."""
    fvu: float | None = None
    """Fraction of variance unexplained."""
    target_l0: float | None = None
    """What L0 was in training, for architectures that fix it."""
    calibrated: bool = False
    """Whether the running threshold missed the target by more than the tolerance and was replaced."""
    tokens: int = 0
    """How many tokens it was measured on."""


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
) -> ExportRecord:
    """Save a SAELens inference folder that works on raw activations, checked on `samples` of them.

    `weights` are the SAE's state, where it has no more than a part of it.

    `updates` is how often the SAE's running threshold was updated: SAELens starts that mean at 0, so after few updates it is too low
    by the factor `1 - (1 - lr)^updates`. Where the exported L0 still misses the training L0 by more than `tolerance`, the threshold is
    set from the samples and the record says so. The folder appears whole or not at all, and an older one stays until then.
    """
    folder = Path(folder)
    twin = _raw_twin(sae, weights or sae.state_dict(), normalizer, updates, metadata or {})
    try:
        with draft_of(folder) as draft:
            twin.save_inference_model(draft)
            record = _checked(draft, samples, target_l0=_target_l0(sae), tolerance=tolerance)
    except OSError as error:
        raise InputError(f"cannot write the SAE folder {folder}: {error.strerror or error}") from error
    return replace(record, folder=str(folder))


def _raw_twin(sae: AnySAE, weights: Mapping[str, Tensor], normalizer: Normalizer, updates: int, metadata: Mapping[str, Any]) -> AnySAE:
    """A copy whose threshold is right and whose normaliser is folded in; the SAE in training is untouched."""
    cfg = copy.deepcopy(sae.cfg)
    cfg.device = "cpu"
    for name, value in metadata.items():
        cfg.metadata[name] = value
    with torch.random.fork_rng():
        twin: AnySAE = type(sae)(cfg)
    twin.load_state_dict({name: tensor.detach().cpu() for name, tensor in weights.items()})
    if (lr := getattr(cfg, "topk_threshold_lr", None)) is not None and updates:
        twin.topk_threshold = twin.topk_threshold / (1 - (1 - lr) ** updates)
    copy.deepcopy(normalizer).cpu().fold(twin)
    if str(metadata.get("hook_name", "")).endswith("hook_z"):  # heads are flattened before training; who hooks the SAE in does not do that
        twin.cfg.reshape_activations = "hook_z"
    return twin


def _target_l0(sae: AnySAE) -> float | None:
    k = getattr(sae.cfg, "k", None)
    return None if k is None else float(k)


@torch.no_grad()
def _checked(folder: Path, samples: Sequence[Tensor], *, target_l0: float | None, tolerance: float) -> ExportRecord:
    if not samples:
        return ExportRecord(str(folder), target_l0=target_l0)
    inference: Any = load_pretrained(folder)
    scores, calibrated = pre_activations(inference), False
    if target_l0 is not None and scores is not None:
        value, l0 = global_threshold(scores, samples, target_l0, now=inference.threshold)
        if calibrated := abs(l0 / target_l0 - 1) > tolerance:
            set_thresholds(folder, torch.full_like(inference.threshold, value), {})
            inference = load_pretrained(folder)
    l0, fvu = measure(inference, samples)
    return ExportRecord(str(folder), l0, fvu, target_l0, calibrated, sum(len(x) for x in samples))
