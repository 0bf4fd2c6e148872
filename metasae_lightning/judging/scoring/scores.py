"""The scores from a judge's answers, each with its questions."""

from collections.abc import Mapping, Sequence
from typing import final

import numpy as np

from metasae_lightning.judging.judges.questions import Question, ShownText, Task
from metasae_lightning.judging.scoring import formulas
from metasae_lightning.judging.scoring.marks import (
    plain,
    with_firing_marked,
    with_firing_replaced,
    with_marks_of,
    with_nearest_marked,
)
from metasae_lightning.judging.scoring.score_kinds import ChoiceScore, Negatives, NumbersScore, QuestionSet, Score, YesNoScore
from metasae_lightning.judging.texts.contexts import Context, LatentContexts

A_B, ONE_TO_FIVE = ("A", "B"), ("1", "2", "3", "4", "5")


@final
class Detection(YesNoScore):
    """Does the text contain what the explanation describes? Yes for texts in which the latent fires."""

    task: Task = "detection"
    descriptions: Mapping[Negatives, str] = {
        "silent": "Tell texts in which the latent fires from random texts in which it does not; balanced accuracy.",
        "near": "Tell texts in which the latent fires from texts in which only the latent nearest to it fires; balanced accuracy.",
    }

    def shown(self, firing: Sequence[Context], others: Sequence[Context], rng: np.random.Generator) -> list[ShownText]:
        return [plain(context) for context in [*firing, *others]]


@final
class Fuzzing(YesNoScore):
    """Are the marked tokens those that the explanation describes? Yes for marks on the tokens that the latent fires on.

    In a text in which the latent fires, tokens with at least 0.3 of its peak are marked. A `silent` text has the marks of such a text, at
    the same places from its end: where marks stand does not tell the answer. (Delphi marks random tokens and one fixed place.) In `near`
    texts the marks are on tokens with at least 0.3 of the nearest latent's peak.
    """

    task: Task = "fuzzing"
    descriptions: Mapping[Negatives, str] = {
        "silent": "Tell marks on the tokens that the latent fires on from marks on other tokens of other texts; balanced accuracy.",
        "near": "Tell marks on the tokens that the latent fires on from marks on tokens that only the latent nearest to it fires on; "
        "balanced accuracy.",
    }

    def shown(self, firing: Sequence[Context], others: Sequence[Context], rng: np.random.Generator) -> list[ShownText]:
        order = rng.permutation(len(firing)).tolist()
        return [with_firing_marked(context) for context in firing] + [
            with_nearest_marked(context) if any(context.nearest_activations) else with_marks_of(context, firing[order[number % len(order)]])
            for number, context in enumerate(others)
        ]


@final
class Replacement2AFC(ChoiceScore):
    """Which of two texts is real: a context in which the latent fires, or the same with random tokens in place of those it fires on?

    A two-alternative forced choice, as the paper describes it. The random tokens are those of contexts in which the latent does not fire.
    They also spoil the sentence, so a judge that knows the language is above chance with any explanation: compare the controls.
    """

    name = "replacement_2afc"
    description = "Tell a text from its copy in which random tokens replace those that the latent fires on; accuracy."
    task: Task = "replacement_2afc"
    chance = 0.5

    def questions(self, contexts: LatentContexts, explanation: str, rng: np.random.Generator) -> QuestionSet:
        other_tokens = [token for context in [*contexts.silent, *contexts.near] for token in context.tokens]
        replaced = [(plain(context), with_firing_replaced(context, other_tokens, rng)) for context in contexts.firing]
        pairs = [(real, copy) for real, copy in replaced if copy is not None]
        truths = balanced_positions(len(pairs), 2, rng)
        shown = [(copy, real) if truth else (real, copy) for (real, copy), truth in zip(pairs, truths, strict=True)]
        return QuestionSet(tuple(Question(self.task, texts, explanation, A_B) for texts in shown), tuple(truths))


