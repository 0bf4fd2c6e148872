"""The output score: equal to one from the tokens after all firings, and 1 for a row that promotes just those."""

from math import isnan
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from metasae_lightning.data.recipe import data_of
from metasae_lightning.evaluation.collect import CollectedCodes
from metasae_lightning.evaluation.evaluate import evaluate
from metasae_lightning.evaluation.saes import load_sae
from metasae_lightning.evaluation.settings import Settings
from metasae_lightning.judging.scoring.output_score import FollowingTokens, OutputScore, next_tokens
from tests.evaluation.test_evaluate import QUICK
from tests.helpers.judged import write_run

LATENTS = [3, 0, 17, 30, 41]


@pytest.fixture(scope="module")
def collected_and_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[CollectedCodes, Any]:
    run_folder = write_run(tmp_path_factory.mktemp("output"), "one")
    data = data_of(run_folder / "config.yaml")
    settings = Settings(**{**QUICK, "critic_seeds": 0, "splice_tokens": 0})
    (evaluation,) = evaluate([load_sae(str(run_folder))], data, settings)
    return evaluation.collected, data.language_model


@pytest.fixture(scope="module")
def followed(collected_and_model: tuple[CollectedCodes, Any]) -> list[tuple[int, set[int]]]:
    """Every token that follows a counted one in its context and document, and the latents that fire on that one."""
    found = list[tuple[int, set[int]]]()
    for codes, entry in collected_and_model[0].codes():
        fires = [set(codes.latents[codes.rows == row].tolist()) for row in range(codes.shape[0])]
        places = entry["counted"].nonzero().tolist()
        for row, (context, place) in enumerate(places):
            after = [context, place + 1]
            if after in places and entry["owner"][context, place + 1] == entry["owner"][context, place]:
                found.append((int(entry["tokens"][context, place + 1]), fires[row]))
    return found


def test_the_score_is_that_of_all_firings(collected_and_model: tuple[CollectedCodes, Any], followed: list[tuple[int, set[int]]]):
    collected, model = collected_and_model
    scores = OutputScore(firings=10**6, elsewhere=10**6).values(collected, model, LATENTS, seed=0)
    assert scores is not None
    logits = model.logits_of_directions(collected.subject.W_dec)

    def agreement(row: int, latent: int) -> float:
        return float(roc_auc_score([latent in fires for _, fires in followed], [float(logits[row, token]) for token, _ in followed]))

    assert scores.own == pytest.approx([agreement(latent, latent) for latent in LATENTS], abs=1e-6)
    assert list(scores.firings) == [sum(latent in fires for _, fires in followed) for latent in LATENTS]
    assert min(scores.firings) > 0
    # Each control is of some other latent, the same one for both sides of a latent.
    for index, latent in enumerate(LATENTS):
        others = [other for other in LATENTS if other != latent]
        assert any(scores.other_row[index] == pytest.approx(agreement(other, latent), abs=1e-6) for other in others)
        assert any(scores.other_firings[index] == pytest.approx(agreement(latent, other), abs=1e-6) for other in others)


class Promoter:
    """A model in which each latent's row adds 1 to the logits of the tokens that follow its firings, and nothing to others."""

    def __init__(self, W_dec: torch.Tensor, followed: list[tuple[int, set[int]]]):
        self.W_dec, self.logits = W_dec, torch.zeros(len(W_dec), 1 + max(token for token, _ in followed))
        for token, fires in followed:
            self.logits[list(fires), token] += 1

    def logits_of_directions(self, rows: torch.Tensor) -> torch.Tensor:
        return self.logits[[int((self.W_dec == row).all(1).nonzero()) for row in rows]]


def test_a_row_that_promotes_what_follows_beats_its_controls(
    collected_and_model: tuple[CollectedCodes, Any], followed: list[tuple[int, set[int]]]
):
    collected, latents = collected_and_model[0], list(range(48))
    scores = OutputScore(firings=64, elsewhere=256).values(collected, Promoter(collected.subject.W_dec, followed), latents, seed=0)
    assert scores is not None and max(scores.firings) == 64
    own, other_row, other_firings = (np.nanmean(values) for values in (scores.own, scores.other_row, scores.other_firings))
    assert own > other_row + 0.1 and own > other_firings + 0.1


def test_an_sae_that_does_not_read_the_residual_stream_has_no_score(collected_and_model: tuple[CollectedCodes, Any]):
    class Blind:
        def logits_of_directions(self, rows: torch.Tensor) -> None:
            return None

    assert OutputScore().values(collected_and_model[0], Blind(), LATENTS, seed=0) is None


def test_a_sample_is_random_and_follows_from_its_seed(
    collected_and_model: tuple[CollectedCodes, Any], followed: list[tuple[int, set[int]]]
):
    collected = collected_and_model[0]
    first, again, other = (FollowingTokens.sampled(collected, LATENTS, firings=8, elsewhere=50, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.elsewhere, again.elsewhere) and not torch.equal(first.elsewhere, other.elsewhere)
    everywhere = [token for token, _ in followed]
    for index, latent in enumerate(LATENTS):
        tokens = [token for token, fires in followed if latent in fires]
        assert len(first.after_firing[index]) == min(8, len(tokens)) and set(first.after_firing[index].tolist()) <= set(tokens)
    assert len(first.elsewhere) == 50 and set(first.elsewhere.tolist()) <= set(everywhere)
    # A latent without a followed firing has no score.
    silent = FollowingTokens(tuple(torch.zeros(0, dtype=torch.long) for _ in LATENTS), first.elsewhere, first.fires)
    assert isnan(silent.following_auc(torch.zeros(max(everywhere) + 1), 0))


def test_the_token_after_the_end_of_a_context_or_document_does_not_count():
    # The second document begins at the third token; the last token of the first context is not counted.
    tokens, counted = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), torch.ones(2, 4, dtype=torch.bool)
    counted[0, 3] = False
    owner = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    entry = {"tokens": tokens, "counted": counted, "owner": owner}
    # 5: 6. 6: another document. 7: not counted. 8 is no row. 9, 10, 11: the next ones. 12: another context.
    assert next_tokens(entry).tolist() == [6, -1, -1, 10, 11, 12, -1]


def test_a_single_latent_has_a_score_and_no_controls(collected_and_model: tuple[CollectedCodes, Any]):
    scores = OutputScore().values(*collected_and_model, [LATENTS[0]], seed=0)
    assert scores is not None and 0 <= scores.own[0] <= 1
    assert isnan(scores.other_row[0]) and isnan(scores.other_firings[0])
