"""Recalibrate thresholds so that SAEs are compared at the same L0."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.held_out_text import json_values, passages, split_stream, stream_cache_key
from metasae_lightning.evaluation.saes import EvaluatedSAE
from metasae_lightning.sae import pretrained
from metasae_lightning.sae.thresholds import Rule, calibrate
from metasae_lightning.step import Batch

log = logging.getLogger(__name__)


def at_matched_l0(subjects: Sequence[EvaluatedSAE], data: Any, rule: Rule, l0: float | None, tokens: int) -> list[EvaluatedSAE]:
    """Recalibrate the thresholds of SAEs, in place, to a common L0 on validation tokens.

    The common L0 is that of `target_l0`. An SAE without thresholds keeps its own L0, with a warning. Each recalibrated SAE is returned
    with a record of the recalibration in its `rule`.
    """
    adjustable = [subject for subject in subjects if pretrained.pre_activations(subject.sae) is not None]
    for subject in subjects:
        if subject not in adjustable:
            log.warning("%s has no thresholds (%s): it stays at its own L0", subject.name, subject.sae.cfg.architecture())
    goal = target_l0(adjustable, l0, [subject for subject in subjects if subject not in adjustable])
    samples: list[Tensor] = []
    return [_with_thresholds(subject, goal, rule, data, tokens, samples) if subject in adjustable else subject for subject in subjects]


def target_l0(adjustable: Sequence[EvaluatedSAE], l0: float | None, fixed: Sequence[EvaluatedSAE] = ()) -> float:
    """The L0 for `adjustable` SAEs: `l0` if given, else the smallest training L0 of `fixed` SAEs, else that of `adjustable` SAEs.

    Adjustable SAEs have thresholds, fixed SAEs have none. An L0 that is unknown, or larger than the width of an adjustable SAE, is an
    `InputError`.
    """
    candidates = [l0] if l0 else training_l0(fixed) or training_l0(adjustable)
    if adjustable and not candidates:
        raise InputError(f"l0: {adjustable[0].source} does not tell what L0 it was trained at: name one, --l0")
    goal = min(candidates, default=0.0)
    for subject in adjustable:
        if goal > len(subject.W_dec):
            raise InputError(f"l0: {subject.source} has {len(subject.W_dec)} latents, of which {goal:g} cannot be active")
    return goal


def training_l0(subjects: Sequence[EvaluatedSAE]) -> list[float]:
    """The training L0 of each SAE whose architecture fixes one (`k`)."""
    return [l0 for subject in subjects if (l0 := subject.target_l0)]


def validation_activations(subject: EvaluatedSAE, data: Any, tokens: int) -> list[Tensor]:
    """Batches of validation activations, on the SAE's device."""
    return [Batch.of(batch).activations.to(subject.sae.device) for batch in split_stream(data, "validation", tokens)]


def _with_thresholds(subject: EvaluatedSAE, l0: float, rule: Rule, data: Any, tokens: int, samples: list[Tensor]) -> EvaluatedSAE:
    """The SAE with thresholds for an L0, which are changed in place.

    `samples` is a list that all SAEs share. The first SAE whose thresholds are not cached fills it with validation activations.
    """
    stream = split_stream(data, "validation", tokens)
    scores = pretrained.pre_activations(subject.sae)
    assert scores is not None

    def compute() -> dict[str, Tensor]:
        if not samples:
            log.info("thresholds by the rule %r on %s validation tokens", rule, f"{tokens:,}")
            samples.extend(validation_activations(subject, data, tokens))
        calibration = calibrate(scores, samples, l0, rule)
        figures = {"l0": calibration.l0, "few": calibration.n_rare, "on": calibration.tokens}
        return {"threshold": calibration.threshold, **{name: torch.tensor(value) for name, value in figures.items()}}

    text_hashes = [passage.text_hash for passage in passages(stream, tokens)]
    text = {"data": json_values(stream_cache_key(stream)), "text": text_hashes}
    key = {**subject.cache_key, **text, "rule": rule, "l0": l0, "tokens": tokens}
    entry = subject.result_cache.get_or_compute("thresholds", key, compute)
    subject.sae.threshold.copy_(entry["threshold"].to(subject.sae.threshold))
    figures = {"l0_on_validation": entry["l0"].item(), "few_firings": int(entry["few"]), "tokens": int(entry["on"])}
    return replace(subject, rule={"rule": rule, "l0": l0, **figures})
