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
    """Recalibrate thresholds to a common L0 on validation tokens.

    The common L0 is `l0` if given, else the L0 of an SAE without thresholds, else the smallest training L0. An SAE without thresholds keeps
    its own L0, with a warning.
    """
    able = [subject for subject in subjects if pretrained.pre_activations(subject.sae) is not None]
    for subject in subjects:
        if subject not in able:
            log.warning("%s has no thresholds (%s): it stays at its own L0", subject.name, subject.sae.cfg.architecture())
    goal = target_l0(able, l0, [subject for subject in subjects if subject not in able])
    samples: list[Tensor] = []
    return [_with_thresholds(subject, goal, rule, data, tokens, samples) if subject in able else subject for subject in subjects]


def target_l0(able: Sequence[EvaluatedSAE], l0: float | None, fixed: Sequence[EvaluatedSAE] = ()) -> float:
    """The L0 for SAEs with thresholds: `l0` if given, else the training L0 of a `fixed` SAE, else the smallest training L0."""
    goals = [l0] if l0 else training_l0(fixed) or training_l0(able)
    if able and not goals:
        raise InputError(f"l0: {able[0].place} does not tell what L0 it was trained at: name one, --l0")
    goal = min(goals, default=0.0)
    for subject in able:
        if goal > len(subject.W_dec):
            raise InputError(f"l0: {subject.place} has {len(subject.W_dec)} latents, of which {goal:g} cannot be active")
    return goal


def training_l0(subjects: Sequence[EvaluatedSAE]) -> list[float]:
    """The training L0 of each SAE whose metadata has one."""
    return [l0 for subject in subjects if (l0 := subject.target_l0)]


def validation_activations(subject: EvaluatedSAE, data: Any, tokens: int) -> list[Tensor]:
    """Batches of validation activations, on the SAE's device."""
    return [Batch.of(batch).activations.to(subject.sae.device) for batch in split_stream(data, "validation", tokens)]


def _with_thresholds(subject: EvaluatedSAE, l0: float, rule: Rule, data: Any, tokens: int, samples: list[Tensor]) -> EvaluatedSAE:
    stream = split_stream(data, "validation", tokens)
    scores = pretrained.pre_activations(subject.sae)
    assert scores is not None

    def find() -> dict[str, Tensor]:
        if not samples:
            log.info("thresholds by the rule %r on %s validation tokens", rule, f"{tokens:,}")
            samples.extend(validation_activations(subject, data, tokens))
        found = calibrate(scores, samples, l0, rule)
        told = {"l0": found.l0, "few": found.n_rare, "on": found.tokens}
        return {"threshold": found.threshold, **{name: torch.tensor(value) for name, value in told.items()}}

    text = [passage.digest for passage in passages(stream, tokens)]
    of = {**subject.cache_key, "data": json_values(stream_cache_key(stream)), "text": text, "rule": rule, "l0": l0, "tokens": tokens}
    found = subject.result_cache.get_or_compute("thresholds", of, find)
    subject.sae.threshold.copy_(found["threshold"].to(subject.sae.threshold))
    told = {"rule": rule, "l0": l0, "l0_on_validation": found["l0"].item(), "few_firings": int(found["few"]), "tokens": int(found["on"])}
    return replace(subject, rule=told)
