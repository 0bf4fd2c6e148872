"""Copies of a JointSAE with other sizes, trained in the same way, to measure memory on a small copy."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

from metasae_lightning.penalties import Penalties
from metasae_lightning.sae.learner import Learner
from metasae_lightning.sae.normalizers import name_of
from metasae_lightning.training.joint import JointSAE

SIZES = ("d_in", "d_sae", "k", "matryoshka_widths", "chunk_size")
"""Attributes of SAE configs and penalties that are sizes."""
SIZES_PER_SHARD = ("d_sae", "matryoshka_widths", "k")
"""Sizes that sharding the latents divides."""


def rank_part(model: JointSAE, shards: int) -> JointSAE:
    """One rank's part of a JointSAE whose primary is sharded, on the meta device."""
    primary = _resized_config(model.primary, "meta", SIZES_PER_SHARD, shards)
    meta = None if model.meta is None else _resized_config(model.meta, "meta", (), 1)
    return _copy_with_configs(model, primary, meta, _divided_meta_rows(model, shards), model.penalties)


def scaled_down(model: JointSAE, factor: float) -> JointSAE:
    """A copy on the CPU with every size divided by a factor."""
    penalties = copy.deepcopy(model.penalties)
    for _, penalty in penalties.named():
        for name in SIZES:
            if hasattr(penalty, name):
                setattr(penalty, name, _divided(getattr(penalty, name), factor))
    primary = _resized_config(model.primary, "cpu", SIZES, factor)
    meta = None if model.meta is None else _resized_config(model.meta, "cpu", SIZES, factor)
    return _copy_with_configs(model, primary, meta, _divided_meta_rows(model, factor), penalties)


def _copy_with_configs(model: JointSAE, primary_cfg: Any, meta_cfg: Any, meta_rows: int | None, penalties: Penalties) -> JointSAE:
    """A JointSAE with other SAE configs, which never begins a meta phase and whose `b_dec` starts at zero.

    It has the model's optimisers, gradient clipping, micro-batches, critic supports, kernels and choice of unit or free decoder rows.
    """
    primary, optimizer_callables = model.primary, model._optimizer_callables  # pyright: ignore[reportPrivateUsage]
    return JointSAE(
        primary_cfg,
        meta_cfg,
        dict(penalties.named()),
        n_p=10**9,  # no meta phase within a primary step: meta steps are measured by themselves
        decoder_rows=primary.config.decoder_rows,
        b_dec_init="zeros",
        primary_optimizer=optimizer_callables["primary"],
        meta_optimizer=optimizer_callables["meta"],
        clip_grad_norm=primary.config.clip_grad_norm,
        micro_batches=primary.config.micro_batches,
        critic_supports=model.critic_supports,
        meta_rows=meta_rows,
        kernels=model.kernels,
        head=primary.head,  # pyright: ignore[reportArgumentType]
        head_training="joint" if primary.head is None else "detached" if primary.is_frozen else primary.config.head_training,
    )


def _resized_config(learner: Learner, device: str, sizes: Sequence[str], factor: float) -> Any:
    """A learner's original SAE config on another device, with some sizes divided by a factor."""
    # A copy, since configs share their metadata object.
    cfg = copy.deepcopy(learner.sae.cfg)
    cfg.device = device
    resized = {name: _divided(getattr(cfg, name), factor) for name in sizes if hasattr(cfg, name)}
    if (group_size := getattr(cfg, "group_size", 1)) > 1 and "d_sae" in resized:  # whole groups, of which at most all are active
        n_groups = max(1, round(resized["d_sae"] / group_size))
        resized |= {"d_sae": n_groups * group_size, "k": min(resized["k"], type(resized["k"])(n_groups))}
    cfg = dataclasses.replace(cfg, **resized)
    # The SAE's own config has no normaliser: the learner has it.
    cfg.normalize_activations = name_of(learner.normalizer)
    return cfg


def _divided_meta_rows(model: JointSAE, factor: float) -> int | None:
    """The rows of a meta step divided by a factor; None if it reads all rows."""
    return None if model.meta_rows is None else _divided(model.meta_rows, factor)


def _divided(size: Any, factor: float) -> Any:
    """A size, or a list of sizes, divided by a factor; a size stays at least 1."""
    if isinstance(size, list | tuple):
        return [_divided(element, factor) for element in size]
    return max(type(size)(1), type(size)(round(size / factor)))
