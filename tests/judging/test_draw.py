"""Drawn contexts: disjoint documents, quantiles, silence, borders, special tokens; compared with dense activations."""

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from metasae_lightning.judging.texts.contexts import Context, LatentContexts
from metasae_lightning.judging.texts.draw import DrawnContexts, draw_contexts
from metasae_lightning.judging.texts.flat_text import FlatText, document_counts, group_by_text
from metasae_lightning.judging.texts.windows import ContextSettings
from tests.judging.texts import END, LENGTH, HandMade, piece_tokenizer

WORDS = ["alpha", "beta", "gamma", "delta", "something", "wonderful", "of", "the", "tensor", "activation", "sparse", "code", "running"]
D_SAE = 12
W_DEC = torch.randn(D_SAE, 8, generator=torch.Generator().manual_seed(3))
# Latents: 0 to 7 fire at random, 8 in one document, 9 on every token, 10 never, 11 with 0.
SETTINGS = ContextSettings(before=12, after=4)


def texts(count: int = 160, *, copies: int = 3) -> list[str]:
    """Random texts; the last `copies` are equal to the first."""
    generator = random.Random(0)
    made = [" ".join(generator.choices(WORDS, k=generator.randint(30, 60))) + f" {number}." for number in range(count)]
    return made + made[:copies]


