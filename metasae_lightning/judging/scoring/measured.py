"""Scores of many latents: of the arms, of the controls and of planted latents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan

import torch
from torch import Tensor

from metasae_lightning.evaluation.collect import CollectedCodes
from metasae_lightning.judging.judges.judge import Judge
from metasae_lightning.judging.scoring.score_kinds import Asked, Score, generator_for
from metasae_lightning.judging.texts.contexts import LatentContexts


@dataclass(frozen=True)
class Material:
    """What the latents of one SAE are scored by, in one draw of contexts."""

    contexts: Mapping[int, LatentContexts]
    """Contexts by latent."""
    explanations: Mapping[int, str]
    """Explanations by latent."""
    collected: CollectedCodes | None = None
    """The codes that the contexts were drawn from; None for planted latents."""


@dataclass(frozen=True)
class LatentScores:
    """One score of some latents."""

    values: Mapping[int, float]
    """The score by latent; NaN where nothing could be asked."""
    graded: Mapping[int, float] = field(default_factory=dict)
    """AUC of the answers' probabilities by latent, where the judge gives them."""
    words: Mapping[int, Sequence[str]] = field(default_factory=dict)
    """What the judge wrote, by latent."""
    asked: int = 0
    """Number of questions."""
    unreadable: int = 0
    """Number of answers that could not be read."""
    probabilities: Sequence[tuple[float, int]] = ()
    """Probability of yes and whether yes is right, of each answer to a question of yes and no that has probabilities."""


def judged(score: Score, material: Material, judge: Judge, *, seed: int, threshold: float = 0.5) -> LatentScores:
    """A score by a judge's answers. The questions of all latents are asked at once."""
    asked: dict[int, Asked] = {}
    for latent, contexts in material.contexts.items():
        explanation = material.explanations.get(latent, "")
        if explanation or not score.needs_explanation:
            asked[latent] = score.questions(contexts, explanation, generator_for(seed, score=score.name, latent=latent))
    answers = judge.answers([question for of_latent in asked.values() for question in of_latent.questions])
    values, graded, words, unreadable = dict[int, float](), dict[int, float](), dict[int, list[str]](), 0
    probabilities: list[tuple[float, int]] = []
    begin = 0
    for latent, of_latent in asked.items():
        end = begin + len(of_latent.questions)
        found, begin = answers[begin:end], end
        values[latent], graded[latent] = score.value(of_latent, found, threshold), score.graded(of_latent, found)
        unreadable += score.unreadable(of_latent, found)
        words[latent] = [answer.words for answer in found if answer.words]
        for question, truth, answer in zip(of_latent.questions, of_latent.truths, found, strict=True):
            if question.choices == ("no", "yes") and answer.probabilities and isinstance(truth, int):
                probabilities.append((answer.probabilities[1], truth))
    return LatentScores(values, graded, words, len(answers), unreadable, probabilities)


def table(scores: Sequence[Mapping[int, float]], latents: Sequence[int]) -> Tensor:
    """A score as a tensor, a row a seed and a column a latent; NaN where a latent has no score."""
    return torch.tensor([[of_seed.get(latent, nan) for latent in latents] for of_seed in scores], dtype=torch.float64).view(
        len(scores), len(latents)
    )
