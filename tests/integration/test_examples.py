"""The examples run and print the values that their docstrings describe."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from metasae_lightning.cli import main
from metasae_lightning.evaluation import HeldOutContext, TextActivations, open_latents
from tests.helpers.judged import write_run

ROOT = Path(__file__).parents[2]
SMALL = {"tokens": 2048, "batch_size": 256, "buffer_size": 1024, "validation_tokens": 512, "forward_batch": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short joint run of the quickstart's recipe on the embedded language model."""
    folder = tmp_path_factory.mktemp("examples") / "run"
    flags = [f"--data.init_args.{name}={value}" for name, value in SMALL.items()]
    assert main(["fit", "-c", "quickstart", "-c", "joint", "--run", str(folder), *flags]) == 0
    return folder


def example(name: str, *args: str | int | Path) -> None:
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("latents_of_a_word", r"has no folder saes/primary: .*arms/joint"),
        ("steer", "is neither a run, which has saes/primary, nor a SAELens folder"),
        ("adapter", "is neither a run, which has saes/primary, nor a SAELens folder"),
    ],
)
def test_a_folder_without_saes_is_an_error_of_one_line(name: str, message: str, tmp_path: Path):
    with pytest.raises(SystemExit, match=message):
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


def test_the_explanation_of_a_runs_latent_keeps_the_words_that_pass_the_test(run: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match=f"holds no contexts of latents: measure first, metasae test {run}"):
        example("refine_explanation", run)
    assert main(["test", str(run), "--tokens", "1024", "--critic_seeds", "0", "--splice_tokens", "0", "--resamples", "10"]) == 0
    capsys.readouterr()
    example("refine_explanation", run)
    output = capsys.readouterr().out
    without = int(re.match(r"latent \d+ fires in (\d+)% of the sentences without a proposed word\n", output)[1])  # type: ignore[index]
    words = re.findall(r"  (keep|drop) (.+): fires in (\d+)% of the sentences with it", output)
    assert words and all((verdict == "keep") == (int(share) >= without + 50) for verdict, _, share in words)
    kept = ", ".join(word for verdict, word, _ in words if verdict == "keep") or "none of the words"
    assert re.search(rf"\nexplanation: {re.escape(kept)}\nit accounts for \d+% of the latent's activation in \d+ other contexts\n", output)
    with pytest.raises(SystemExit, match="latent must be in 0 to"):
        example("refine_explanation", run, "--latent", "-1")


class LatentOfFoxes:
    """Latents of which number 1 fires on every word that begins with `fox`."""

    def __len__(self) -> int:
        return 2

    def contexts(self, latent: int) -> list[HeldOutContext]:
        # The `dog` of the first context is a false lead. Contexts 1 and 3 judge: 3 of their 4 units of activation are on `foxes`.
        found = [((" a", " dog", " fox"), (0.0, 1.0, 2.0)), ((" fox", "es", "!"), (2.0, 1.0, 0.0))]
        found += [((" fox", "es"), (1.0, 1.0)), (("the", " hen"), (0.0, 1.0))]
        return [HeldOutContext(*context, 1, 0, 1.0) for context in found] if latent else []

    def activations(self, texts: list[str], latents: list[int]) -> list[TextActivations]:
        fires = [torch.tensor([[float(" fox" in text)]]) for text in texts]
        return [TextActivations((text,), tuple(latents), acts, torch.ones(1).bool()) for text, acts in zip(texts, fires, strict=True)]


def test_a_word_that_the_latent_does_not_fire_on_alone_is_dropped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("examples.refine_explanation.open_latents", lambda place: LatentOfFoxes())
    example("refine_explanation", "run")
    assert capsys.readouterr().out.splitlines() == [
        "latent 1 fires in 0% of the sentences without a proposed word",
        *(f"  keep {word!r}: fires in 100% of the sentences with it" for word in ("fox", "foxes")),
        "  drop 'dog': fires in 0% of the sentences with it",
        "explanation: 'fox', 'foxes'",
        "it accounts for 75% of the latent's activation in 2 other contexts",
    ]
    with pytest.raises(SystemExit, match="latent 0 did not fire on the held-out text"):
        example("refine_explanation", "run", "--latent", "0")


def test_steering_with_a_meta_latent_names_the_latents_that_it_is_a_part_of(run: Path, capsys: pytest.CaptureFixture[str]):
    parts = open_latents(run).meta_latents.parts
    meta_latent = int((parts > 0).sum(0).argmax())
    example("steer", run, "--latent", meta_latent, "--meta")
    output = capsys.readouterr().out
    assert re.match(rf"meta-latent {meta_latent} is a part of the latents {int(parts[:, meta_latent].argmax())} \(\d", output)
    assert float(re.search(r"KL divergence of the next token: (\S+)", output)[1]) > 1e-3  # type: ignore[index]


def test_the_loss_of_an_adapter_in_code_space_falls_and_its_l1_norm_is_paid_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny = write_run(tmp_path, "tiny", hf_hook_name="model.layers.1")
    options = ["--text", "The quick", "A lazy", "--prefer", " fox", "--to", " dog", "--steps", "15"]
    before: list[float] = []
    after: list[float] = []
    for l1 in ("0", "1"):
        example("adapter", tiny, *options, "--l1", l1)
        losses = re.fullmatch(r"loss before training ([\d.]+), after 15 steps ([\d.]+)\n", capsys.readouterr().out)
        assert losses is not None
        before.append(float(losses[1]))
        after.append(float(losses[2]))
    # At first nothing is added to the codes, so the loss is that of the clean model whatever the weight of the norm.
    model, tokenizer = (kind.from_pretrained(tmp_path / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    losses = []
    for text in options[1:3]:
        fox, dog = (log_probability_of(model, tokenizer, text, answer) for answer in (" fox", " dog"))
        # SimPO's loss with beta 2 and margin 1.
        losses.append(-torch.nn.functional.logsigmoid(2 * (fox - dog) - 1).item())
    assert before == [pytest.approx(sum(losses) / 2, abs=1e-3)] * 2
    assert after[0] < 0.7 * before[0] and after[0] < after[1]


def log_probability_of(model: Any, tokenizer: Any, text: str, answer: str) -> torch.Tensor:
    """The mean log-probability of the tokens of an answer, from transformers' own loss."""
    prompt, tokens = (tokenizer(part, add_special_tokens=first)["input_ids"] for part, first in ((text, True), (answer, False)))
    labels = torch.tensor([[-100] * len(prompt) + tokens])
    return -model(torch.tensor([prompt + tokens]), labels=labels).loss.detach()
