"""Scores: a judge that is right by construction, one that guesses, answers that cannot be read, and what questions give away."""

from collections import Counter
from collections.abc import Callable
from math import isnan

import numpy as np
import pytest

from metasae_lightning.judging.judges.questions import Answer
from metasae_lightning.judging.scoring.controls import other_explanation, shuffled_contexts
from metasae_lightning.judging.scoring.score_kinds import QuestionSet, Score, generator_for
from metasae_lightning.judging.scoring.scores import SCORES, Detection, Fuzzing, Intruder, Replacement2AFC, Simulation, StrengthSpearman
from metasae_lightning.judging.texts.contexts import Context, LatentContexts
from tests.judging.word_latents import random_answer, right_answers, word, word_latents

LATENTS = word_latents(12)
EXPLANATIONS = {latent: word(latent) for latent in LATENTS}


def asked_of(score: Score, contexts: LatentContexts, explanation: str, seed: int = 0) -> QuestionSet:
    return score.questions(contexts, explanation, generator_for(seed, score=score.name, latent=contexts.latent))


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_a_judge_that_is_right_gets_1_and_chance_under_the_controls(score: Score):
    def values(contexts: dict[int, LatentContexts], explanations: dict[int, str]) -> list[float]:
        asked = [asked_of(score, contexts[latent], explanations[latent]) for latent in contexts]
        assert all(of_latent.questions for of_latent in asked)
        return [score.value(of_latent, right_answers(of_latent.questions)) for of_latent in asked]

    assert values(LATENTS, EXPLANATIONS) == pytest.approx([1.0] * 12)
    # What the judge cannot tell it answers by the first choice, and each choice is right equally often: exactly at chance.
    assert values(shuffled_contexts(LATENTS, seed=1), EXPLANATIONS) == pytest.approx([score.chance] * 12)
    if score.needs_explanation:
        # `near` contexts hold the word of the nearest latent. With that one's explanation the judge is wrong about each of them: 0.
        others = other_explanation(EXPLANATIONS, seed=1)
        wrong = {latent for latent in LATENTS if others[latent] == word((latent + 1) % 12) and score.name.endswith("near")}
        expected = [0.0 if latent in wrong else score.chance for latent in LATENTS]
        assert values(LATENTS, others) == pytest.approx(expected)
    else:
        assert score.name == "intruder"


# The 95 % interval of a mean over latents: mean +- t sd / sqrt(20), t(19) = 2.093. Coverage of 100 seeds is binomial: 95 +- 2.2, so that
# three standard deviations reach down to 88.
@pytest.mark.parametrize("name", ["detection", "replacement_2afc", "strength_spearman", "simulation", "intruder"])
def test_a_judge_that_guesses_gets_chance_within_its_interval(name: str):
    score, latents = SCORES[name], word_latents(20)
    asked = [asked_of(score, contexts, word(latent)) for latent, contexts in latents.items()]

    def covered(seed: int, bias: float) -> bool:
        rng, values = np.random.default_rng(seed), list[float]()
        for of_latent in asked:
            pairs = zip(of_latent.questions, of_latent.truths, strict=True)
            values.append(score.value(of_latent, [random_answer(question, rng, truth, bias) for question, truth in pairs]))
        return abs(np.mean(values) - score.chance) <= 2.093 * np.std(values, ddof=1) / 20**0.5

    assert 88 <= sum(covered(seed, 0.0) for seed in range(100)) <= 100
    # The control knows 4 of 10 answers. The fewest are 5 of a latent, of 5 choices: it is right by 0.8 x 0.4 more often, eight errors.
    assert sum(covered(seed, 0.4) for seed in range(20)) <= 3


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_an_unreadable_answer_is_at_chance_and_counted(score: Score):
    asked = asked_of(score, LATENTS[0], word(0))
    nothing = [Answer(words="I cannot answer that.")] * len(asked.questions)
    assert score.value(asked, nothing) == pytest.approx(score.chance) and score.unreadable(asked, nothing) == len(nothing)
    assert isnan(score.graded(asked, nothing))
    # What does not fit the question is not readable either: a choice that there is not, a list that is too short or not finite.
    for bad in (Answer(choice=7), Answer(numbers=(1.0,)), Answer(numbers=(float("nan"),) * asked.questions[0].numbers)):
        assert score.unreadable(asked, [bad, *right_answers(asked.questions)[1:]]) == 1
    right = right_answers(asked.questions)
    assert score.unreadable(asked, right) == 0
    if score.chance == 0.5:
        # Every second answer is missing, all others are right: half way between chance and 1.
        mixed = [answer if index % 2 else nothing[0] for index, answer in enumerate(right)]
        assert score.value(asked, mixed) == pytest.approx(0.75)


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_questions_follow_from_seed_score_and_latent(score: Score):
    asked = asked_of(score, LATENTS[0], word(0))
    assert asked == asked_of(score, LATENTS[0], word(0))
    if score.name not in ("detection", "detection_near", "fuzzing_near"):  # nothing in their questions is random
        assert asked != asked_of(score, LATENTS[0], word(0), seed=1)
    first = generator_for(0, score=score.name, latent=0).random()
    assert first != generator_for(0, score=score.name, latent=1).random() != generator_for(0, score="other", latent=1).random()
    assert all(question.explanation == (word(0) if score.needs_explanation else "") for question in asked.questions)
    assert not score.questions(LatentContexts(0, 0.0, [], [], [], []), "", np.random.default_rng()).questions
    assert isnan(score.value(QuestionSet(), []))