def activations(document: int, tokens: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(document)
    acts = torch.rand(len(tokens), D_SAE, generator=generator)
    acts = torch.where(torch.rand(len(tokens), D_SAE, generator=generator) < 0.04, acts + 0.01, torch.zeros(()))
    acts[:, 8] *= document == 5
    acts[:, 9], acts[:, 10] = 1.0, 0.0
    return acts


@pytest.fixture(scope="module")
def collected() -> HandMade:
    return HandMade(texts(), activations, tokenizer=piece_tokenizer(texts()))


@pytest.fixture(scope="module")
def text(collected: HandMade) -> FlatText:
    return FlatText.of(collected, collected.tokenizer)


@pytest.fixture(scope="module")
def drawn(collected: HandMade, text: FlatText) -> DrawnContexts:
    return draw_contexts(collected, range(D_SAE), text=text, W_dec=W_DEC, settings=SETTINGS)


def all_contexts(contexts: LatentContexts) -> list[Context]:
    return [*contexts.explaining, *contexts.firing, *contexts.silent, *contexts.near]


def places(collected: HandMade, context: Context) -> Iterator[int]:
    """Positions in the text where the context's document has its tokens."""
    of_document = (collected.owner.flatten() == context.document).nonzero().flatten().tolist()
    ids = collected.tokens.flatten()[of_document].tolist()
    spelled = dict(zip(of_document, collected.tokenizer.convert_ids_to_tokens(ids), strict=True))
    for start in of_document:
        window = range(start, start + len(context.tokens))
        same_context = window[0] // LENGTH == window[-1] // LENGTH
        if window[-1] <= of_document[-1] and same_context and tuple(spelled[place] for place in window) == context.tokens:
            yield start


def test_latents_with_too_few_documents_are_left_out_by_reason(drawn: DrawnContexts):
    assert [contexts.latent for contexts in drawn.latents] == [0, 1, 2, 3, 4, 5, 6, 7, 11]
    few = "fires in too few documents for explanations"
    assert drawn.left_out == {8: few, 9: "is silent in too few documents", 10: few}


# The dense activations of the tokens of a context, found again in the text by their spelling, are the context's activations.
def test_activations_are_those_of_the_dense_codes(collected: HandMade, drawn: DrawnContexts):
    n_contexts = 0
    for contexts in drawn.latents:
        for context in all_contexts(contexts):
            found = [collected.dense[start : start + len(context.tokens), contexts.latent] for start in places(collected, context)]
            assert any(torch.allclose(acts, torch.tensor(context.activations)) for acts in found)
            n_contexts += 1
    assert n_contexts == 9 * 35


def test_silent_and_near_contexts_are_silent_and_in_near_ones_the_nearest_latent_fires(collected: HandMade, drawn: DrawnContexts):
    directions = torch.nn.functional.normalize(W_DEC, dim=1)
    cosines = (directions @ directions.T).fill_diagonal_(-2)
    cosines[:, 10] = -2  # this latent never fires
    for contexts in drawn.latents:
        assert contexts.nearest == int(cosines[contexts.latent].argmax())
        assert all(context.peak == 0 for context in [*contexts.silent, *contexts.near])
        assert all(context.peak > 0 for context in [*contexts.explaining, *contexts.firing])
        for context in contexts.near:
            found = [collected.dense[start : start + len(context.tokens), contexts.nearest] for start in places(collected, context)]
            assert any(torch.allclose(acts, torch.tensor(context.nearest_activations)) and acts.max() > 0 for acts in found)


def test_documents_for_explanations_and_scores_are_disjoint_and_give_one_context_each(text: FlatText, drawn: DrawnContexts):
    group_of = dict(zip(text.document.tolist(), text.group.tolist(), strict=True))
    explaining = {group_of[c.document] for contexts in drawn.latents for c in contexts.explaining}
    scoring = {group_of[c.document] for contexts in drawn.latents for c in [*contexts.firing, *contexts.silent, *contexts.near]}
    assert not explaining & scoring and len(explaining) > 50 and len(scoring) > 50
    for contexts in drawn.latents:
        groups = [group_of[c.document] for c in all_contexts(contexts)]
        assert len(groups) == len(set(groups)) and len({c.tokens for c in all_contexts(contexts)}) == len(groups)


def test_documents_of_equal_text_are_one_document(text: FlatText):
    group_of = dict(zip(text.document.tolist(), text.group.tolist(), strict=True))
    assert [group_of[160], group_of[161]] == [group_of[0], group_of[1]]
    assert len({group_of[document] for document in range(160)}) == 160
    # The separator of a document that is cut is not part of its text; another token is.
    assert group_by_text(np.array([4, 5, 9, 4, 9, 5]), np.array([0, 0, 0, 1, 1, 1]), frozenset({9}))[0].tolist() == [0] * 6
    assert group_by_text(np.array([4, 5, 9, 4, 9, 5]), np.array([0, 0, 0, 1, 1, 1]), frozenset())[0].tolist() == [0] * 3 + [1] * 3


def drawn_of_eleventh_tokens(documents: list[str]) -> tuple[HandMade, FlatText, DrawnContexts]:
    """What is drawn of a latent that fires on the eleventh token of each document."""
    made = HandMade(documents, lambda _, tokens: torch.eye(len(tokens))[:, 10], tokenizer=piece_tokenizer(texts()))
    text = FlatText.of(made, made.tokenizer)
    return made, text, draw_contexts(made, [0], text=text, W_dec=torch.eye(1), settings=replace(SETTINGS, fewest=1))


# A latent that fires in all copies of one text has one document, in which it cannot be both explained and scored.
def test_copies_of_a_document_do_not_leak():
    made, text, of_copies = drawn_of_eleventh_tokens([texts()[0]] * 40)
    # 40 copies fill an exact number of contexts; else the last one is another text.
    assert made.owner[-1, -1] == 39 and made.tokens[-1, -1] == made.tokenizer.eos_token_id
    _, explaining, scoring = document_counts(made, text)
    assert len(text.hashes) == 1 and explaining + scoring == 1 and not of_copies.latents
    _, _, of_different = drawn_of_eleventh_tokens(texts()[:40])
    assert len(of_different.latents[0].explaining) == len(of_different.latents[0].firing) == 10


# Documents that begin with the same text are different, but their windows around the eleventh token are equal, except where a context ends.
def test_equal_windows_of_different_documents_do_not_leak():
    _, text, of_beginnings = drawn_of_eleventh_tokens([f"{texts()[0]} {number}." for number in range(40)])
    (contexts,) = of_beginnings.latents
    shown = [context.tokens for context in [*contexts.explaining, *contexts.firing]]
    assert len(text.hashes) >= 39 and len(shown) == len(set(shown)) < 20


# Five bins with equal numbers of firings: of ten firing contexts, two are from each.
def test_firing_contexts_are_from_all_quantiles(collected: HandMade, drawn: DrawnContexts):
    for contexts in drawn.latents:
        acts = collected.dense[:, contexts.latent].numpy()
        edges = np.quantile(acts[acts > 0], [0.2, 0.4, 0.6, 0.8])
        bins = np.searchsorted(edges, [context.peak for context in contexts.firing], side="right")
        assert np.bincount(bins, minlength=5).tolist() == [2] * 5
        peaks = [context.peak for context in contexts.explaining]
        assert peaks == sorted(peaks, reverse=True) and np.searchsorted(edges, peaks, side="right").min() == 0


def test_a_third_of_the_explaining_contexts_are_the_strongest(collected: HandMade, text: FlatText, drawn: DrawnContexts):
    is_explaining = text.is_explaining(0)[text.group]
    for contexts in drawn.latents:
        acts = collected.dense[:, contexts.latent].numpy()
        by_group = np.zeros(len(text.hashes))
        np.maximum.at(by_group, text.group[is_explaining], acts[is_explaining])
        strongest = sorted(by_group.tolist(), reverse=True)[:3]
        assert [context.peak for context in contexts.explaining][:3] == pytest.approx(strongest)


def test_a_latent_drawn_alone_is_as_among_many_and_another_seed_draws_others(collected: HandMade, text: FlatText, drawn: DrawnContexts):
    alone = draw_contexts(collected, [4], text=text, W_dec=W_DEC, settings=SETTINGS)
    assert alone.latents == [contexts for contexts in drawn.latents if contexts.latent == 4]
    other = draw_contexts(collected, [4], text=text, W_dec=W_DEC, settings=replace(SETTINGS, seed=1))
    assert other.latents[0].firing != alone.latents[0].firing
    assert (text.is_explaining(0) != text.is_explaining(1)).any()


# The split of a document depends on its text and the seed, not on the documents around it.
def test_the_split_of_a_document_does_not_depend_on_the_others(text: FlatText):
    fewer = HandMade(texts()[40:], lambda document, tokens: activations(document + 40, tokens), tokenizer=piece_tokenizer(texts()))
    other = FlatText.of(fewer, fewer.tokenizer)
    halves = dict(zip(text.hashes, text.is_explaining(0).tolist(), strict=True))
    shared = [(halves[h], half) for h, half in zip(other.hashes, other.is_explaining(0).tolist(), strict=True) if h in halves]
    assert len(shared) > 100 and all(a == b for a, b in shared)
    assert 0.35 < text.is_explaining(0).mean() < 0.65


def test_windows_end_at_borders_and_between_words(text: FlatText):
    positions = np.arange(len(text.tokens))
    start, stop = text.windows(positions, 12, 4)
    spelled = [text.spelling.token_texts([token])[0] for token in text.tokens.tolist()]
    for position, begin, end in zip(positions.tolist(), start.tolist(), stop.tolist(), strict=True):
        assert begin <= position < end and end - begin <= 17
        assert len({place // LENGTH for place in (begin, end - 1)}) == 1 and len(set(text.document[begin:end].tolist())) == 1
        left = begin % LENGTH and text.document[begin - 1] == text.document[begin]
        cut = left and spelled[begin - 1][-1].isalpha() and spelled[begin][0].isalpha()
        assert not cut
        # No word has more than three pieces, so nothing more than two tokens is left out of a window inside its segment.
        assert not left or position - begin >= 10
    middle = (start > text.begins) & (stop < text.ends)
    assert set((positions - start)[middle].tolist()) == {10, 11, 12} and (stop - positions)[middle].min() >= 1


def test_a_special_token_is_shown_by_its_name(collected: HandMade, text: FlatText, drawn: DrawnContexts):
    end = collected.tokenizer.eos_token_id
    assert collected.tokenizer.decode([end]) == "" and text.spelling.token_texts([end]) == [END]
    shown = [token for contexts in drawn.latents for context in all_contexts(contexts) for token in context.tokens]
    assert END in shown and "" not in shown


# Counted in a dense matrix, document by document.
def test_document_counts_equal_those_of_the_dense_codes(collected: HandMade, text: FlatText):
    density, explaining, scoring = document_counts(collected, text)
    fires = torch.zeros(len(text.hashes), D_SAE)
    fires.index_add_(0, torch.from_numpy(text.group), (collected.dense > 0).float())
    half = torch.from_numpy(text.is_explaining(0))
    assert torch.equal(explaining, (fires[half] > 0).sum(0)) and torch.equal(scoring, (fires[~half] > 0).sum(0))
    assert torch.allclose(density, (collected.dense > 0).sum(0).double() / collected.counted.sum())
