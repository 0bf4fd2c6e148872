"""Every score on planted latents: 1 for a judge that is right, chance under the controls, less for a mixture of two words."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from metasae_lightning.judging.scoring.latent_scores import LatentScores, ScoringInputs
from metasae_lightning.judging.scoring.measures import JudgedMeasure
from metasae_lightning.judging.scoring.scores import SCORES
from metasae_lightning.judging.texts.draw import draw_contexts
from metasae_lightning.judging.texts.planted import PlantedLatents, PlantSettings, plant
from tests.helpers.judges import OracleJudge, RandomJudge
from tests.helpers.planted_text import TextOnly, documents, tokenizer

# Scores whose answer is right or wrong; the others grade.
EXACT = ("detection", "fuzzing", "replacement_2afc", "intruder")


@pytest.fixture(scope="module")
def planted() -> PlantedLatents:
    return plant(TextOnly.of(documents()), tokenizer(), PlantSettings(words=6, suffixes=4, topics=3, mixtures=4))


@pytest.fixture(scope="module")
def inputs(planted: PlantedLatents) -> ScoringInputs:
    found = draw_contexts(planted, range(len(planted.firings)), text=planted.text, W_dec=planted.W_dec)
    return ScoringInputs({contexts.latent: contexts for contexts in found.latents}, planted.truth.explanations)


@pytest.fixture(scope="module")
def oracle(planted: PlantedLatents) -> OracleJudge:
    return OracleJudge([latent.explanation for latent in planted.truth.latents])


def by_kind(scores: LatentScores, planted: PlantedLatents) -> dict[str, float]:
    kinds: dict[str, list[float]] = {}
    for latent, value in scores.values.items():
        kinds.setdefault(planted.truth.kinds[latent], []).append(value)
    return {kind: float(np.mean(values)) for kind, values in kinds.items()}


def test_every_kind_is_planted(planted: PlantedLatents, inputs: ScoringInputs):
    counts = {
        kind: sum(planted.truth.kinds[latent] == kind for latent in inputs.contexts) for kind in ("word", "suffix", "topic", "mixture")
    }
    assert all(count >= 2 for count in counts.values()), counts


@pytest.mark.parametrize("name", EXACT)
def test_the_right_judge_gets_1(name: str, inputs: ScoringInputs, planted: PlantedLatents, oracle: OracleJudge):
    means = by_kind(JudgedMeasure(SCORES[name], oracle).scores(inputs, 0, 0.5), planted)
    assert means["word"] == means["suffix"] == means["topic"] == 1.0, means


@pytest.mark.parametrize("name", SCORES)
def test_a_mixture_scores_below_every_pure_kind(name: str, inputs: ScoringInputs, planted: PlantedLatents, oracle: OracleJudge):
    means = by_kind(JudgedMeasure(SCORES[name], oracle).scores(inputs, 0, 0.5), planted)
    assert means["mixture"] < min(means[kind] for kind in ("word", "suffix", "topic")), means


@pytest.mark.parametrize("name", SCORES)
def test_the_right_judge_is_at_chance_under_the_controls(name: str, inputs: ScoringInputs, planted: PlantedLatents, oracle: OracleJudge):
    # Planted words are rare: they are in few contexts of other latents. Suffixes and topics are in many, where yes is right.
    measure = JudgedMeasure(SCORES[name], oracle)
    words = [latent for latent in inputs.contexts if planted.truth.kinds[latent] == "word"]
    own = measure.scores(inputs, 0, 0.5)
    for control, scores in measure.controls(inputs, 0, 0.5).items():
        mean = np.nanmean([scores.values[latent] for latent in words])
        assert abs(mean - measure.chance) < 0.06, (control, mean)
        # Activations of planted latents are random, so that nobody can order the texts by them.
        assert name == "strength_spearman" or np.nanmean([own.values[latent] for latent in words]) - mean > 0.2, control


def test_a_random_judge_is_at_chance(inputs: ScoringInputs):
    means: Mapping[str, Any] = {
        name: np.mean(
            [np.nanmean(list(JudgedMeasure(score, RandomJudge(seed)).scores(inputs, seed, 0.5).values.values())) for seed in range(5)]
        )
        for name, score in SCORES.items()
    }
    # 5 seeds of 17 latents: the standard error of the least certain score, a correlation over 10 texts, is 0.33 / sqrt(85) = 0.036.
    assert {name: abs(mean - SCORES[name].chance) < 0.12 for name, mean in means.items()} == dict.fromkeys(SCORES, True), means
