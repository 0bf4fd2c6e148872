"""The examples run and print the values that their docstrings describe."""

import importlib
import re
from pathlib import Path

import pytest

from metasae_lightning.cli import main

ROOT = Path(__file__).parents[2]
SMALL = {"tokens": 2048, "batch_size": 256, "buffer_size": 1024, "validation_tokens": 512, "forward_batch": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short joint run of the quickstart's recipe on the embedded language model."""
    folder = tmp_path_factory.mktemp("examples") / "run"
    flags = [f"--data.init_args.{name}={value}" for name, value in SMALL.items()]
    assert main(["fit", "-c", "quickstart", "-c", "joint", "--run", str(folder), *flags]) == 0
    return folder


def example(name: str, *args: str | Path) -> None:
    importlib.import_module(f"examples.{name}").main([str(arg) for arg in args])


def test_the_latents_of_a_word_are_listed_with_the_meta_latents_of_the_strongest(run: Path, capsys: pytest.CaptureFixture[str]):
    example("latents_of_a_word", run, "--text", "The capital of France is Paris", "--word", "Paris", "--count", "3")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "latents that fire on 'Paris':"
    values = [float(match[1]) for line in lines if (match := re.fullmatch(r"  latent \d+: ([\d.]+)", line))]
    assert 1 <= len(values) <= 3 and values == sorted(values, reverse=True)
    assert any(re.match(r"  meta-latent \d+: [\d.]+, shared with latents \[\d+", line) for line in lines)


def test_a_word_that_is_not_in_the_text_is_named_in_the_error(run: Path):
    with pytest.raises(SystemExit, match="no token of the text is part of 'Rome'"):
        example("latents_of_a_word", run, "--word", "Rome")


@pytest.mark.parametrize("name", ["latents_of_a_word", "steer"])
def test_a_folder_without_saes_is_an_error_of_one_line(name: str, tmp_path: Path):
    with pytest.raises(SystemExit, match=r"has no folder saes/primary: .*arms/joint"):
        example(name, tmp_path)


def test_steering_changes_the_next_token_and_strength_zero_does_not(run: Path, capsys: pytest.CaptureFixture[str]):
    divergences: list[float] = []
    for strength in ("20", "0"):
        example("steer", run, "--latent", "7", "--strength", strength)
        divergences.append(float(re.search(r"KL divergence of the next token: (\S+)", capsys.readouterr().out)[1]))  # type: ignore[index]
    assert divergences[0] > 0.1
    assert abs(divergences[1]) < 1e-4


def test_own_activations_train_and_the_saved_sae_reconstructs_new_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    example("own_activations", "--out", tmp_path / "sae", "--rows", "50000")
    l0, unexplained = map(float, re.search(r"L0 ([\d.]+), variance unexplained ([\d.]+)", capsys.readouterr().out).groups())  # type: ignore[union-attr]
    assert l0 == pytest.approx(3, rel=0.1)  # k of the primary
    assert unexplained < 0.5


def test_a_users_penalty_and_callback_can_be_set_in_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(ROOT)
    # Over the synthetic recipe, which takes a tenth of the time of the quickstart's language model.
    sizes = ["--data.tokens", "8192", "--data.validation_tokens", "2048"]
    assert main(["fit", "-c", "synthetic", "-c", "examples/own_penalty.yaml", "--run", str(tmp_path / "run"), *sizes]) == 0
    output = capsys.readouterr().out
    # A line every 50 steps, of which the run has 8.
    assert re.findall(r"step (\d+): fvu [\d.]+, shared direction 0\.0*[1-9]", output) == ["0"]
    assert "penalty shared_direction" in output  # in the table at the end
