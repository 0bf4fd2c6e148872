"""Where latents fire: against looking at every token of every latent, one after another."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from metasae_lightning.cli import main
from metasae_lightning.cli.arguments import data_of
from metasae_lightning.evaluation.evaluate import Evaluation, evaluate
from metasae_lightning.evaluation.saes import load_sae
from metasae_lightning.evaluation.settings import Settings
from metasae_lightning.evaluation.top_contexts import AFTER, BEFORE, Hits, Spelling, latents_record, top_contexts
from tests.evaluation.test_evaluate import QUICK
from tests.helpers.judged import run
from tests.helpers.models import tokenizer


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Any]:
    place = run(tmp_path_factory.mktemp("contexts"), "one")
    data = data_of(place / "config.yaml")
    (found,) = evaluate([load_sae(str(place))], data, Settings(**QUICK))
    return found, data.language_model.tokenizer


def looked_up(found: Evaluation, latent: int) -> list[tuple[float, int, list[int], list[float]]]:
    """Every token that a latent fires on: how strongly, the document, tokens around it in that document, the latent on each of these."""
    hits: list[tuple[float, int, list[int], list[float]]] = []
    for codes, piece in found.collected.codes():
        dense, counted, owner = torch.zeros(codes.shape), piece["counted"].bool(), piece["owner"]
        dense[codes.rows, codes.latents] = codes.values
        acts = torch.zeros(counted.shape)
        acts[counted] = dense[:, latent]
        for context, position in acts.nonzero().tolist():
            around = range(max(0, position - BEFORE), min(acts.shape[1], position + AFTER + 1))
            around = [p for p in around if owner[context, p] == owner[context, position]]
            tokens, values = ([of[context, p].item() for p in around] for of in (piece["tokens"], acts))
            hits.append((acts[context, position].item(), int(owner[context, position]), tokens, values))
    return sorted(hits, key=lambda hit: -hit[0])


def test_contexts_are_the_strongest_of_every_token(measured: tuple[Evaluation, Any]):
    found, spelt = measured
    told = top_contexts(found.collected, range(48), spelt, count=3)
    fired = 0
    for latent, contexts in told.items():
        first: dict[int, tuple[float, int, list[int], list[float]]] = {}
        for hit in looked_up(found, latent):
            first.setdefault(hit[1], hit)
        expected = list(first.values())[:3]
        fired += len(expected)
        assert [context.values[context.at] for context in contexts] == [pytest.approx(hit[0], rel=1e-2) for hit in expected]
        for context, (_, document, tokens, values) in zip(contexts, expected, strict=True):
            assert context.document == document
            assert "".join(context.tokens) == spelt.decode(tokens, clean_up_tokenization_spaces=False)
            assert context.values == pytest.approx(values, rel=1e-2)
            assert f"«{context.tokens[context.at]}»".strip() in context.marked or not context.tokens[context.at].strip()
    assert fired > 60


def test_the_best_hits_are_a_document_each():
    values = np.array([1.0, 5.0, 3.0, 4.0, 2.0, 9.0], dtype=np.float32)
    places = np.array([[7, 0, 0, 0], [7, 1, 0, 1], [7, 1, 0, 2], [7, 2, 1, 0], [7, 3, 1, 1], [2, 9, 0, 0]])
    best = Hits(values, places).best(3)
    assert best.values.tolist() == [9, 5, 4, 2] and best.places[:, 1].tolist() == [9, 1, 2, 3]
    nothing = Hits(values[:0], places[:0]).best(3)
    assert len(nothing.values) == 0


# Bytes of one character are several tokens of a byte-level vocabulary.
def test_a_character_of_several_tokens_is_whole_in_the_last():
    bytewise = tokenizer()
    text = "naïve “日本” 🙂 end"
    tokens = bytewise(text, add_special_tokens=False)["input_ids"]
    pieces = Spelling(bytewise).token_texts(tokens)
    assert len(pieces) == len(tokens) and "".join(pieces) == text and "日" in pieces and "🙂" in pieces
    # Cut within the last character, the rest of the text is as it was.
    cut = Spelling(bytewise).token_texts(tokens[: pieces.index("🙂")])
    assert "".join(cut).startswith("naïve “日本” ") and len(cut) == pieces.index("🙂")


# A vocabulary of pieces drops the space that a text begins with; within a text it is there.
def test_a_token_within_a_text_keeps_its_space():
    pieces = Tokenizer(models.WordLevel({"x": 0, "▁the": 1, "▁cat": 2}, unk_token="x"))
    pieces.decoder = decoders.Metaspace()
    wordwise = PreTrainedTokenizerFast(tokenizer_object=pieces)
    assert wordwise.decode([1]) == "the"
    assert Spelling(wordwise).token_texts([1, 2]) == [" the", " cat"]


def test_the_record_of_latents_counts_every_firing(measured: tuple[Evaluation, Any]):
    found, spelt = measured
    told = latents_record(found.collected, spelt, count=2)
    for latent in range(48):
        hits = looked_up(found, latent)
        assert told["firings"][latent] == len(hits)
        assert told["maximum"][latent] == pytest.approx(hits[0][0] if hits else 0.0, rel=1e-3)
    assert told["tokens"] == found.entry["tokens"] and told["weights"] == found.entry["weights"]
    assert max(len(contexts) for contexts in told["contexts"].values()) == 2
    assert latents_record(found.collected, None)["contexts"] == {} == latents_record(found.collected, spelt, count=0)["contexts"]


def test_measuring_keeps_what_latents_fire_on(tmp_path: Path):
    place = run(tmp_path, "one")
    args = [f"--{name}={value}" for name, value in {**QUICK, "critic_seeds": 0, "splice_tokens": 0}.items()]
    assert main(["test", str(place), "--contexts", "1", *args]) == 0
    told = json.loads(gzip.decompress((place / "latents.json.gz").read_bytes()))
    assert sum(told["firings"]) > 0 and all(len(contexts) == 1 for contexts in told["contexts"].values())
