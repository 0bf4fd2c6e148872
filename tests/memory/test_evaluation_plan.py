"""The memory plan of an evaluation: before the language model is loaded, and checked against the limit."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metasae_lightning.cli import main, measure
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.saes import EvaluatedSAE
from metasae_lightning.memory.evaluation_plan import measure_items, print_and_check_evaluation_plan


class SAE(torch.nn.Module):
    def __init__(self, latents: int) -> None:
        super().__init__()
        self.W_dec = torch.nn.Parameter(torch.zeros(latents, 16))


def test_the_items_are_the_saes_the_widests_pairs_and_its_critic():
    items = {item.name: item.bytes for item in measure_items([SAE(64), SAE(128)], "cpu", 2.0, critics=True)}
    critic = 4 * (3 * 128 * 16 + 4 * (2 * 32 * 16 + 32 + 16))
    assert items == {"SAEs": 192 * 16 * 4, "pairs of latents": 128 * 128 * 64, "a critic": critic}
    tiled = {item.name: item.bytes for item in measure_items([SAE(128)], "cpu", 10 * 128 * 64 / 2**30, critics=False)}
    assert tiled == {"SAEs": 128 * 16 * 4, "pairs of latents": 10 * 128 * 64}


@pytest.mark.parametrize(("limit", "says"), [(1e-6, "memory: the run needs"), (0.0, "memory_gib must be more than 0"), (1e6, "")])
def test_a_plan_is_printed_or_refused_in_one_line(limit: float, says: str, capsys: pytest.CaptureFixture[str]):
    options: dict[str, Any] = {"pairs_gib": 2.0, "critics": True, "splices": True, "limit_gib": limit}
    if says:
        with pytest.raises(InputError, match=f"^{says}"):
            print_and_check_evaluation_plan([SAE(64)], SimpleNamespace(), **options)
    else:
        print_and_check_evaluation_plan([SAE(64)], SimpleNamespace(), **options)
    assert ("pairs of latents" in capsys.readouterr().err) == (not says)


@pytest.mark.parametrize("words", [["test", "a"], ["compare", "a", "b"]])
def test_the_plan_comes_before_the_measures(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def evaluate(*_: Any) -> None:
        raise InputError("measured")

    monkeypatch.setattr(measure, "open_saes", lambda *_: [EvaluatedSAE("a", "a", Path(), SAE(64))])
    monkeypatch.setattr(measure, "check_same_data", lambda *_: None)
    monkeypatch.setattr(measure, "data_for", lambda *_: SimpleNamespace())
    monkeypatch.setattr(measure, "evaluate", evaluate)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "pairs of latents" in error and error.endswith("metasae: error: measured\n")
    assert main([*words, "--memory_gib", "0.000001"]) == 2
    assert capsys.readouterr().err.startswith("metasae: error: memory: the run needs")
