"""The base classes of scores: questions about a latent's contexts, and the formula that turns the answers into a number."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import numpy as np

from metasae_lightning.judging.judges.questions import Answer, Question, ShownText, Task
from metasae_lightning.judging.scoring import formulas
from metasae_lightning.judging.texts.contexts import Context, LatentContexts

Negatives = Literal["silent", "near"]
YES_NO = ("no", "yes")


@dataclass(frozen=True)
class QuestionSet:
    """The questions about one latent for one score, with their right answers."""

    questions: tuple[Question, ...] = ()
    """The questions; none if the latent has too few contexts."""
    truths: tuple[int | tuple[float, ...], ...] = ()
    """For each question, the index of the right choice or the true activations."""


class Score(ABC):
    """A score of a latent, from a judge's answers to questions about its contexts."""

    name: str
    """Name in tables."""
    description: str
    """What a judge is asked, and the formula, in one line."""
    chance: float
    """Value of a judge that guesses."""
    task: Task
    """Task of its questions."""
    has_shuffled_control: bool = True
    """Whether contexts of other latents are a control. They are not beside near contexts, which are nearer to the latent's concept."""
    needs_explanation: bool = True
    """Whether its questions show the explanation."""
    works_on_planted: bool = True
    """Whether planted latents tell how reliable a judge is; their activations are random."""

    @abstractmethod
    def questions(self, contexts: LatentContexts, explanation: str, rng: np.random.Generator) -> QuestionSet:
        """The questions about a latent. All random choices come from `rng`, such as that of `generator_for`."""

    @abstractmethod
    def value(self, asked: QuestionSet, answers: Sequence[Answer], threshold: float = 0.5) -> float:
        """The score. An unreadable answer counts as chance. Without questions the score is NaN.

        `threshold` is the smallest probability of `yes` that counts as yes, for answers with probabilities to yes-or-no questions.
        """

    def graded(self, asked: QuestionSet, answers: Sequence[Answer]) -> float:
        """AUC of the answers' probabilities. It depends on no threshold and on no preference for a choice. Chance is 0.5.

        A choice should be more probable in the questions for which it is right. Its AUC is the share of pairs of a question for which it is
        right and one for which it is wrong that have this order. The result is the mean over the choices. An unreadable answer counts as a
        tie. NaN if no answer has probabilities.
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

    def unreadable(self, asked: QuestionSet, answers: Sequence[Answer]) -> int:
        """Number of answers that do not hold what was asked for, such as a list of numbers that is too short."""
        return sum(not is_readable(question, answer) for question, answer in zip(asked.questions, answers, strict=True))


class YesNoScore(Score):
    """A score by balanced accuracy: a yes-or-no question for each context, where yes is right if the latent fires in it.

    The right answer is no for the contexts of `negatives`: `silent` is random contexts in which the latent does not fire, and `near` is
    contexts in which only the latent with the nearest decoder row fires.
    """

    chance = 0.5
    descriptions: Mapping[Negatives, str]
    """The description for each kind of negatives."""

    def __init__(self, negatives: Negatives = "silent") -> None:
        self.negatives: Negatives = negatives
        self.has_shuffled_control = negatives == "silent"
        self.name = self.task if negatives == "silent" else f"{self.task}_near"
        self.description = self.descriptions[negatives]

    def questions(self, contexts: LatentContexts, explanation: str, rng: np.random.Generator) -> QuestionSet:
        others = contexts.silent if self.negatives == "silent" else contexts.near
        if not contexts.firing or not others:
            return QuestionSet()
        shown = self.shown(contexts.firing, others, rng)
        asked = tuple(Question(self.task, (text,), explanation, YES_NO) for text in shown)
        return QuestionSet(asked, (1,) * len(contexts.firing) + (0,) * len(others))

    @abstractmethod
    def shown(self, firing: Sequence[Context], others: Sequence[Context], rng: np.random.Generator) -> list[ShownText]:
        """The texts of the questions: of the contexts in which the latent fires, then of the others."""

    def value(self, asked: QuestionSet, answers: Sequence[Answer], threshold: float = 0.5) -> float:
        predictions = [
            choice if choice is None or not answer.probabilities else int(answer.probabilities[1] >= threshold)
            for choice, answer in zip(chosen(asked, answers), answers, strict=True)
        ]
        return formulas.balanced_accuracy(right_choices(asked), predictions)


class ChoiceScore(Score):
    """A score by accuracy: each question asks which of several texts is the right one."""

    def value(self, asked: QuestionSet, answers: Sequence[Answer], threshold: float = 0.5) -> float:
        return formulas.accuracy(right_choices(asked), chosen(asked, answers), round(1 / self.chance))


class NumbersScore(Score):
    """A score by the correlation of numbers from 0 to 10 with activations. Unreadable numbers count as the mean of the readable ones."""

    chance = 0.0

    def value(self, asked: QuestionSet, answers: Sequence[Answer], threshold: float = 0.5) -> float:
        truths = [value for truth in asked.truths if isinstance(truth, tuple) for value in truth]
        predictions = [
            value
            for question, answer in zip(asked.questions, answers, strict=True)
            for value in (answer.numbers if is_readable(question, answer) else (float("nan"),) * question.numbers)
        ]
        return self.correlation(truths, predictions)

    @abstractmethod
    def correlation(self, truths: Sequence[float], predictions: Sequence[float]) -> float:
        """The correlation of the activations, `truths`, with the judge's numbers for them."""


def generator_for(seed: int, *, score: str, latent: int) -> np.random.Generator:
    """The generator for one score's questions about one latent. It depends on no other score and no other latent."""
    return np.random.default_rng([seed, zlib.crc32(score.encode()), latent])


def is_readable(question: Question, answer: Answer) -> bool:
    """Whether an answer holds one of the question's choices, or as many numbers as it asks for."""
    if count := len(question.choices):
        return answer.choice is not None and 0 <= answer.choice < count and len(answer.probabilities) in (0, count)
    return len(answer.numbers) == question.numbers and all(map(isfinite, answer.numbers))


def chosen(asked: QuestionSet, answers: Sequence[Answer]) -> list[int | None]:
    """The choice in each answer; None if it is unreadable."""
    return [answer.choice if is_readable(question, answer) else None for question, answer in zip(asked.questions, answers, strict=True)]


def right_choices(asked: QuestionSet) -> list[int]:
    """The index of each question's right choice."""
    return [truth for truth in asked.truths if isinstance(truth, int)]
