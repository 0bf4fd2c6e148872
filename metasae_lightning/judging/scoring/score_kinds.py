"""The base classes of scores: questions about a latent's contexts, and the formula that turns the answers into a number."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from metasae_lightning.judging.judges.questions import Answer, Question, Task
from metasae_lightning.judging.scoring import formulas
from metasae_lightning.judging.texts.contexts import LatentContexts


@dataclass(frozen=True)
class Asked:
    """The questions about one latent for one score, with what is right."""

    questions: tuple[Question, ...] = ()
    """The questions; none if the latent lacks the contexts for them."""
    truths: tuple[int | tuple[float, ...], ...] = ()
    """For each question, the index of the right choice or the true activations."""


class Score(ABC):
    """A score of a latent."""

    name: str
    """Name in tables."""
    description: str
    """What a judge is asked, and the formula, in one line."""
    chance: float
    """Value of a judge that guesses."""
    task: Task
    """Task of its questions."""
    needs_explanation: bool = True
    """Whether its questions show the explanation."""
    can_be_planted: bool = True
    """Whether planted latents tell how reliable a judge is; their activations are random."""

    @abstractmethod
    def questions(self, contexts: LatentContexts, explanation: str, rng: np.random.Generator) -> Asked:
        """The questions about a latent. Everything random in them comes from `rng`, such as that of `generator_for`."""

    @abstractmethod
    def value(self, asked: Asked, answers: Sequence[Answer], threshold: float = 0.5) -> float:
        """The score. An unreadable answer is at chance; without questions the score is NaN.

        `threshold` is the smallest probability of `yes` that is a yes, for answers with probabilities to questions of yes and no.
        """

    def graded(self, asked: Asked, answers: Sequence[Answer]) -> float:
        """AUC of the answers' probabilities, which depends on no threshold and no preference for a choice; chance is 0.5.

        For each choice it is the probability that the choice has a larger probability where it is right than where it is wrong; this is
        averaged over the choices. An unreadable answer counts as a tie. NaN if no answer has probabilities.
        """
        if not any(answer.probabilities for answer in answers):
            return float("nan")
        by_choice: list[float] = []
        for choice in range(len(asked.questions[0].choices)):
            of_truth: dict[bool, list[float]] = {True: [], False: []}
            for question, truth, answer in zip(asked.questions, asked.truths, answers, strict=True):
                is_graded = is_readable(question, answer) and answer.probabilities
                of_truth[truth == choice].append(answer.probabilities[choice] if is_graded else float("nan"))
            by_choice.append(formulas.auc(of_truth[True], of_truth[False]))
        by_choice = [value for value in by_choice if isfinite(value)]
        return float(np.mean(by_choice)) if by_choice else float("nan")

    def unreadable(self, asked: Asked, answers: Sequence[Answer]) -> int:
        """Number of answers that do not hold what was asked for, such as a list of numbers that is too short."""
        return sum(not is_readable(question, answer) for question, answer in zip(asked.questions, answers, strict=True))


class YesNoScore(Score):
    """A score by balanced accuracy: a question of yes and no for each context, yes for those in which the latent fires."""

    chance = 0.5

    def value(self, asked: Asked, answers: Sequence[Answer], threshold: float = 0.5) -> float:
        predictions = [
            choice if choice is None or not answer.probabilities else int(answer.probabilities[1] >= threshold)
            for choice, answer in zip(chosen(asked, answers), answers, strict=True)
        ]
        return formulas.balanced_accuracy(right_choices(asked), predictions)


class ChoiceScore(Score):
    """A score by accuracy: which of several texts is the one asked for."""

    def value(self, asked: Asked, answers: Sequence[Answer], threshold: float = 0.5) -> float:
        return formulas.accuracy(right_choices(asked), chosen(asked, answers), round(1 / self.chance))


class NumbersScore(Score):
    """A score by the correlation of numbers from 0 to 10 with activations. An unreadable list counts as the mean of the readable ones."""

    chance = 0.0

    def value(self, asked: Asked, answers: Sequence[Answer], threshold: float = 0.5) -> float:
        truths = [value for truth in asked.truths if isinstance(truth, tuple) for value in truth]
        predictions = [
            value
            for question, answer in zip(asked.questions, answers, strict=True)
            for value in (answer.numbers if is_readable(question, answer) else (float("nan"),) * question.numbers)
        ]
        return self.correlation(truths, predictions)

    @abstractmethod
    def correlation(self, truths: Sequence[float], predictions: Sequence[float]) -> float:
        """The correlation of all activations with the numbers for them."""


def generator_for(seed: int, *, score: str, latent: int) -> np.random.Generator:
    """The generator for the questions about a latent: it depends on no other score and no other latent."""
    return np.random.default_rng([seed, zlib.crc32(score.encode()), latent])


def is_readable(question: Question, answer: Answer) -> bool:
    """Whether an answer holds one of the question's choices, or as many numbers as it asks for."""
    if count := len(question.choices):
        return answer.choice is not None and 0 <= answer.choice < count and len(answer.probabilities) in (0, count)
    return len(answer.numbers) == question.numbers and all(map(isfinite, answer.numbers))


def chosen(asked: Asked, answers: Sequence[Answer]) -> list[int | None]:
    """The choice in each answer; None if it is unreadable."""
    return [answer.choice if is_readable(question, answer) else None for question, answer in zip(asked.questions, answers, strict=True)]


def right_choices(asked: Asked) -> list[int]:
    """The index of each question's right choice."""
    return [truth for truth in asked.truths if isinstance(truth, int)]
