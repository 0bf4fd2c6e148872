"""One score of many latents, with its inputs: for the latents of an arm, for a control, or for planted latents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan

import torch
from torch import Tensor

from metasae_lightning.evaluation.collect import CollectedCodes
from metasae_lightning.judging.judges.judge import Judge
from metasae_lightning.judging.scoring.score_kinds import QuestionSet, Score, generator_for
from metasae_lightning.judging.texts.contexts import LatentContexts


@dataclass(frozen=True)
class ScoringInputs:
    """What the scores of one SAE's latents are computed from: one draw of contexts, explanations and codes."""

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
    """The score by latent; NaN if its contexts are too few, and chance if it lacks an explanation that the score needs."""
    graded: Mapping[int, float] = field(default_factory=dict)
    """AUC of the answers' probabilities by latent; NaN if the judge gives none."""
    words: Mapping[int, Sequence[str]] = field(default_factory=dict)
    """What the judge wrote, by latent."""
    asked: int = 0
    """Number of questions."""
    unreadable: int = 0
    """Number of unreadable answers."""
    probabilities: Sequence[tuple[float, int]] = ()
    """The probability of yes, and 1 if yes is right or else 0, for each answer with probabilities to a yes-or-no question."""


def scores_by_judge(score: Score, inputs: ScoringInputs, judge: Judge, *, seed: int, threshold: float = 0.5) -> LatentScores:
    """The score of each latent, from a judge's answers. The questions about all latents are asked in one call."""
    asked: dict[int, QuestionSet] = {}
    for latent, contexts in inputs.contexts.items():
        explanation = inputs.explanations.get(latent, "")
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
    without_explanation = {latent: score.chance for latent in inputs.contexts if latent not in asked}
    return LatentScores({**values, **without_explanation}, graded, words, len(answers), unreadable, probabilities)


def score_table(scores: Sequence[Mapping[int, float]], latents: Sequence[int]) -> Tensor:
    """A score as a tensor, one row for each draw and one column for each latent; NaN where a latent has no score."""
    return torch.tensor([[of_seed.get(latent, nan) for latent in latents] for of_seed in scores], dtype=torch.float64).view(
        len(scores), len(latents)
    )