def test_the_positions_of_right_choices_tell_nothing():
    for score, choices in ((Replacement2AFC(), 2), (Intruder(rounds=10), 5)):
        truths = [truth for latent, contexts in LATENTS.items() for truth in asked_of(score, contexts, word(latent)).truths]
        assert set(Counter(truths).values()) == {len(truths) // choices}
        orders = {asked_of(score, contexts, "").truths for contexts in LATENTS.values()}
        assert len(orders) > 6  # not one order for all latents
    # Contexts come strongest first; shown in that order, a judge that counts down would get 1.
    values = list[float]()
    for contexts in LATENTS.values():
        asked = asked_of(StrengthSpearman(), contexts, "")
        values.append(StrengthSpearman().value(asked, [Answer(numbers=tuple(map(float, range(10, 0, -1))))]))
    assert abs(np.mean(values)) < 0.3


def test_questions_by_hand():
    # The peaks are 10 and 4: tokens from 3 and from 1.2 on are marked, which are 2 and 1. Their mean, 1.5, is rounded up.
    firing = [Context(0, ("a", "b", "c", "d"), (0, 10, 3, 2.9)), Context(1, ("e", "f", "g", "h"), (4, 1.1, 0, 0))]
    silent = [Context(2, ("i", "j", "k", "b"), (0, 0, 0, 0))]
    near = [Context(3, ("l", "m", "n", "o"), (0, 0, 0, 0), (0, 0, 5, 1))]
    contexts = LatentContexts(0, 0.1, [], firing, silent, near)
    asked = asked_of(Fuzzing(), contexts, "x")
    assert [question.texts[0].marked for question in asked.questions[:2]] == [(False, True, True, False), (True, False, False, False)]
    assert sum(asked.questions[2].texts[0].marked) == 2 and asked.truths == (1, 1, 0)
    # Of the near context the tokens are marked that the nearest latent fires on, from 1.5 on.
    asked = asked_of(Fuzzing("near"), contexts, "x")
    assert asked.questions[2].texts[0].marked == (False, False, True, False) and asked.truths == (1, 1, 0)
    asked = asked_of(Detection(), contexts, "x")
    assert [question.texts[0].text for question in asked.questions] == ["abcd", "efgh", "ijkb"]
    for question, truth in zip(*vars(asked_of(Replacement2AFC(), contexts, "x")).values(), strict=True):
        real, copy = question.texts[truth].tokens, question.texts[1 - truth].tokens
        changed = [index for index in range(4) if real[index] != copy[index]]
        assert changed == ([1, 2] if real == ("a", "b", "c", "d") else [0])
        # `b` is a token of a silent context, and what the latent fires on in the first.
        assert all(copy[index] in set("ijklmno") | ({"b"} if real[0] == "e" else set()) for index in changed)
    assert not asked_of(Intruder(), contexts, "").questions  # needs four firing contexts
    asked = asked_of(Simulation(firing=1, silent=1), contexts, "x")
    assert asked.truths == ((0, 10, 3, 2.9), (0, 0, 0, 0)) and [question.numbers for question in asked.questions] == [4, 4]


def with_probabilities(asked: QuestionSet, probability: Callable[[int], float]) -> list[Answer]:
    chances = [probability(truth) for truth in asked.truths if isinstance(truth, int)]
    return [Answer(choice=int(p >= 0.5), probabilities=(1 - p, p)) for p in chances]


def test_a_judge_that_prefers_yes_is_graded_by_order_and_judged_by_a_threshold():
    score = Detection()
    asked = asked_of(score, LATENTS[0], word(0))
    # It says yes to everything, with more certainty where it is right.
    answers = with_probabilities(asked, lambda truth: 0.9 if truth else 0.7)
    assert (score.value(asked, answers), score.value(asked, answers, threshold=0.8), score.graded(asked, answers)) == (0.5, 1.0, 1.0)
    # The control: one that is equally certain of everything.
    answers = with_probabilities(asked, lambda _: 0.8)
    assert (score.value(asked, answers), score.graded(asked, answers)) == (0.5, 0.5)
    # One that prefers the first of two texts: right about half of them, in the right order about all.
    choice = Replacement2AFC()
    asked = asked_of(choice, LATENTS[0], word(0))
    answers = with_probabilities(asked, lambda truth: 0.4 if truth else 0.2)
    assert (choice.value(asked, answers), choice.graded(asked, answers)) == (0.5, 1.0)
