"""Models of other sizes that are trained as a given one: what a run takes can be tried on a small one."""

import copy
import dataclasses
from typing import Any

from metasae_lightning.joint import JointSAE
from metasae_lightning.learner import Learner
from metasae_lightning.normalizers import normalizer_of

SIZES = ("d_in", "d_sae", "k", "matryoshka_widths", "chunk_size")
NORMALIZERS = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in", "covariance_whitening")


def part(model: JointSAE, shards: int) -> JointSAE:
    """What one rank has of a model whose primary's latents are divided, and reads of its decoder; without memory."""
    primary, meta = (learner and copy.deepcopy(learner.sae.cfg) for learner in (model.primary, model.meta))
    for name in ("d_sae", "matryoshka_widths", "k"):
        if hasattr(primary, name):
            setattr(primary, name, _divided(getattr(primary, name), shards))
    meta_rows = model.meta_rows and _divided(model.meta_rows, shards)
    return _like(
        model, *(cfg and _placed(cfg, "meta", learner) for cfg, learner in ((primary, model.primary), (meta, model.meta))), meta_rows
    )


def smaller(model: JointSAE, factor: float) -> JointSAE:
    """The same model with every size divided."""
    penalties: Any = copy.deepcopy(model.penalties)
    for penalty in penalties.values():
        for name in SIZES:
            if hasattr(penalty, name):
                setattr(penalty, name, _divided(getattr(penalty, name), factor))
    meta_rows = None if model.meta_rows is None else _divided(model.meta_rows, factor)
    return _like(model, *(learner and _smaller_config(learner, factor) for learner in (model.primary, model.meta)), meta_rows, penalties)


def _like(model: JointSAE, primary_cfg: Any, meta_cfg: Any, meta_rows: int | None, penalties: Any = None) -> JointSAE:
    """A model of other sizes that is trained as this one."""
    primary, callables = model.primary, model._optimizer_callables  # pyright: ignore[reportPrivateUsage]
    return JointSAE(
        primary_cfg,
        meta_cfg,
        dict((penalties or model.penalties).items()),
        n_p=10**9,
        decoder_rows="unit" if primary.decoder_rows == "unit" else "free",
        b_dec_init="zeros",
        primary_optimizer=callables["primary"],
        meta_optimizer=callables["meta"],
        clip_grad_norm=primary.clip_grad_norm,
        micro_batches=primary.micro_batches,
        critic_supports=model.critic_supports,
        meta_rows=meta_rows,
        kernels=model.kernels,
    )


def _smaller_config(learner: Learner, factor: float) -> Any:
    # A copy, since a config's record of itself is shared with what it was made from.
    cfg = copy.deepcopy(learner.sae.cfg)
    cfg = dataclasses.replace(cfg, **{name: _divided(getattr(cfg, name), factor) for name in SIZES if hasattr(cfg, name)})
    return _placed(cfg, "cpu", learner)


def _placed(cfg: Any, device: str, learner: Learner) -> Any:
    """A config as the learner's was given."""
    cfg.device = device
    cfg.normalize_activations = next(name for name in NORMALIZERS if type(normalizer_of(name, 1)) is type(learner.normalizer))
    return cfg


def _divided(value: Any, factor: float) -> Any:
    if isinstance(value, list | tuple):
        return [_divided(one, factor) for one in value]
    return max(type(value)(1), type(value)(round(value / factor)))
