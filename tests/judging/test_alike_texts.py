"""What a judge is shown beside the concept: neither the places of marks nor the lengths of texts tell where a latent fires."""

import numpy as np
import pytest
import torch

from metasae_lightning.judging.judges.questions import Question
from metasae_lightning.judging.scoring import formulas
from metasae_lightning.judging.scoring.score_kinds import generator_for
from metasae_lightning.judging.scoring.scores import SCORES
from metasae_lightning.judging.texts.contexts import LatentContexts
from metasae_lightning.judging.texts.draw import draw_contexts
from metasae_lightning.judging.texts.flat_text import FlatText
from tests.judging.texts import HandMade, piece_tokenizer

# Latents that fire at random places: nothing in a text tells where.
SHARES = (0.005, 0.02, 0.1, 0.2)


def texts() -> list[str]:
    generator = np.random.default_rng(0)
    words = [f"{a}{b}" for a in "bcdfgklm" for b in ("arel", "onit", "upas", "edor")]
    return [" ".join(generator.choice(words, int(generator.integers(12, 90))).tolist()) + f" {number}." for number in range(400)]


@pytest.fixture(scope="module")
def contexts() -> list[LatentContexts]:
    documents = texts()
    shares = torch.tensor([share for share in SHARES for _ in range(10)])
    generator = torch.Generator().manual_seed(0)

    def codes(_: int, tokens: list[str]) -> torch.Tensor:
        chosen = torch.rand(len(tokens), len(shares), generator=generator) < shares
        return chosen * (0.1 + torch.rand(chosen.shape, generator=generator))

    made = HandMade(documents, codes, tokenizer=piece_tokenizer(documents))
    text = FlatText.of(made, made.tokenizer)
    drawn = draw_contexts(made, range(len(shares)), text=text, W_dec=torch.eye(len(shares)))
    assert len(drawn.latents) >= 35
    return drawn.latents


def test_the_length_of_a_text_does_not_tell(contexts: list[LatentContexts]):
    for share, group in zip(SHARES, np.array_split(np.arange(len(contexts)), len(SHARES)), strict=True):
        of_group = [contexts[index] for index in group.tolist()]
        firing, silent = ([len(one.tokens) for each in of_group for one in getattr(each, kind)] for kind in ("firing", "silent"))
        # 100 of each: the standard error of an AUC by chance is 0.04. Words are not cut, so that lengths differ by a few tokens.
        assert abs(formulas.auc(firing, silent) - 0.5) < 0.12, share


@pytest.mark.parametrize("name", ["fuzzing", "intruder"])
def test_the_places_of_marks_do_not_tell(name: str, contexts: list[LatentContexts]):
    def place(question: Question, text: int) -> int:
        marked = question.texts[text].marked
        return len(marked) - max(index for index, mark in enumerate(marked) if mark)

    right, chance = 0.0, SCORES[name].chance
    for one in contexts:
        asked = SCORES[name].questions(one, "an explanation", generator_for(0, score=name, latent=one.latent))
        if name == "fuzzing":
            by_truth = [
                [float(place(question, 0) == 8) for question, truth in zip(asked.questions, asked.truths, strict=True) if truth == wanted]
                for wanted in (1, 0)
            ]
            right += formulas.auc(*by_truth)
        else:
            # The text whose last mark stands farthest from the others'.
            guesses = [
                int(
                    np.argmax([abs(place(question, text) - np.median([place(question, other) for other in range(5)])) for text in range(5)])
                )
                for question in asked.questions
            ]
            right += float(np.mean([guess == truth for guess, truth in zip(guesses, asked.truths, strict=True)]))
    # With random marks this judge had 0.8 of fuzzing and more than 0.5 of intruder.
    assert abs(right / len(contexts) - chance) < 0.1
