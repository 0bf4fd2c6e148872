"""Activations of latents on texts are those that transformers and SAELens compute alone; contexts are those of all held-out tokens."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from metasae_lightning.cli import main
from metasae_lightning.data.recipe import data_of
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation import HeldOutContext, Latents, open_latents
from metasae_lightning.evaluation.collect import collect
from metasae_lightning.evaluation.examples import AFTER, BEFORE
from metasae_lightning.evaluation.held_out_text import split_stream
from metasae_lightning.evaluation.saes import load_sae, select_hook
from tests.helpers.judged import HOOK, sae, write_run

QUICK = ["--critic_seeds=0", "--splice_tokens=0", "--resamples=10"]
LATENTS = [17, 3, 30, 3]  # not sorted, and one of them twice
# Of different lengths, not sorted by them, and more than the 8 of a forward pass.
TEXTS = ["The lazy dog", "a", "Tensors of activations", "quick", "fox jumps over", "brown fox", "dog.", "The quick", "row", "a token", "é"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latents")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    path = write_run(folder, "one")
    assert main(["test", str(path), *QUICK]) == 0
    return path


@pytest.fixture(scope="module")
def latents(run: Path) -> Latents:
    return open_latents(run)


def expected(folder: Path, text: str) -> torch.Tensor:
    """Activations of all latents on BOS and each token of a text: transformers' hidden states, and SAELens's encoder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(folder / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        return sae(0).encode(model(ids, output_hidden_states=True).hidden_states[2][0])


def test_activations_are_those_of_transformers_and_saelens_with_zeros_on_bos(latents: Latents, run: Path, folder: Path):
    found = latents.activations(TEXTS, LATENTS)
    assert ["".join(text.tokens) for text in found] == [f"<bos>{text}" for text in TEXTS]
    lengths = [len(text.tokens) for text in found]
    assert len(set(lengths)) > 3 and lengths != sorted(lengths)  # some are padded, and their order is not that of the passes
    fired = 0
    for text, activations in zip(TEXTS, found, strict=True):
        wanted = expected(folder, text)
        assert activations.latents == (17, 3, 30, 3) and activations.is_trained_on.tolist() == [False] + [True] * (len(wanted) - 1)
        assert torch.allclose(activations.activations[1:], wanted[1:, LATENTS], rtol=1e-4, atol=1e-5)
        assert (activations.activations[0] == 0).all()
        fired += int((wanted[1:, LATENTS] > 0).sum())
        assert activations.peaks == {latent: pytest.approx(wanted[1:, latent].max().item(), rel=1e-4) for latent in LATENTS}
    assert fired > 10 and (wanted[0] > 0).any()  # latents do fire on BOS


def test_texts_together_have_the_activations_of_each_alone(latents: Latents):
    for text, together in zip(TEXTS, latents.activations(TEXTS, range(len(latents))), strict=True):
        (alone,) = latents.activations([text], range(len(latents)))
        assert alone.tokens == together.tokens and torch.allclose(alone.activations, together.activations, rtol=1e-4, atol=1e-5)


def test_skipped_positions_and_special_tokens_are_zero_and_marked(folder: Path, run: Path):
    recipe = folder / "skips.yaml"
    recipe.write_text((run / "config.yaml").read_text().replace("tokens: 2048", "skip_positions: 3\n    tokens: 2048"))
    (found,) = open_latents(run, recipe=recipe).activations(["The lazy<eos> dog"], range(48))
    special = found.tokens.index("<eos>")
    assert special > 3
    assert [index for index, is_trained_on in enumerate(found.is_trained_on.tolist()) if not is_trained_on] == [0, 1, 2, special]
    assert (found.activations[~found.is_trained_on] == 0).all() and (found.activations[found.is_trained_on] > 0).any(1).all()


def test_an_sae_of_no_run_is_read_with_the_model_that_its_metadata_name(folder: Path, run: Path, latents: Latents):
    alone = folder / "alone"
    names = {"model_name": str(folder / "model"), "hook_name": HOOK, "hf_hook_name": "model.layers.1"}
    sae(0, **names, dataset_path=str(folder / "text.jsonl"), context_size=16).save_model(alone)
    (found,), (wanted,) = (place.activations(["The lazy dog"], [3]) for place in (open_latents(alone), latents))
    assert found.activations.tolist() == wanted.activations.tolist() and (found.activations > 0).any()


def test_contexts_are_the_tokens_and_activations_of_the_held_out_text(latents: Latents, run: Path):
    subject, data = load_sae(str(run)), data_of(run / "config.yaml")
    select_hook(subject, data)
    data.setup("test")
    (collected,) = collect([subject], split_stream(data, "test", data.test_tokens), data.test_tokens)
    matrices, tokens = list[torch.Tensor](), list[int]()
    for codes, entry in collected.codes():
        matrix = torch.zeros(entry["tokens"].numel(), len(latents))
        matrix[entry["counted"].flatten().nonzero().flatten()[codes.rows], codes.latents] = codes.values
        matrices.append(matrix)
        tokens += entry["tokens"].flatten().tolist()
    acts, decode = torch.cat(matrices), data.language_model.tokenizer.decode
    for latent in range(len(latents)):
        found = latents.contexts(latent)
        assert bool(found) == bool((acts[:, latent] > 0).any())
        peaks = [context.activations[context.at] for context in found]
        assert peaks == sorted(peaks, reverse=True) and peaks[:1] == [pytest.approx(acts[:, latent].max().item(), rel=1e-2)] * bool(found)
        for context in found:
            assert context.position is not None
            span = slice(context.position, context.position + len(context.tokens))
            assert context.text == decode(tokens[span]) and len(context.tokens) <= BEFORE + AFTER + 1
            assert context.activations == pytest.approx(acts[span, latent].tolist(), rel=1e-2)
    assert sum(bool(latents.contexts(latent)) for latent in range(len(latents))) > 30


# Windows that overlap share one text in the record: what the latent does elsewhere in it is not recorded, and zeros would be wrong.
def test_a_context_ends_where_its_activations_are_no_longer_known(latents: Latents, monkeypatch: pytest.MonkeyPatch):
    example = {"text": 0, "at": 100, "quantile": 1.0, "fired": [[100, 2.0], [101, 1.0]]}
    tokens = [f" {number}" for number in range(200)]
    record = {"firings": [1] * 48, "texts": [tokens], "starts": [1000], "examples": {"5": [example]}}
    monkeypatch.setitem(vars(latents), "_record", record)
    (context,) = latents.contexts(5)
    assert context.tokens[0] == " 36" and context.tokens[-1] == " 132" and context.at == 64 and context.position == 1036
    assert [index for index, value in enumerate(context.activations) if value] == [64, 65]


@pytest.mark.parametrize(
    ("texts", "chosen", "message"),
    [
        (["a", ""], [0], r"texts\[1\] is empty"),
        (["a", "\ud800"], [0], r"texts\[1\] holds half of a character"),
        (["a", "a fox " * 30], [0], r"texts\[1\] has \d+ tokens, and the SAEs were trained on contexts of 16"),
        ("a fox", [0], "texts must be a list, got 'a fox': put one text in brackets"),
        (["a"], [0, 48], "latent must be in 0 to 47, got 48"),
        (["a"], [-1], "latent must be in 0 to 47, got -1"),
    ],
)
def test_a_mistake_is_refused(texts: Any, chosen: Any, message: str, latents: Latents):
    with pytest.raises(InputError, match=message):
        latents.activations(texts, chosen)


def test_a_text_that_fills_the_context_is_read_and_no_text_gives_nothing(latents: Latents):
    (found,) = latents.activations(["<eos>" * 15], [0])  # and BOS: 16
    assert len(found.tokens) == 16 and not found.is_trained_on.any()
    with pytest.raises(InputError, match="has 17 tokens"):
        latents.activations(["<eos>" * 16], [0])
    assert latents.activations([], [0]) == [] and latents.activations(["a"], [])[0].activations.shape[1] == 0


@pytest.mark.parametrize("latent", [48, -1])
def test_contexts_of_an_unknown_latent_are_refused(latent: int, latents: Latents):
    with pytest.raises(InputError, match=f"latent must be in 0 to 47, got {latent}"):
        latents.contexts(latent)


def test_a_folder_that_holds_no_sae_is_refused(tmp_path: Path, folder: Path):
    with pytest.raises(InputError, match="is neither a run, which has saes/primary, nor a SAELens folder"):
        open_latents(tmp_path)


def test_contexts_of_an_sae_that_was_not_tested_name_the_command(folder: Path, run: Path, tmp_path: Path):
    untested = write_run(folder, "untested")
    latents = open_latents(untested)
    with pytest.raises(InputError, match=f"untested holds no contexts of latents: measure first, metasae test {untested}$"):
        latents.contexts(0)
    record = json.loads(gzip.decompress((run / "latents.json.gz").read_bytes()))

    def contexts_of(**changes: Any) -> list[HeldOutContext]:
        (tmp_path / "latents.json.gz").write_bytes(gzip.compress(json.dumps({**record, **changes}).encode()))
        return open_latents(untested, out=tmp_path).contexts(3)

    assert contexts_of()  # of the folder of `--out`
    with pytest.raises(InputError, match=f"was measured without texts: metasae test {untested} --contexts 3"):
        contexts_of(examples={})
    with pytest.raises(InputError, match=f"holds contexts of another SAE, of 47 latents: metasae test {untested}"):
        contexts_of(firings=record["firings"][1:])
    with pytest.raises(InputError, match=f"holds contexts of an SAE that has been trained anew since: metasae test {untested}"):
        contexts_of(decoder="of before")
    assert contexts_of(examples={}, firings=[0] * 48) == []
    (tmp_path / "latents.json.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match="is damaged"):
        open_latents(untested, out=tmp_path).contexts(3)


def test_results_print_on_one_line(latents: Latents, run: Path):
    assert repr(latents) == f"Latents({str(run)!r}, 48 latents)" and len(latents) == 48
    (found,) = latents.activations(["a\nfox"], [3])
    assert repr(found) == f"TextActivations('<bos>a\\nfox', peaks {{3: {found.peaks[3]:.3g}}})"
    context = HeldOutContext((" a", " fox", "\n"), (0.0, 2.5, 0.0), 1, 7, 0.5)
    assert repr(context) == "HeldOutContext(' a« fox»\\n', 2.5)" and context.text == " a fox\n"
