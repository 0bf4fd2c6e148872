"""Firings and continuations of a typed text are those that SAELens and transformers compute alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace

from metasae_lightning.cli.serve import served_saes
from metasae_lightning.errors import InputError
from metasae_lightning.server.typed_text import MAX_LATENTS, ServedSAEs
from tests.helpers.judged import sae, write_run

TEXT = "The lazy dog"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def served(folder: Path) -> ServedSAEs:
    places = [str(write_run(folder, name, seed=seed)) for seed, name in enumerate(("solo", "joint"))]
    return served_saes(Namespace(places=places, data=None, device=None))


@pytest.fixture(scope="module")
def model(served: ServedSAEs, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model")


def test_the_firings_of_each_sae_are_its_encodings_strongest_first(served: ServedSAEs, model: Any):
    answer, tokens = served.firings(TEXT), served.reader.tokens(TEXT)[None]
    assert "".join(answer["tokens"]) == f"<bos>{TEXT}" and answer["read"] == [False] + [True] * (tokens.shape[1] - 1)
    activations = model(tokens, output_hidden_states=True).hidden_states[2][0].detach()
    assert [arm["name"] for arm in answer["arms"]] == ["solo", "joint"]
    for seed, arm in enumerate(answer["arms"]):
        acts = sae(seed).encode(activations).detach()
        assert arm["firings"][0] == []  # BOS, which the SAEs are not trained on, though latents fire on it
        for row, firings in list(zip(acts, arm["firings"], strict=True))[1:]:
            assert 1 < len(firings) == min(MAX_LATENTS, int((row > 0).sum()))
            assert dict(firings) == pytest.approx({latent: row[latent].item() for latent, _ in firings}, rel=1e-3)
            assert [value for _, value in firings] == sorted((value for _, value in firings), reverse=True)
    assert (sae(0).encode(activations)[0] > 0).any()


def greedy(model: Any, tokens: torch.Tensor, count: int, step: torch.Tensor) -> list[int]:
    """The greedy continuation with `step` added to the output of the second layer, after BOS."""

    def add(_: Any, __: Any, output: Any) -> Any:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        hidden[:, 1:] += step
        return output

    handle = model.model.layers[1].register_forward_hook(add)
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    handle.remove()
    return tokens[0].tolist()


def test_continuations_are_greedy_with_and_without_the_decoder_row(served: ServedSAEs, model: Any):
    tokens = served.reader.tokens("The")[None]
    answer = served.continuations("The", "joint", 1, 8.0, 4)
    row, before = sae(1).W_dec[1].detach(), tokens.shape[1]
    wanted = {"plain": greedy(model, tokens, 4, 0 * row), "steered": greedy(model, tokens, 4, 8 * row)}
    for kind, ids in wanted.items():
        assert answer[kind] == served.model.tokenizer.decode(ids)[len(served.model.tokenizer.decode(ids[:before])) :]
    assert answer["plain"] != answer["steered"] and answer["tokens"] == [4, 4]
    assert served.continuations("The", "joint", 1, 0.0, 4)["steered"] == answer["plain"]
    assert served.continuations("The", "solo", 1, 8.0, 4)["steered"] != answer["steered"]


def test_a_continuation_ends_with_the_context_and_at_the_end_of_the_text(served: ServedSAEs, monkeypatch: pytest.MonkeyPatch):
    room = served.reader.batching.context_size - served.reader.tokens(TEXT)[None].shape[1]
    answer = served.continuations(TEXT, "solo", 0, 1.0, 64)
    assert answer["tokens"] == [room, room]
    following = int(served.model.logits(served.reader.tokens(TEXT)[None])[0, -1].argmax())
    monkeypatch.setattr(type(served.model.tokenizer), "eos_token_id", following, raising=False)
    assert served.continuations(TEXT, "solo", 0, 0.0, 64)["tokens"] == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": ""}, "text is empty"),
        ({"text": "a fox " * 30}, "tokens, and the SAEs were trained on contexts of 16"),
        ({"text": "\ud800"}, "text holds half of a character"),
        ({"arm": "jont"}, "arm: there is no 'jont' .did you mean joint"),
        ({"latent": 48}, "latent must be in 0 to 47, got 48"),
        ({"latent": -1}, "latent must be in 0 to 47, got -1"),
        ({"strength": float("nan")}, "strength must be in -1e.06 to 1e.06, got nan"),
        ({"strength": -1e7}, "strength must be"),
        ({"count": 0}, "count must be in 1 to 64, got 0"),
        ({"count": 65}, "count must be"),
    ],
)
def test_a_mistake_is_refused(arguments: dict[str, Any], message: str, served: ServedSAEs):
    with pytest.raises(InputError, match=message):
        served.continuations(**{"text": TEXT, "arm": "joint", "latent": 0, "strength": 1.0, "count": 2, **arguments})


def test_a_text_that_fills_the_context_is_read_but_not_continued(served: ServedSAEs):
    text = "fox" * 40
    ids = served.model.tokenizer(text, add_special_tokens=False)["input_ids"][:15]
    text = served.model.tokenizer.decode(ids)
    assert len(served.firings(text)["tokens"]) == 16
    with pytest.raises(InputError, match="text fills the context of 16 tokens"):
        served.continuations(text, "solo", 0, 1.0, 1)