@final
class Intruder(ChoiceScore):
    """Which of five texts is the intruder? In four the latent fires, in the intruder it does not. No explanation is shown.

    In the four, the tokens that the latent fires on are marked. In the intruder, tokens at the same places as in a fifth text are
    marked, so that the places of marks do not tell it.
    """

    name = "intruder"
    description = "Tell the one of five texts in which the latent does not fire, without an explanation; accuracy."
    task: Task = "intruder"
    chance = 0.2
    needs_explanation = False

    def __init__(self, rounds: int = 5) -> None:
        self.rounds = rounds

    def questions(self, contexts: LatentContexts, explanation: str, rng: np.random.Generator) -> QuestionSet:
        if len(contexts.firing) < 4 or not contexts.silent:
            return QuestionSet()
        truths = balanced_positions(self.rounds, 5, rng)
        order = rng.permutation(len(contexts.silent)).tolist()
        asked: list[Question] = []
        for number, truth in enumerate(truths):
            *four, fifth = [contexts.firing[index] for index in [*rng.permutation(len(contexts.firing)).tolist(), 0][:5]]
            texts = [with_firing_marked(context) for context in four]
            silent = contexts.silent[order[number % len(order)]]
            texts.insert(truth, with_marks_of(silent, fifth))
            asked.append(Question(self.task, tuple(texts), choices=ONE_TO_FIVE))
        return QuestionSet(tuple(asked), tuple(truths))


@final
class StrengthSpearman(NumbersScore):
    """How strongly does the latent fire in each text? One question shows all the texts in which it fires, in random order.

    This is what the code of the paper's author computes under the name of fuzzing.
    """

    name = "strength_spearman"
    description = "Grade texts in which the latent fires by how strongly it does; Spearman correlation with its peaks."
    task: Task = "strength"
    works_on_planted = False

    def questions(self, contexts: LatentContexts, explanation: str, rng: np.random.Generator) -> QuestionSet:
        shown = [contexts.firing[index] for index in rng.permutation(len(contexts.firing)).tolist()]
        if len(shown) < 2:
            return QuestionSet()
        question = Question(self.task, tuple(map(plain, shown)), explanation, numbers=len(shown))
        return QuestionSet((question,), (tuple(context.peak for context in shown),))

    def correlation(self, truths: Sequence[float], predictions: Sequence[float]) -> float:
        return formulas.spearman(truths, predictions)


@final
class Simulation(NumbersScore):
    """How strongly does the latent fire on each token? One question for each text.

    The latent fires in `firing` of the texts, evenly from the strongest to the weakest, and does not in `silent` of them.
    """

    name = "simulation"
    description = "Grade each token of texts by how strongly the latent fires on it; Pearson correlation over all tokens."
    task: Task = "simulation"

    def __init__(self, firing: int = 4, silent: int = 1) -> None:
        self.firing, self.silent = firing, silent

    def questions(self, contexts: LatentContexts, explanation: str, rng: np.random.Generator) -> QuestionSet:
        if not contexts.firing:
            return QuestionSet()
        spread = np.linspace(0, len(contexts.firing) - 1, min(self.firing, len(contexts.firing))).round().astype(int).tolist()
        shown = [contexts.firing[index] for index in spread]
        shown += [contexts.silent[index] for index in rng.permutation(len(contexts.silent))[: self.silent].tolist()]
        asked = tuple(Question(self.task, (plain(context),), explanation, numbers=len(context.tokens)) for context in shown)
        return QuestionSet(asked, tuple(context.activations for context in shown))

    def correlation(self, truths: Sequence[float], predictions: Sequence[float]) -> float:
        return formulas.pearson(truths, predictions)


def balanced_positions(count: int, choices: int, rng: np.random.Generator) -> list[int]:
    """The right choice of each of `count` questions, in random order; each choice occurs equally often or once more."""
    return rng.permutation((np.arange(count) + rng.integers(choices)) % choices).tolist()


_ALL: tuple[Score, ...] = (
    Detection(),
    Detection("near"),
    Fuzzing(),
    Fuzzing("near"),
    Replacement2AFC(),
    StrengthSpearman(),
    Simulation(),
    Intruder(),
)
# Each score from a judge's answers, by name.
SCORES: Mapping[str, Score] = {score.name: score for score in _ALL}
