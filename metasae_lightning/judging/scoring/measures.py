"""Scores of all latents with their controls, computed by a judge, a sentence embedder, or the model's unembedding."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from metasae_lightning.errors import InputError, did_you_mean
from metasae_lightning.judging.judges.judge import Judge
from metasae_lightning.judging.scoring.controls import other_explanation, shuffled_contexts
from metasae_lightning.judging.scoring.embedding_scores import Embed, EmbeddingScore, ExplanationNearness, TopicalCoherence
from metasae_lightning.judging.scoring.latent_scores import LatentScores, ScoringInputs, scores_by_judge
from metasae_lightning.judging.scoring.output_score import OutputScore
from metasae_lightning.judging.scoring.score_kinds import Score
from metasae_lightning.judging.scoring.scores import SCORES


class Measure(ABC):
    """A score that is computed for all latents of an arm, with its controls."""

    name: str
    """Name in tables."""
    description: str
    """The question and the formula, in one line."""
    chance: float
    """Value of the score by chance."""
    needs_explanation: bool
    """Whether the score is of an explanation. A latent without one is at chance, so that a judge cannot leave latents out."""
    has_shuffled_control: bool = True
    """Whether contexts of other latents are a control."""
    works_on_planted: bool = True
    """Whether planted latents can have the score."""

    @abstractmethod
    def scores(self, inputs: ScoringInputs, seed: int, threshold: float) -> LatentScores:
        """The score of each latent. `threshold` is the smallest probability of yes that counts as yes."""

    def controls(self, inputs: ScoringInputs, seed: int, threshold: float) -> dict[str, LatentScores]:
        """The scores under each control, by the name of the control; empty for a single latent."""
        if len(inputs.contexts) < 2:
            return {}
        controls: dict[str, ScoringInputs] = {}
        if self.has_shuffled_control:
            controls["shuffled_contexts"] = replace(inputs, contexts=shuffled_contexts(inputs.contexts, seed))
        explained = {latent: inputs.explanations[latent] for latent in inputs.contexts if inputs.explanations.get(latent)}
        if self.needs_explanation and len(explained) > 1:
            controls["other_explanation"] = replace(inputs, explanations=other_explanation(explained, seed))
        return {name: self.scores(changed, seed, threshold) for name, changed in sorted(controls.items())}


@final
class JudgedMeasure(Measure):
    """A score from a judge's answers."""

    def __init__(self, score: Score, judge: Judge):
        self.score, self.judge = score, judge
        self.name, self.description, self.chance = score.name, score.description, score.chance
        self.needs_explanation, self.works_on_planted = score.needs_explanation, score.works_on_planted
        self.has_shuffled_control = score.has_shuffled_control

    def scores(self, inputs: ScoringInputs, seed: int, threshold: float) -> LatentScores:
        return scores_by_judge(self.score, inputs, self.judge, seed=seed, threshold=threshold)


@final
class EmbeddedMeasure(Measure):
    """A score from sentence embeddings."""

    def __init__(self, score: EmbeddingScore, embed: Embed):
        self.score, self.embed = score, embed
        self.name, self.description, self.chance = score.name, score.description, score.chance
        self.needs_explanation = score.needs_explanation

    def scores(self, inputs: ScoringInputs, seed: int, threshold: float) -> LatentScores:
        explained = {latent: inputs.explanations.get(latent, "") for latent in inputs.contexts}
        return LatentScores(
            {
                latent: self.score.value(contexts, explained[latent], self.embed)
                if explained[latent] or not self.needs_explanation
                else self.chance
                for latent, contexts in inputs.contexts.items()
            }
        )


@final
class OutputMeasure(Measure):
    """The score `output`, from the model's unembedding. Planted latents cannot have it, because their decoder rows are random."""

    name, description, chance = OutputScore.name, OutputScore.description, OutputScore.chance
    needs_explanation, works_on_planted = OutputScore.needs_explanation, False

    def __init__(self, model: Any):
        self.output, self.model = OutputScore(), model

    def scores(self, inputs: ScoringInputs, seed: int, threshold: float) -> LatentScores:
        return self._all(inputs, seed)["own"]

    def controls(self, inputs: ScoringInputs, seed: int, threshold: float) -> dict[str, LatentScores]:
        return {name: found for name, found in self._all(inputs, seed).items() if name != "own"}

    def _all(self, inputs: ScoringInputs, seed: int) -> dict[str, LatentScores]:
        """The scores and those of both controls; without entries if the SAE does not read the residual stream."""
        latents = list(inputs.contexts)
        found = None if inputs.collected is None else self.output.values(inputs.collected, self.model, latents, seed)
        names = {"own": "own", "other_row": "other_row", "shuffled_contexts": "other_firings"}
        if found is None:
            return {name: LatentScores({}) for name in names}
        return {name: LatentScores(dict(zip(latents, getattr(found, field), strict=True))) for name, field in names.items()}


def measures_for(names: Sequence[str] | None, judge: Judge, embed: Embed | None, model: Any, *, explained: bool) -> list[Measure]:
    """The measures with these names; without names, all that the judge's tasks, the embedder and the explanations make possible.

    A name that is unknown or not possible is an `InputError`.
    """
    possible: list[Measure] = [JudgedMeasure(score, judge) for score in SCORES.values() if score.task in judge.tasks]
    if embed is not None:
        possible += [EmbeddedMeasure(score, embed) for score in (TopicalCoherence(), ExplanationNearness())]
    possible.append(OutputMeasure(model))
    by_name: Mapping[str, Measure] = {measure.name: measure for measure in possible if explained or not measure.needs_explanation}
    for name in names or ():
        if name not in by_name:
            why = (
                "it is not possible with this judge, embedder and explanations"
                if name in {*SCORES, *NAMES_WITHOUT_JUDGE}
                else "there is no such score"
            )
            possible_names = f"; there are {', '.join(by_name)}"
            raise InputError(f"scores: {name!r}: {why}{did_you_mean(name, by_name) or possible_names}")
    return [by_name[name] for name in dict.fromkeys(names or by_name)]


# Names of the scores that no judge answers.
NAMES_WITHOUT_JUDGE = (TopicalCoherence.name, ExplanationNearness.name, OutputScore.name)
