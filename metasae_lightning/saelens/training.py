"""SAELens's training SAEs, built from a config."""

import copy
from typing import Any

import torch
from sae_lens import TrainingSAE, TrainingSAEConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.batchtopk_sae import BatchTopK

from metasae_lightning.errors import InputError

AnySAE = TrainingSAE[Any]


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


def set_k(sae: AnySAE, k: float) -> None:
    """Have a top-k SAE keep another number of latents, whole where it ranks each token apart."""
    rule: Any = sae.activation_fn
    if not hasattr(rule, "k"):
        raise InputError(f"measured_k: a {sae.cfg.architecture()!r} SAE has no k")
    sae.cfg.k = rule.k = k if isinstance(rule, BatchTopK) else max(1, round(k))
