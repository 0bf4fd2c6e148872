"""Copies of a module with other sizes, trained in the same way, to measure memory on a small copy."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

from metasae_lightning.penalties import Penalties
from metasae_lightning.sae.learner import Learner
from metasae_lightning.sae.normalizers import make_normalizer
from metasae_lightning.training.joint import JointSAE

SIZES = ("d_in", "d_sae", "k", "matryoshka_widths", "chunk_size")
NORMALIZERS = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in", "covariance_whitening")


def part(model: JointSAE, shards: int) -> JointSAE:
    """One rank's part of a module whose primary is sharded, on the meta device."""
    primary = _config(model.primary, "meta", ("d_sae", "matryoshka_widths", "k"), shards)
    meta = None if model.meta is None else _config(model.meta, "meta", (), 1)
    return _like(model, primary, meta, None if model.meta_rows is None else _divided(model.meta_rows, shards), model.penalties)


def smaller(model: JointSAE, factor: float) -> JointSAE:
    """A copy with every size divided by a factor."""
    penalties = copy.deepcopy(model.penalties)
    for _, penalty in penalties.named():
        for name in SIZES:
            if hasattr(penalty, name):
                setattr(penalty, name, _divided(getattr(penalty, name), factor))
    primary = _config(model.primary, "cpu", SIZES, factor)
    meta = None if model.meta is None else _config(model.meta, "cpu", SIZES, factor)
    return _like(model, primary, meta, None if model.meta_rows is None else _divided(model.meta_rows, factor), penalties)


def _like(model: JointSAE, primary_cfg: Any, meta_cfg: Any, meta_rows: int | None, penalties: Penalties) -> JointSAE:
    """A copy with the given sizes and the same training settings."""
    primary, callables = model.primary, model._optimizer_callables  # pyright: ignore[reportPrivateUsage]
    return JointSAE(
        primary_cfg,
        meta_cfg,
        dict(penalties.named()),
        n_p=10**9,
        decoder_rows=primary.config.decoder_rows,
        b_dec_init="zeros",
        primary_optimizer=callables["primary"],
        meta_optimizer=callables["meta"],
        clip_grad_norm=primary.config.clip_grad_norm,
        micro_batches=primary.config.micro_batches,
        critic_supports=model.critic_supports,
        meta_rows=meta_rows,
        kernels=model.kernels,
    )


def _config(learner: Learner, device: str, sizes: Sequence[str], factor: float) -> Any:
    """A learner's original config with some sizes changed."""
    # A copy, since configs share their metadata object.
    cfg = copy.deepcopy(learner.sae.cfg)
    cfg.device = device
    cfg = dataclasses.replace(cfg, **{name: _divided(getattr(cfg, name), factor) for name in sizes if hasattr(cfg, name)})
    cfg.normalize_activations = next(name for name in NORMALIZERS if type(make_normalizer(name, 1)) is type(learner.normalizer))
    return cfg


def _divided(value: Any, factor: float) -> Any:
    if isinstance(value, list | tuple):
        return [_divided(one, factor) for one in value]
    return max(type(value)(1), type(value)(round(value / factor)))
