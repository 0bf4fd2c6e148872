"""Thresholds set anew so that SAEs can be compared: as many latents active on a token in each."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.held_out_text import as_record, held_out, identity, passages
from metasae_lightning.evaluation.saes import Subject
from metasae_lightning.sae import pretrained
from metasae_lightning.sae.thresholds import Rule, calibrate
from metasae_lightning.step import Batch

log = logging.getLogger(__name__)


def at_matched_l0(subjects: Sequence[Subject], data: Any, rule: Rule, l0: float | None, tokens: int) -> list[Subject]:
    """SAEs with thresholds set by a rule on validation tokens, for one L0: the one named, that of an SAE that cannot move, or the least.

    An SAE without thresholds stays as it is, which is said.
    """
    able = [subject for subject in subjects if pretrained.pre_activations(subject.sae) is not None]
    for subject in subjects:
        if subject not in able:
            log.warning("%s has no thresholds (%s): it stays at its own L0", subject.name, subject.sae.cfg.architecture())
    goal = goal_of(able, l0, [subject for subject in subjects if subject not in able])
    samples: list[Tensor] = []
    return [_set(subject, goal, rule, data, tokens, samples) if subject in able else subject for subject in subjects]


def goal_of(able: Sequence[Subject], l0: float | None, fixed: Sequence[Subject] = ()) -> float:
    """The L0 that SAEs with thresholds are set to: the one named, that of one that cannot move, or the least that any was trained at."""
    goals = [l0] if l0 else trained_at(fixed) or trained_at(able)
    if able and not goals:
        raise InputError(f"l0: {able[0].place} does not tell what L0 it was trained at: name one, --l0")
    goal = min(goals, default=0.0)
    for subject in able:
        if goal > len(subject.W_dec):
            raise InputError(f"l0: {subject.place} has {len(subject.W_dec)} latents, of which {goal:g} cannot be active")
    return goal


def trained_at(subjects: Sequence[Subject]) -> list[float]:
    """The L0 of those that tell."""
    return [l0 for subject in subjects if (l0 := subject.target_l0)]


def sample(subject: Subject, data: Any, tokens: int) -> list[Tensor]:
    """Validation activations, batch by batch, where the SAE is."""
    return [Batch.of(batch).activations.to(subject.sae.device) for batch in held_out(data, "validation", tokens)]


def _set(subject: Subject, l0: float, rule: Rule, data: Any, tokens: int, samples: list[Tensor]) -> Subject:
    stream = held_out(data, "validation", tokens)
    scores = pretrained.pre_activations(subject.sae)
    assert scores is not None

    def find() -> dict[str, Tensor]:
        if not samples:
            log.info("thresholds by the rule %r on %s validation tokens", rule, f"{tokens:,}")
            samples.extend(sample(subject, data, tokens))
        found = calibrate(scores, samples, l0, rule)
        told = {"l0": found.l0, "few": found.n_rare, "on": found.tokens}
        return {"threshold": found.threshold, **{name: torch.tensor(value) for name, value in told.items()}}

    text = [passage.digest for passage in passages(stream, tokens)]
    of = {**subject.identity, "data": as_record(identity(stream)), "text": text, "rule": rule, "l0": l0, "tokens": tokens}
    found = subject.ledger.piece("thresholds", of, find)
    subject.sae.threshold.copy_(found["threshold"].to(subject.sae.threshold))
    told = {"rule": rule, "l0": l0, "l0_on_validation": found["l0"].item(), "few_firings": int(found["few"]), "tokens": int(found["on"])}
    return replace(subject, rule=told)
