"""Controls: no latent keeps its own explanation or contexts."""

import pytest
import torch

from metasae_lightning.errors import InputError
from metasae_lightning.judging.scoring.controls import other_explanation, shuffled_contexts
from metasae_lightning.judging.scoring.embedding_scores import ExplanationNearness, TopicalCoherence
from metasae_lightning.judging.scoring.latent_scores import ScoringInputs
from metasae_lightning.judging.scoring.measures import EmbeddedMeasure, JudgedMeasure
from metasae_lightning.judging.scoring.scores import SCORES
from tests.helpers.judges import RandomJudge
from tests.judging.word_latents import word, word_latents


def test_every_latent_gets_the_explanation_of_another():
    explanations = {latent: word(latent) for latent in range(2, 9)}
    drawn = [other_explanation(explanations, seed) for seed in range(20)]
    for others in drawn:
        assert all(others[latent] != explanations[latent] for latent in explanations)
        assert sorted(others.values()) == sorted(explanations.values())
    assert drawn[3] == other_explanation(explanations, 3) and len({tuple(others.values()) for others in drawn}) > 15


def test_equal_explanations_do_not_change_places():
    # Two pairs of equal explanations: of the 6 cycles of four latents, 2 never go from one to its equal.
    explanations = {0: "a", 1: "a", 2: "b", 3: "b"}
    for seed in range(10):
        assert all(explanations[latent] != other for latent, other in other_explanation(explanations, seed).items())


def test_contexts_are_of_other_latents_and_other_documents():
    latents = word_latents(12)
    # Latent 1 fires in a document that latent 0 is explained by: it may not be given to latent 0.
    shared = latents[1].firing[0].document
    latents[0] = latents[0].__class__(**{**vars(latents[0]), "explaining": latents[1].firing[:1]})
    shuffled = shuffled_contexts(latents, seed=0)
    assert shuffled == shuffled_contexts(latents, seed=0) != shuffled_contexts(latents, seed=1)
    for latent, contexts in shuffled.items():
        held = [{other for other in latents if word(other) in context.tokens} for context in contexts.firing]
        # Ten contexts from eleven other latents: each from another one.
        assert len(held) == 10 and set.union(*held) <= set(latents) - {latent} and len(set.union(*held)) == 10
        assert [context.peak for context in contexts.firing] == sorted((context.peak for context in contexts.firing), reverse=True)
        assert (contexts.silent, contexts.near, contexts.explaining) == tuple(
            getattr(latents[latent], name) for name in ("silent", "near", "explaining")
        )
    given = [context.document for seed in range(30) for context in shuffled_contexts(latents, seed)[0].firing]
    assert shared not in given and {context.document for context in latents[1].firing[1:]} & set(given)


def test_one_latent_has_no_controls():
    with pytest.raises(InputError, match="two at least, got 1"):
        shuffled_contexts(word_latents(1), seed=0)
    with pytest.raises(InputError, match="two at least, got 1"):
        other_explanation({3: "cats"}, seed=0)


# Near contexts are nearer to the latent's concept than contexts of others, so shuffled contexts are no control beside them.
def test_each_score_has_the_controls_that_fit_it():
    latents = word_latents(4)
    inputs = ScoringInputs(latents, {latent: word(latent) for latent in latents})
    measures = [JudgedMeasure(score, RandomJudge()) for score in SCORES.values()]
    embedded = [EmbeddedMeasure(score, lambda texts: torch.ones(len(texts), 1)) for score in (TopicalCoherence(), ExplanationNearness())]
    by_controls: dict[tuple[str, ...], set[str]] = {}
    for measure in (*measures, *embedded):
        by_controls.setdefault(tuple(measure.controls(inputs, 0, 0.5)), set()).add(measure.name)
    assert by_controls.pop(("shuffled_contexts",)) == {"intruder", "topical_coherence"}
    assert by_controls.pop(("other_explanation",)) == {"detection_near", "fuzzing_near"}
    assert list(by_controls) == [("other_explanation", "shuffled_contexts")]
