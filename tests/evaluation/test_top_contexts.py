"""Top contexts: equal to a search through every token of every latent; token texts; the record of latents."""

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
from metasae_lightning.data.recipe import data_of
from metasae_lightning.evaluation.evaluate import Evaluation, evaluate
from metasae_lightning.evaluation.latents_record import latents_record
from metasae_lightning.evaluation.saes import load_sae
from metasae_lightning.evaluation.settings import Settings
from metasae_lightning.evaluation.strongest_hits import Hits
from metasae_lightning.evaluation.top_contexts import AFTER, BEFORE, Spelling, top_contexts
from tests.evaluation.test_evaluate import QUICK
from tests.helpers.judged import write_run
from tests.helpers.models import tokenizer


@pytest.fixture(scope="module")
def evaluation_and_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Any]:
    run_folder = write_run(tmp_path_factory.mktemp("contexts"), "one")
    data = data_of(run_folder / "config.yaml")
    (evaluation,) = evaluate([load_sae(str(run_folder))], data, Settings(**QUICK))
    return evaluation, data.language_model.tokenizer


def every_hit(evaluation: Evaluation, latent: int) -> list[tuple[float, int, list[int], list[float]]]:
    """Every firing of a latent, strongest first: activation, document, tokens around it, the latent's activations on these."""
    hits: list[tuple[float, int, list[int], list[float]]] = []
    for codes, entry in evaluation.collected.codes():
        dense, counted, owner = torch.zeros(codes.shape), entry["counted"].bool(), entry["owner"]
        dense[codes.rows, codes.latents] = codes.values
        acts = torch.zeros(counted.shape)
        acts[counted] = dense[:, latent]
        for context, position in acts.nonzero().tolist():
            around = range(max(0, position - BEFORE), min(acts.shape[1], position + AFTER + 1))
            around = [p for p in around if owner[context, p] == owner[context, position]]
            tokens, values = ([of[context, p].item() for p in around] for of in (entry["tokens"], acts))
            hits.append((acts[context, position].item(), int(owner[context, position]), tokens, values))
    return sorted(hits, key=lambda hit: -hit[0])


def test_top_contexts_equal_the_strongest_hits_of_a_full_search(evaluation_and_tokenizer: tuple[Evaluation, Any]):
    evaluation, tokenizer_of_model = evaluation_and_tokenizer
    contexts_by_latent = top_contexts(evaluation.collected, range(48), tokenizer_of_model, count=3)
    n_expected = 0
    for latent, contexts in contexts_by_latent.items():
        best_by_document: dict[int, tuple[float, int, list[int], list[float]]] = {}
        for hit in every_hit(evaluation, latent):
            best_by_document.setdefault(hit[1], hit)
        expected = list(best_by_document.values())[:3]
        n_expected += len(expected)
        assert [context.values[context.at] for context in contexts] == [pytest.approx(hit[0], rel=1e-2) for hit in expected]
        for context, (_, document, tokens, values) in zip(contexts, expected, strict=True):
            assert context.document == document
            assert "".join(context.tokens) == tokenizer_of_model.decode(tokens, clean_up_tokenization_spaces=False)
            assert context.values == pytest.approx(values, rel=1e-2)
            assert f"«{context.tokens[context.at]}»".strip() in context.marked or not context.tokens[context.at].strip()
    assert n_expected > 60


def test_best_hits_of_a_latent_are_from_different_documents():
    values = np.array([1.0, 5.0, 3.0, 4.0, 2.0, 9.0], dtype=np.float32)
    places = np.array([[7, 0, 0, 0], [7, 1, 0, 1], [7, 1, 0, 2], [7, 2, 1, 0], [7, 3, 1, 1], [2, 9, 0, 0]])
    best = Hits(values, places).best(3)
    assert best.values.tolist() == [9, 5, 4, 2] and best.places[:, 1].tolist() == [9, 1, 2, 3]
    no_hits = Hits(values[:0], places[:0]).best(3)
    assert len(no_hits.values) == 0


# In a byte-level vocabulary the bytes of one character can be several tokens.
def test_a_character_split_over_several_tokens_is_shown_in_the_last_of_them():
    byte_level = tokenizer()
    text = "naïve “日本” 🙂 end"
    tokens = byte_level(text, add_special_tokens=False)["input_ids"]
    token_texts = Spelling(byte_level).token_texts(tokens)
    assert len(token_texts) == len(tokens) and "".join(token_texts) == text and "日" in token_texts and "🙂" in token_texts
    # A cut inside the last character leaves the text before it unchanged.
    cut_texts = Spelling(byte_level).token_texts(tokens[: token_texts.index("🙂")])
    assert "".join(cut_texts).startswith("naïve “日本” ") and len(cut_texts) == token_texts.index("🙂")


# A Metaspace decoder drops the leading space of a text; token texts must keep it.
def test_token_texts_keep_leading_spaces_that_decode_drops():
    word_level = Tokenizer(models.WordLevel({"x": 0, "▁the": 1, "▁cat": 2}, unk_token="x"))
    word_level.decoder = decoders.Metaspace()
    fast_tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_level)
    assert fast_tokenizer.decode([1]) == "the"
    assert Spelling(fast_tokenizer).token_texts([1, 2]) == [" the", " cat"]


def test_latents_record_has_the_firings_and_maximum_of_a_full_search(evaluation_and_tokenizer: tuple[Evaluation, Any]):
    evaluation, tokenizer_of_model = evaluation_and_tokenizer
    record = latents_record(evaluation.collected, tokenizer_of_model, count=2)
    for latent in range(48):
        hits = every_hit(evaluation, latent)
        assert record["firings"][latent] == len(hits)
        assert record["maximum"][latent] == pytest.approx(hits[0][0] if hits else 0.0, rel=1e-3)
    assert record["tokens"] == evaluation.entry["tokens"] and record["weights"] == evaluation.entry["weights"]
    assert max(len(contexts) for contexts in record["contexts"].values()) == 2
    for without_text in (latents_record(evaluation.collected, None), latents_record(evaluation.collected, tokenizer_of_model, count=0)):
        assert without_text["contexts"] == {} and "examples" not in without_text


def test_the_test_command_writes_latents_json_gz(tmp_path: Path):
    run_folder = write_run(tmp_path, "one")
    args = [f"--{name}={value}" for name, value in {**QUICK, "critic_seeds": 0, "splice_tokens": 0}.items()]
    assert main(["test", str(run_folder), "--contexts", "1", *args]) == 0
    record = json.loads(gzip.decompress((run_folder / "latents.json.gz").read_bytes()))
    assert sum(record["firings"]) > 0 and all(len(contexts) == 1 for contexts in record["contexts"].values())
