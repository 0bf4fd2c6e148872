"""Scores by embeddings, with an embedding that counts words."""

from collections.abc import Sequence
from math import isnan

import numpy as np
import pytest
import torch

from metasae_lightning.judging.scoring.controls import other_explanation, shuffled_contexts
from metasae_lightning.judging.scoring.embedding_scores import ExplanationNearness, TopicalCoherence
from metasae_lightning.judging.texts.contexts import Context, LatentContexts
from tests.judging.word_latents import FILLER, word, word_latents

LATENTS = word_latents(20)
VOCABULARY = [*FILLER, *map(word, LATENTS)]


def embed(texts: Sequence[str]) -> torch.Tensor:
    counts = torch.tensor([[float(text.split().count(token.strip())) for token in VOCABULARY] for text in texts])
    counts[:, : len(FILLER)] *= 0.1  # the words of latents tell more, as in a sentence embedding
    return torch.nn.functional.normalize(counts + 1e-6, dim=1)


@pytest.mark.parametrize("score", [TopicalCoherence(), ExplanationNearness()], ids=lambda score: score.name)
def test_contexts_of_a_word_lie_near_each_other_and_near_the_word(score: TopicalCoherence | ExplanationNearness):
    own = [score.value(contexts, word(latent), embed) for latent, contexts in LATENTS.items()]
    shuffled = [score.value(contexts, word(latent), embed) for latent, contexts in shuffled_contexts(LATENTS, 0).items()]
    assert np.mean(own) > 0.99
    # Contexts of others have less of the fillers in proportion, and so lie a little farther from everything than silent ones.
    assert np.mean(shuffled) < 0.6
    if score.needs_explanation:
        others = other_explanation({latent: word(latent) for latent in LATENTS}, 0)
        assert np.mean([score.value(contexts, others[latent], embed) for latent, contexts in LATENTS.items()]) < 0.6
        assert isnan(score.value(LATENTS[0], "", embed))


def test_topical_coherence_by_hand():
    # The reference is the mean of (1, 0) and (0, 1): a context's nearness is half the sum of its two coordinates. Those that fire have 1
    # and 1.4, those that do not 1.4 and -1. Of four pairs one is lost, one is a tie and two are won: 2.5 / 4.
    rows = {"p": [1.0, 0.0], "q": [0.0, 1.0], "r": [0.5**0.5] * 2, "s": [-1.0, 0.0]}
    contexts = {name: Context(0, (name,), (0.0,)) for name in rows}
    latent = LatentContexts(0, 0.1, [contexts["p"], contexts["q"]], [contexts["p"], contexts["r"]], [contexts["r"], contexts["s"]], [])
    assert TopicalCoherence().value(latent, "", lambda texts: torch.tensor([rows[text] for text in texts])) == 2.5 / 4
