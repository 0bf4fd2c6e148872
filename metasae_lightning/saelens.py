"""The one door to SAELens: build a training SAE, run it, and save it as an inference SAE that works on raw activations."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, BatchTopKTrainingSAEConfig, TrainingSAE, TrainingSAEConfig
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import SAEMetadata, TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from metasae_lightning import functional, sparse
from metasae_lightning.calibration import global_threshold
from metasae_lightning.errors import InputError
from metasae_lightning.normalizers import Normalizer
from metasae_lightning.schedules import warm_up

__all__ = [
    "BatchTopKTrainingSAEConfig",
    "ExportRecord",
    "SAEMetadata",
    "TrainingSAE",
    "TrainingSAEConfig",
    "build",
    "export",
    "forward",
    "load_pretrained",
    "set_thresholds",
]

AnySAE = TrainingSAE[Any]
PreActivations = Callable[[Tensor], Float[Tensor, "batch d_sae"]]


def build(cfg: TrainingSAEConfig, *, role: str, seed: int) -> AnySAE:
    """The training SAE of a config, in normalised space, initialised from `seed` alone."""
    _check(cfg, role)
    cfg = copy.deepcopy(cfg)
    cfg.normalize_activations = "none"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae = get_sae_training_class(cfg.architecture())[0](cfg)
    if not isinstance(getattr(sae, "W_dec", None), torch.nn.Parameter):
        raise InputError(f"{role}: architecture {cfg.architecture()!r} has no decoder matrix W_dec, which joint training is about")
    rule: Any = sae.activation_fn
    if type(rule) is BatchTopK:  # the same function, sooner
        sae.activation_fn = sparse.BatchTopK(rule.k)
    return sae


def _check(cfg: TrainingSAEConfig, role: str) -> None:
    k = getattr(cfg, "k", None)
    if k is not None and not 0 < k <= cfg.d_sae:
        raise InputError(f"{role}.k must lie between 1 and d_sae={cfg.d_sae}, got {k}")
    if min(cfg.d_in, cfg.d_sae) < 1:
        raise InputError(f"{role}: d_in and d_sae must be positive, got {cfg.d_in} and {cfg.d_sae}")
    if cfg.reshape_activations != "none":
        raise InputError(f"{role}.reshape_activations must be none, got {cfg.reshape_activations!r}: flatten heads before the SAE")
    if cfg.dtype != "float32" and cfg.dtype != "float64":
        raise InputError(
            f"{role}.dtype must be float32 (parameters stay in full precision; use trainer.precision: bf16-mixed), got {cfg.dtype!r}"
        )


def forward(sae: AnySAE, z: Tensor, *, dead: Tensor, step: int) -> TrainStepOutput:
    """One training forward pass of SAELens's own, with its coefficients warmed up as SAELens's trainer does."""
    coefficients: dict[str, float] = {}
    for name, given in sae.get_coefficients().items():
        value, steps = given if isinstance(given, TrainCoefficientConfig) else (given, 0)
        coefficients[name] = value * warm_up(step, steps)
    return sae.training_forward_pass(
        TrainStepInput(sae_in=z, coefficients=coefficients, dead_neuron_mask=dead, n_training_steps=step, is_logging_step=False)
    )


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
    normalizer: Normalizer,
    updates: int,
    metadata: Mapping[str, Any] | None = None,
    samples: Sequence[Tensor] = (),
    tolerance: float = 0.01,
) -> ExportRecord:
    """Save a SAELens inference folder that works on raw activations, checked on `samples` of them.

    `updates` is how often the SAE's running threshold was updated: SAELens starts that mean at 0, so after few updates it is too low
    by the factor `1 - (1 - lr)^updates`. Where the exported L0 still misses the training L0 by more than `tolerance`, the threshold is
    set from the samples and the record says so. The folder appears whole or not at all, and an older one stays until then.
    """
    folder = Path(folder)
    twin = _raw_twin(sae, normalizer, updates, metadata or {})
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        twin.save_inference_model(draft)
        record = _checked(draft, samples, target_l0=_target_l0(sae), tolerance=tolerance)
        _replace(draft, folder)
    except OSError as error:
        raise InputError(f"cannot write the SAE folder {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return replace(record, folder=str(folder))


def _raw_twin(sae: AnySAE, normalizer: Normalizer, updates: int, metadata: Mapping[str, Any]) -> AnySAE:
    """A copy whose threshold is right and whose normaliser is folded in; the SAE in training is untouched."""
    cfg = copy.deepcopy(sae.cfg)
    cfg.device = "cpu"
    for name, value in metadata.items():
        cfg.metadata[name] = value
    with torch.random.fork_rng():
        twin: AnySAE = type(sae)(cfg)
    twin.load_state_dict({name: tensor.detach().cpu() for name, tensor in sae.state_dict().items()})
    if (lr := getattr(cfg, "topk_threshold_lr", None)) is not None and updates:
        twin.topk_threshold = twin.topk_threshold / (1 - (1 - lr) ** updates)
    copy.deepcopy(normalizer).cpu().fold(twin)
    return twin


def _target_l0(sae: AnySAE) -> float | None:
    k = getattr(sae.cfg, "k", None)
    return None if k is None else float(k)


def pre_activations(sae: Any) -> PreActivations | None:
    """What an inference SAE compares with its thresholds, a function of raw activations; none where it has no thresholds."""
    if not isinstance(getattr(sae, "threshold", None), Tensor):
        return None
    return lambda x: sae.process_sae_in(x) @ sae.W_enc + sae.b_enc


def load_pretrained(place: str | Path, *, device: str | torch.device = "cpu") -> SAE[Any]:
    """A SAELens SAE for inference: from a folder, or by `RELEASE:ID` or `OWNER/REPOSITORY:ID` from the Hub."""
    name = str(place)
    try:
        if Path(name).is_dir():
            sae: Any = SAE.load_from_disk(name, device=str(device))
        else:
            release, _, sae_id = name.partition(":")
            if not sae_id:
                raise InputError(f"{name!r} is no folder, and no SAE on the Hub: that would be RELEASE:ID")
            sae = SAE.from_pretrained(release, sae_id, device=str(device))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AssertionError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{name!r} cannot be loaded as a SAELens SAE: {' '.join(str(error).split())[:300] or type(error).__name__}"
        ) from error
    if hasattr(sae.cfg, "d_out"):
        raise InputError(f"{name!r} is a transcoder, which does not rebuild what it reads")
    if sae.cfg.normalize_activations in ("expected_average_only_in", "constant_scalar_rescale"):
        scale = f"normalize_activations: {sae.cfg.normalize_activations}"
        raise InputError(f"{name!r} takes activations that were scaled by a factor it does not hold ({scale}): fold it in first")
    if getattr(sae, "hook_z_reshaping_mode", False):  # heads come flattened here
        sae.turn_off_forward_pass_hook_z_reshaping()
    return sae.eval().requires_grad_(False)


def set_thresholds(folder: str | Path, threshold: Float[Tensor, " d_sae"], metadata: Mapping[str, Any]) -> None:
    """Write thresholds into a SAELens folder, and what is to be said of them into its record; the folder changes whole or not at all."""
    folder = Path(folder)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        shutil.copytree(folder, draft)
        weights = load_file(draft / SAE_WEIGHTS_FILENAME)
        weights["threshold"] = threshold.to(weights["threshold"])
        save_file(weights, draft / SAE_WEIGHTS_FILENAME)
        record = json.loads((draft / SAE_CFG_FILENAME).read_text())
        record["metadata"] = {**record.get("metadata", {}), **metadata}
        (draft / SAE_CFG_FILENAME).write_text(json.dumps(record))
        _replace(draft, folder)
    except OSError as error:
        raise InputError(f"cannot write the SAE folder {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@torch.no_grad()
def _checked(folder: Path, samples: Sequence[Tensor], *, target_l0: float | None, tolerance: float) -> ExportRecord:
    if not samples:
        return ExportRecord(str(folder), target_l0=target_l0)
    inference: Any = SAE.load_from_disk(folder)
    scores, calibrated = pre_activations(inference), False
    if target_l0 is not None and scores is not None:
        value, l0 = global_threshold(scores, samples, target_l0, now=inference.threshold)
        if calibrated := abs(l0 / target_l0 - 1) > tolerance:
            set_thresholds(folder, torch.full_like(inference.threshold, value), {})
            inference = SAE.load_from_disk(folder)
    l0, fvu = _measure(inference, samples)
    return ExportRecord(str(folder), l0, fvu, target_l0, calibrated, sum(len(x) for x in samples))


def _measure(sae: SAE[Any], samples: Sequence[Tensor]) -> tuple[float, float]:
    """L0 and FVU over all samples, from global sums."""
    active, sums = 0, None
    for x in samples:
        codes = sae.encode(x)
        active += int(codes.count_nonzero())
        added = functional.reconstruction_sums(x, sae.decode(codes))
        sums = added if sums is None else tuple(a + b for a, b in zip(sums, added, strict=True))
    assert sums is not None
    return active / sum(len(x) for x in samples), functional.fvu_of_sums(sums).item()  # pyright: ignore[reportArgumentType]


def _replace(draft: Path, folder: Path) -> None:
    """Put the finished draft where an older folder may stand."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
