"""Scores of the arms with their controls, as entries of `evaluation.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from torch import Tensor

from metasae_lightning.judging.arms import SampledArm
from metasae_lightning.judging.reliability import Reliability
from metasae_lightning.judging.scoring.latent_scores import LatentScores, score_table
from metasae_lightning.judging.scoring.measures import Measure
from metasae_lightning.judging.scoring.statistics import mean_over_latents, paired_difference, unpaired_difference


@dataclass(frozen=True)
class ArmScore:
    """One score of the latents of one arm, with the same score under each control."""

    by_seed: Sequence[LatentScores]
    """The scores, one for each draw of contexts."""
    controls: Mapping[str, Sequence[LatentScores]]
    """The scores under each control, one for each draw of contexts."""


def score_arm(measure: Measure, arm: SampledArm, threshold: float, *, seed: int) -> ArmScore:
    """One score of all latents of an arm, and the same under each control that the score has."""
    numbered = [(seed + draw, inputs) for draw, inputs in enumerate(arm.inputs)]
    own = [measure.scores(inputs, number, threshold) for number, inputs in numbered]
    controls = [measure.controls(inputs, number, threshold) for number, inputs in numbered]
    return ArmScore(own, {name: [of_draw[name] for of_draw in controls] for name in controls[0]})


def score_entry(
    measure: Measure, arm: SampledArm, score: ArmScore, reliability: Reliability | None, *, resamples: int, seed: int
) -> dict[str, Any]:
    """One score of one arm for `evaluation.json`: means over its sampled latents and under controls, with intervals."""
    mean = values_of(score.by_seed, arm.latents)
    asked = sum(of_seed.asked for of_seed in score.by_seed)
    graded = mean_over_latents(score_table([of_seed.graded for of_seed in score.by_seed], arm.latents), resamples=resamples, seed=seed)
    controls: dict[str, Any] = {}
    for name, by_seed in score.controls.items():
        control = values_of(by_seed, arm.latents)
        controls[name] = {
            "mean": asdict(mean_over_latents(control, resamples=resamples, seed=seed)),
            "excess": asdict(paired_difference(control, mean, resamples=resamples, seed=seed)),
        }
    beats = [entry["excess"]["low"] > 0 for entry in controls.values() if isfinite(entry["excess"]["low"])]
    return {
        **{"mean": asdict(mean_over_latents(mean, resamples=resamples, seed=seed)), "graded": asdict(graded) if graded.latents else None},
        **{"chance": measure.chance, "about": measure.description},
        "unreadable": sum(of_seed.unreadable for of_seed in score.by_seed) / asked if asked else 0.0,
        **{"controls": controls, "beats_controls": all(beats) if beats else None},
        "reliability": None if reliability is None else asdict(reliability),
    }


def differences_of(first: tuple[SampledArm, ArmScore], second: tuple[SampledArm, ArmScore], *, resamples: int, seed: int) -> dict[str, Any]:
    """The second arm's score minus the first's: over pairs of latents, and over each arm's own sample."""
    (arm_a, score_a), (arm_b, score_b) = first, second
    pairs = [(latent, arm_b.partners[latent]) for latent in arm_a.latents if latent in arm_b.partners]
    sides = values_of(score_a.by_seed, [a for a, _ in pairs]), values_of(score_b.by_seed, [b for _, b in pairs])
    paired = paired_difference(*sides, resamples=resamples, seed=seed)
    unpaired = unpaired_difference(
        values_of(score_a.by_seed, arm_a.latents), values_of(score_b.by_seed, arm_b.latents), resamples=resamples, seed=seed
    )
    return {"paired": asdict(paired), "unpaired": asdict(unpaired)}


def values_of(by_seed: Sequence[LatentScores], latents: Sequence[int]) -> Tensor:
    """A score as a tensor, one row for each draw and one column for each latent."""
    return score_table([of_seed.values for of_seed in by_seed], latents)


def latents_entry(arm: SampledArm, scores: Mapping[str, ArmScore]) -> dict[str, Any]:
    """The judged latents of an arm for the page: explanation, density, pair in the first arm, scores, and the judge's words."""
    of_partner = {partner: first for first, partner in arm.partners.items()}
    entries: dict[str, Any] = {}
    for latent, contexts in arm.contexts[0].items():
        first = of_partner.get(latent)
        entries[str(latent)] = {
            **{"explanation": arm.explanations.get(latent, ""), "density": contexts.density},
            "pair": None if first is None else {"latent": first, "cosine": round(arm.cosines[first], 4)},
            "chosen_as": "sample" if latent in arm.latents else "partner",
            "scores": {name: values_of(score.by_seed, [latent]).mean().item() for name, score in scores.items()},
            "words": {name: list(found) for name, score in scores.items() if (found := score.by_seed[0].words.get(latent))},
        }
    return entries
