"""SAELens SAEs: build a training SAE from a config; load, measure and change the thresholds of an inference SAE."""

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, TrainingSAE, TrainingSAEConfig
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.batchtopk_sae import BatchTopK
from safetensors.torch import load_file, save
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.architectures import Units
from metasae_lightning.atomic_files import draft_of
from metasae_lightning.compute.sharding import copy_into
from metasae_lightning.errors import InputError
from metasae_lightning.redaction import redact

AnySAE = TrainingSAE[Any]


def build(cfg: TrainingSAEConfig, *, role: str, seed: int) -> AnySAE:
    """A training SAE by its config, initialised from `seed` alone. Its own normaliser is off: a learner's `Normalizer` replaces it."""
    _check(cfg, role)
    cfg = copy.deepcopy(cfg)
    cfg.normalize_activations = "none"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae = get_sae_training_class(cfg.architecture())[0](cfg)
    if not isinstance(getattr(sae, "W_dec", None), Tensor):
        raise InputError(f"{role}: architecture {cfg.architecture()!r} has no decoder matrix W_dec, which joint training is about")
    return sae


def check_decoder_rows(sae: AnySAE, decoder_rows: str) -> None:
    """Refuse unit rows for an SAE whose decoder is computed from other weights."""
    if decoder_rows == "unit" and "W_dec" not in dict(sae.named_parameters()):
        raise InputError(f"decoder_rows: a {sae.cfg.architecture()!r} SAE computes its decoder from other weights: set decoder_rows: free")


def decoder_gradient(sae: AnySAE) -> Tensor | None:
    """The gradient of `W_dec`; None before the first, or where `W_dec` is computed from other weights, which is not done here."""
    parameter = dict(sae.named_parameters()).get("W_dec")
    return None if parameter is None else parameter.grad


def initialize_b_dec(sae: AnySAE, z: Float[Tensor, "row d_in"], how: str) -> None:
    """Set `b_dec` to the `mean` or the `geometric_median` of rows; an SAE without this parameter is not changed."""
    if "b_dec" in dict(sae.named_parameters()):
        copy_into(sae.b_dec, functional.geometric_median(z) if how == "geometric_median" else z.mean(0))


def _check(cfg: TrainingSAEConfig, role: str) -> None:
    """Refuse a config that cannot be trained here."""
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


def set_k(sae: AnySAE, k: float) -> None:
    """Change the k of a top-k SAE; a batch top-k SAE accepts a fraction, one that ranks each token gets the nearest integer."""
    activation: Any = sae.activation_fn
    if not hasattr(activation, "k"):
        raise InputError(f"measured_k: a {sae.cfg.architecture()!r} SAE has no k")
    sae.cfg.k = activation.k = k if isinstance(activation, BatchTopK) else max(1, round(k))


PreActivations = Callable[[Tensor], Float[Tensor, "batch d_sae"]]


def apply_measured_k(learner: Any, _: object = None) -> None:
    """Set the k of a learner's SAE to its `measured_k`, after a conversion or after a checkpoint was loaded."""
    if learner.measured_k > 0:
        set_k(learner.sae, learner.measured_k.item())


def pre_activations(sae: Any) -> PreActivations | None:
    """A function from raw activations to the values that an inference SAE compares with its thresholds; None without thresholds."""
    if not isinstance(getattr(sae, "threshold", None), Tensor):
        return None
    if hasattr(sae, "threshold_scores"):
        return sae.threshold_scores
    return lambda x: sae.process_sae_in(x) @ sae.W_enc + sae.b_enc


