"""Scores with their controls, whoever answers: a judge, a sentence embedder, or the model's unembedding."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from metasae_lightning.errors import InputError, did_you_mean
from metasae_lightning.judging.judges.judge import Judge
from metasae_lightning.judging.scoring.controls import other_explanation, shuffled_contexts
from metasae_lightning.judging.scoring.measured import LatentScores, Material, judged
from metasae_lightning.judging.scoring.output import Output
from metasae_lightning.judging.scoring.score_kinds import Score
from metasae_lightning.judging.scoring.scores import SCORES
from metasae_lightning.judging.scoring.topical_coherence import Embed, EmbeddingScore, ExplanationNearness, TopicalCoherence


class Measure(ABC):
    """A score of latents, with its controls."""

    name: str
    """Name in tables."""
    description: str
    """What is asked, and the formula, in one line."""
    chance: float
    """Value by chance."""
    needs_explanation: bool
    """Whether a latent without an explanation has no score."""
    can_be_planted: bool = True
    """Whether planted latents tell how reliable it is."""

    @abstractmethod
    def scores(self, material: Material, seed: int, threshold: float) -> LatentScores:
        """The scores of all latents. `threshold` is the smallest probability of yes that counts as yes."""

    def controls(self, material: Material, seed: int, threshold: float) -> dict[str, LatentScores]:
        """The scores under each control, by its name."""
        if len(material.contexts) < 2:
            return {}
        controls = {"shuffled_contexts": replace(material, contexts=shuffled_contexts(material.contexts, seed))}
        explained = {latent: material.explanations[latent] for latent in material.contexts if material.explanations.get(latent)}
        if self.needs_explanation and len(explained) > 1:
            controls["other_explanation"] = replace(material, explanations=other_explanation(explained, seed))
        return {name: self.scores(changed, seed, threshold) for name, changed in sorted(controls.items())}


@final
class JudgedMeasure(Measure):
    """A score by a judge's answers."""

    def __init__(self, score: Score, judge: Judge):
        self.score, self.judge = score, judge
        self.name, self.description, self.chance = score.name, score.description, score.chance
        self.needs_explanation, self.can_be_planted = score.needs_explanation, score.can_be_planted

    def scores(self, material: Material, seed: int, threshold: float) -> LatentScores:
        return judged(self.score, material, self.judge, seed=seed, threshold=threshold)


@final
class EmbeddedMeasure(Measure):
    """A score by sentence embeddings."""

    def __init__(self, score: EmbeddingScore, embed: Embed):
        self.score, self.embed = score, embed
        self.name, self.description, self.chance = score.name, score.description, score.chance
        self.needs_explanation = score.needs_explanation

    def scores(self, material: Material, seed: int, threshold: float) -> LatentScores:
        explained = {latent: material.explanations.get(latent, "") for latent in material.contexts}
        return LatentScores(
            {
                latent: self.score.value(contexts, explained[latent], self.embed)
                for latent, contexts in material.contexts.items()
                if explained[latent] or not self.needs_explanation
            }
        )


@final
class OutputMeasure(Measure):
    """What the decoder rows promote, against the tokens that follow firings. Planted latents have no decoder row in the model."""

    name, description, chance = Output.name, Output.description, Output.chance
    needs_explanation, can_be_planted = Output.needs_explanation, False

    def __init__(self, model: Any):
        self.output, self.model = Output(), model

    def scores(self, material: Material, seed: int, threshold: float) -> LatentScores:
        return self._all(material, seed)["own"]

    def controls(self, material: Material, seed: int, threshold: float) -> dict[str, LatentScores]:
        return {name: found for name, found in self._all(material, seed).items() if name != "own"}

    def _all(self, material: Material, seed: int) -> dict[str, LatentScores]:
        """The scores and both controls; none where the SAE does not read the residual stream."""
        latents = list(material.contexts)
        found = None if material.collected is None else self.output.values(material.collected, self.model, latents, seed)
        names = {"own": "own", "other_row": "other_row", "shuffled_contexts": "other_firings"}
        if found is None:
            return {name: LatentScores({}) for name in names}
        return {name: LatentScores(dict(zip(latents, getattr(found, field), strict=True))) for name, field in names.items()}


def measures_for(names: Sequence[str] | None, judge: Judge, embed: Embed | None, model: Any, *, explained: bool) -> list[Measure]:
    """The measures of these names, or all that are possible: by the judge's tasks, with an embedder, and with explanations.

    A name that is unknown or not possible is an `InputError`.
    """
    possible: list[Measure] = [JudgedMeasure(score, judge) for score in SCORES.values() if score.task in judge.tasks]
    if embed is not None:
        possible += [EmbeddedMeasure(score, embed) for score in (TopicalCoherence(), ExplanationNearness())]
    possible.append(OutputMeasure(model))
    by_name: Mapping[str, Measure] = {measure.name: measure for measure in possible if explained or not measure.needs_explanation}
    for name in names or ():
        if name not in by_name:
            why = "this judge and these explanations do not give it" if name in {*SCORES, *ALL_NAMES} else "there is no such score"
            possible_names = f"; there are {', '.join(by_name)}"
            raise InputError(f"scores: {name!r}: {why}{did_you_mean(name, by_name) or possible_names}")
    return [by_name[name] for name in dict.fromkeys(names or by_name)]


# Names of the scores that no judge answers.
ALL_NAMES = (TopicalCoherence.name, ExplanationNearness.name, Output.name)
