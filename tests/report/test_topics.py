"""Latents of planted topics are merged into these topics, their words are coherent in other texts, and shuffled words are not."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metasae_lightning.cli import main
from metasae_lightning.report.topics import FEWEST_TEXTS, NEAR, Topics, coherence, merge_latents, word_weights, words_of_like_frequency
from tests.helpers.planted_text import TOPICS, documents

WORDS = [word for topic in TOPICS for word in topic]
EXAMPLES = 10


def record(texts: list[list[str]], examples_of: list[list[str]] | None = None) -> dict[str, Any]:
    """The record of a latent for each planted word: it fires on the word, in up to ten texts. `examples_of` is the text it fires in."""
    generator = np.random.default_rng(1)
    examples: dict[str, list[dict[str, Any]]] = {}
    for latent, word in enumerate(WORDS):
        holding = [number for number, text in enumerate(examples_of or texts) if word in text]
        chosen = generator.permutation(holding)[:EXAMPLES].tolist()
        places = [(text, (examples_of or texts)[text].index(word)) for text in chosen]
        strengths = generator.uniform(0.5, 1, len(places)).tolist()
        examples[str(latent)] = [
            {"text": text, "at": at, "quantile": 1.0, "fired": [[at, strength]]}
            for (text, at), strength in zip(places, strengths, strict=True)
        ]
    tokens = [[f" {word}" for word in text] for text in texts]
    return {"texts": tokens, "starts": list(range(0, 1000 * len(texts), 1000)), "examples": examples}


@pytest.fixture(scope="module")
def texts() -> list[list[str]]:
    return [document.split() for document in documents()]


def shuffled(texts: list[list[str]]) -> list[list[str]]:
    """The same words, each in a random text; the lengths of the texts stay."""
    words = np.random.default_rng(2).permutation([word for text in texts for word in text]).tolist()
    return [[words.pop() for _ in text] for text in texts]


def merged(record: dict[str, Any], count: int) -> Topics:
    found = merge_latents(record, count)
    assert isinstance(found, Topics), found
    return found


def test_planted_topics_are_recovered_with_their_latents_and_words(texts: list[list[str]]):
    found = merged(record(texts), 4)
    # Latents 0 to 5 are of the first planted topic, 6 to 11 of the second.
    assert sorted(sorted(topic.latents) for topic in found.topics) == [list(range(begin, begin + 6)) for begin in (0, 6, 12, 18)]
    for topic in found.topics:
        # The six words that were planted together come first, before the common words.
        assert set(topic.words[:6]) == set(TOPICS[topic.latents[0] // 6]) and len(topic.words) == 10
    assert found.texts == 200 and found.left_out == 0


def test_planted_words_are_coherent_in_other_texts_and_shuffled_words_are_not(texts: list[list[str]]):
    found, control = merged(record(texts), 4), merged(record(shuffled(texts)), 4)
    assert found.coherence > found.chance + 0.2 and all(topic.coherence > topic.chance + 0.1 for topic in found.topics)
    assert abs(control.coherence - control.chance) < 0.08
    # More topics than were planted share words.
    assert found.diversity > 0.9 > merged(record(texts), 16).diversity


def test_coherence_is_that_of_texts_that_the_topics_were_not_made_from(texts: list[list[str]]):
    other = [*texts[:200], *shuffled(texts[200:])]
    found, of_other = (merged(record(part, texts), 4) for part in (texts, other))
    assert [topic.words for topic in found.topics] == [topic.words for topic in of_other.topics]
    assert abs(of_other.coherence - of_other.chance) < 0.08 < found.coherence - found.chance


def test_activations_weight_the_words_of_a_text():
    # One latent in two texts, with activations 3 and 1: p = 3/4 and 1/4 for their words, q = 1/2 each.
    weights = word_weights(np.array([[3.0, 1.0]]), np.array([[1, 0], [0, 1]]))
    assert weights.tolist() == [[pytest.approx(0.75 * np.log(1.5)), 0.0]]


def test_words_by_chance_are_others_of_near_frequency():
    generator = np.random.default_rng(0)
    for words in ([50, 51, 52], [0, 1, 99]):
        for _ in range(100):
            drawn = words_of_like_frequency(words, 100, generator)
            assert len(set(drawn)) == len(words) and not set(drawn) & set(words) and 0 <= min(drawn) <= max(drawn) < 100
            assert all(abs(other - word) <= NEAR for word, other in zip(words, drawn, strict=True))


def test_coherence_is_the_formula_restated():
    present = np.random.default_rng(0).random((50, 5)) < [0.5, 0.4, 0.3, 0.6, 0.2]
    values: list[float] = []
    for first in range(5):
        for second in range(first + 1, 5):
            both, one, two = (present[:, first] & present[:, second]).mean(), present[:, first].mean(), present[:, second].mean()
            values.append(np.log(both / one / two) / -np.log(both) if both else -1.0)
    from scipy import sparse

    assert coherence(sparse.csr_matrix(present), range(5)) == pytest.approx(np.mean(values), abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: None, "no texts of latents are stored"),
        (lambda record: {**record, "examples": {}}, "no texts of latents are stored"),
        (lambda record: {**record, "texts": record["texts"][:4]}, f"only 0 words are in {FEWEST_TEXTS} or more of 2 stored texts"),
        (lambda record: {**record, "examples": {"3": record["examples"]["3"]}}, "only 1 latents fire in texts with words"),
    ],
)
def test_missing_texts_words_and_latents_are_named(texts: list[list[str]], change: Any, message: str):
    found = merge_latents(change(record(texts)), 4)
    assert isinstance(found, str) and found.startswith(message)


def write_run(folder: Path, latents: dict[str, Any]) -> Path:
    """The folder of a run of one SAE that was evaluated, with the record of its latents."""
    folder.mkdir()
    (folder / "config.yaml").write_text("model: {init_args: {seed: 0}}")
    (folder / "evaluation.json").write_text(json.dumps({"validation": {"tokens": 1}}))
    firings = {"firings": [EXAMPLES] * len(WORDS), "maximum": [1.0] * len(WORDS), "tokens": 24_000}
    (folder / "latents.json.gz").write_bytes(gzip.compress(json.dumps({**firings, **latents}).encode()))
    return folder


def test_the_command_prints_topics_and_the_page_and_the_table_have_them(
    texts: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    hostile = [[word.replace("tensor", "tensor<b>") for word in text] for text in texts]
    run = write_run(tmp_path / "run", record(hostile, texts))
    assert main(["report", str(run)]) == 0
    without = (run / "report.html").read_text()
    assert "<h2>Topics</h2>" not in without and "topics" not in json.loads((run / "report" / "table.json").read_text())
    capsys.readouterr()
    assert main(["report", str(run), "--topics", "4"]) == 0
    stored = json.loads((run / "report" / "table.json").read_text())["topics"]["run"]
    assert {frozenset(topic["words"][:6]) for topic in stored["topics"]} == {frozenset(topic) for topic in TOPICS}
    output, page = " ".join(capsys.readouterr().out.split()), (run / "report.html").read_text()
    assert f"Coherence {stored['coherence']:.3f}, of words of like frequency {stored['chance']:.3f}" in output
    assert "<h2>Topics</h2>" in page and "tensor<b>" not in page
    for topic in stored["topics"]:
        assert " ".join(topic["words"]) in page and topic["words"][0] in output
        assert f'href="#latent/run/{topic["latents"][0]}"' in page


def test_mistakes_and_missing_texts_are_one_line(texts: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run", {"examples": {}, "texts": [], "starts": []})
    assert main(["report", str(run), "--topics", "1"]) == 2
    assert capsys.readouterr().err.strip().endswith("--topics must be at least 2, got 1")
    assert main(["report", str(run), "--topics", "4"]) == 0
    assert "run: no 4 topics: no texts of latents are stored (metasae test" in capsys.readouterr().out