def load_pretrained(place: str | Path, *, device: str | torch.device = "cpu") -> SAE[Any]:
    """Load a SAELens SAE for inference, from a folder, or from the Hub by `RELEASE:ID` or `OWNER/REPOSITORY:ID`.

    Refused are transcoders, SAEs whose scaling of activations is not in their files, and weights with a NaN or infinity.
    """
    name = str(place)
    try:
        with warnings.catch_warnings():
            # The warning is about loading the language model, which `evaluation.saes` does with these arguments.
            warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pretrained_kwargs")
            sae: Any = _load(name, str(device))
    except InputError:
        raise
    # SAELens has a loader for each lab's format, and each may raise any exception of its libraries.
    except Exception as error:
        reason = " ".join(redact(str(error)).split())[:300] or type(error).__name__
        raise InputError(f"{name!r} cannot be loaded as a SAELens SAE: {reason}") from error
    if hasattr(sae.cfg, "d_out"):
        raise InputError(f"{name!r} is a transcoder, which does not reconstruct its input")
    if sae.cfg.normalize_activations in ("expected_average_only_in", "constant_scalar_rescale", "covariance_whitening"):
        setting = f"normalize_activations: {sae.cfg.normalize_activations}"
        raise InputError(f"{name!r} takes activations scaled by a factor that its files do not have ({setting}): fold the factor in first")
    if bad_tensors := [key for key, tensor in sae.state_dict().items() if not tensor.isfinite().all()]:
        raise InputError(f"{name!r} has NaN or infinite numbers in {', '.join(bad_tensors)}")
    if getattr(sae, "hook_z_reshaping_mode", False):  # activations of heads are flattened before the SAE here
        sae.turn_off_forward_pass_hook_z_reshaping()
    return sae.eval().requires_grad_(False)


def load_directions(folder: Path) -> Float[Tensor, "unit d_in"]:
    """The decoder's direction of each unit of the SAE in a folder."""
    sae = load_pretrained(folder)
    return Units.of(sae.cfg).directions(sae.W_dec.detach().float())


def _load(name: str, device: str) -> SAE[Any]:
    """The SAE as SAELens loads it."""
    if Path(name).is_dir():
        return SAE.load_from_disk(name, device=device)
    release, _, sae_id = name.partition(":")
    if not sae_id:
        raise InputError(f"{name!r} is neither a folder nor an SAE on the Hub, which would be RELEASE:ID")
    return SAE.from_pretrained(release, sae_id, device=device)


def set_thresholds(folder: str | Path, threshold: Float[Tensor, " d_sae"], metadata: Mapping[str, Any]) -> None:
    """Replace the thresholds in a SAELens folder and add `metadata` to its config, atomically."""
    folder = Path(folder)
    try:
        with draft_of(folder) as draft:
            shutil.copytree(folder, draft)
            weights = load_file(draft / SAE_WEIGHTS_FILENAME)
            weights["threshold"] = threshold.to(weights["threshold"])
            (draft / SAE_WEIGHTS_FILENAME).write_bytes(save(weights))
            add_metadata(draft, metadata)
    except OSError as error:
        raise InputError(f"cannot write the SAE folder {folder}: {error.strerror or error}") from error


def add_metadata(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Add entries to the metadata in a SAELens folder's config."""
    record = json.loads((folder / SAE_CFG_FILENAME).read_text())
    record["metadata"] = {**record.get("metadata", {}), **metadata}
    (folder / SAE_CFG_FILENAME).write_text(json.dumps(record))


@torch.no_grad()
def measure(sae: SAE[Any], samples: Sequence[Tensor]) -> tuple[float, float]:
    """L0 and FVU over all tokens of some batches of raw activations; at least one batch is needed."""
    units, active, sums = Units.of(sae.cfg), 0, None
    for x in samples:
        codes = sae.encode(x)
        active += int(units.activations(codes).count_nonzero())
        batch_sums = functional.reconstruction_sums(x, sae.decode(codes))
        sums = batch_sums if sums is None else tuple(a + b for a, b in zip(sums, batch_sums, strict=True))
    assert sums is not None
    return active / sum(len(x) for x in samples), functional.fvu_of_sums(sums).item()  # pyright: ignore[reportArgumentType]
