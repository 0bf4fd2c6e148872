"""What is measured, and every way in which it cannot be: one line each, and nothing that was there is lost."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_lens.saes.transcoder import JumpReLUTranscoder, JumpReLUTranscoderConfig

from metasae_lightning.cli import main
from metasae_lightning.corpora import HubText, PythonDocs, SavedDataset, TextFiles
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.saes import EvaluatedSAE, corpus_of, language_model_of, load_sae
from metasae_lightning.lm import HuggingFaceLM, TransformerLensLM
from metasae_lightning.sae import pretrained
from tests.helpers.hub import Hub
from tests.helpers.judged import D_IN, HOOK, recipe, run, sae

QUICK = ["--critic_seeds=0", "--splice_tokens=0", "--resamples=10", "--calibration_tokens=512"]


def truncate(place: Path) -> None:
    weights = place / "saes" / "primary" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def break_record(place: Path) -> None:
    (place / "saes" / "primary" / "cfg.json").write_text('{"d_in": 32,')


def break_config(place: Path) -> None:
    (place / "config.yaml").write_text("data: [")


def no_data(place: Path) -> None:
    (place / "config.yaml").write_text("model: {}")


def no_sae(place: Path) -> None:
    shutil.rmtree(place / "saes" / "primary")


def no_such_class(place: Path) -> None:
    tree = yaml.safe_load((place / "config.yaml").read_text())
    tree["data"]["class_path"] = "metasae_lightning.ActivationsDataModul"
    (place / "config.yaml").write_text(yaml.safe_dump(tree))


def no_model(place: Path) -> None:
    tree = yaml.safe_load((place / "config.yaml").read_text())
    tree["data"]["init_args"]["language_model"]["init_args"]["name"] = str(place / "nothing")
    (place / "config.yaml").write_text(yaml.safe_dump(tree))


def failing(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that a command ends with."""
    assert main([*args, *QUICK]) == 2
    lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("metasae: error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("metasae: error: ")


@pytest.mark.parametrize("command", ["test", "calibrate", "compare"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "cannot be loaded as a SAELens SAE"),
        (break_record, "cannot be loaded as a SAELens SAE"),
        (break_config, "cannot be read as a recipe"),
        (no_data, "is no recipe: it has no data"),
        (no_sae, "holds no SAE under saes/primary"),
        (no_such_class, "there is no class metasae_lightning.ActivationsDataModul (did you mean metasae_lightning.ActivationsDataModule"),
        (no_model, "is no local folder and the hub did not give it"),
    ],
)
def test_a_damaged_run_gives_one_line(
    command: str, damage: Callable[[Path], None], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    place, other = run(tmp_path, "one"), run(tmp_path, "two")
    damage(place)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert says in failing(capsys, command, str(place), *([str(other)] if command == "compare" else []))
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_what_cannot_be_compared_gives_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, elsewhere = run(tmp_path, "one"), run(tmp_path, "elsewhere", hook="blocks.0.hook_resid_post")
    for command in ("compare", "test"):
        said = failing(capsys, command, str(one), str(elsewhere))
        assert "do not read the same activations: hook blocks.1.hook_resid_post and blocks.0.hook_resid_post" in said
    other = run(tmp_path, "other", model_name="another")
    assert "do not read the same activations: model" in failing(capsys, "compare", str(one), str(other))
    narrow = run(tmp_path, "narrow")
    torch.manual_seed(0)
    made = type(sae())(type(sae().cfg)(d_in=D_IN // 2, d_sae=8, dtype="float32", device="cpu"))
    made.cfg.metadata.hook_name = HOOK
    shutil.rmtree(narrow / "saes" / "primary")
    made.save_model(narrow / "saes" / "primary")
    assert "d_in 32 and 16" in failing(capsys, "compare", str(one), str(narrow))
    assert "reads activations 16 wide, and the data give 32" in failing(capsys, "test", str(narrow))


def test_an_sae_that_does_not_say_what_it_reads_gives_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    place = run(tmp_path, "one")
    sae().save_model(tmp_path / "mute")
    mute = str(tmp_path / "mute")
    assert "does not tell the model and the hook that it reads" in failing(capsys, "test", "--sae", mute)
    assert "does not tell what L0 it was trained at" in failing(capsys, "calibrate", mute, "--data", str(place / "config.yaml"))
    sae(model_name=str(tmp_path / "model"), hook_name=HOOK).save_model(tmp_path / "half")
    assert "tells no dataset_path" in failing(capsys, "test", "--sae", str(tmp_path / "half"))
    sae(hook_name="blocks.0.hook_mlp_out").save_model(tmp_path / "wrong")
    said = failing(capsys, "test", str(tmp_path / "wrong"), "--data", str(place / "config.yaml"))
    assert "wrong reads blocks.0.hook_mlp_out, and the data give blocks.1.hook_resid_post" in said


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["test"], "name a run, a SAELens folder or RELEASE:ID"),
        (["test", "nowhere"], "'nowhere' is neither a folder nor an SAE on the Hub"),
        (["test", "{empty}"], "is neither a run, which has saes/primary, nor a SAELens folder"),
        (["test", "{run}", "--tokens=many"], "tokens: expected"),
        (["test", "{run}", "--rul=rate"], "there is no option rul"),
        (["test", "{run}", "--rule=best"], "rule: expected"),
        (["test", "{run}", "--data=nothing.yaml"], "nothing.yaml cannot be read as a recipe"),
        (["test", "{run}", "{run}", "--out=x"], "out: the results of several SAEs"),
        (["calibrate", "{run}", "--rule=stored"], "rule: global, rate or eer set thresholds"),
        (["compare", "{run}"], "arguments are required: b"),
        (["test", "{run}", "--device=nowhere"], "device: 'nowhere' is not there"),
        (["test", "{run}", "--rule=rate", "--l0=1000"], "has 48 latents, of which 1000 cannot be active"),
    ],
)
def test_mistaken_arguments_give_one_line(args: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    place = run(tmp_path, "one")
    (tmp_path / "empty").mkdir()
    assert says in failing(capsys, *(word.format(run=place, empty=tmp_path / "empty") for word in args))


def test_a_full_disk_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    place = run(tmp_path, "one")
    before = {path: path.read_bytes() for path in (place / "saes").rglob("*") if path.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left on device" in failing(capsys, "calibrate", str(place))
    assert {path: path.read_bytes() for path in (place / "saes").rglob("*") if path.is_file()} == before


def test_a_damaged_piece_of_an_evaluation_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    place = run(tmp_path, "one")
    assert main(["test", str(place), *QUICK]) == 0
    piece = next((place / "evaluation").glob("passage-00001-*"))
    piece.write_bytes(piece.read_bytes()[:50])
    assert f"{piece} is damaged: remove it" in failing(capsys, "test", str(place))
    piece.unlink()
    assert main(["test", str(place), *QUICK]) == 0
    (place / "evaluation.json").write_text("{")
    assert "evaluation.json" in failing(capsys, "test", str(place))


def told(**metadata: Any) -> EvaluatedSAE:
    return EvaluatedSAE("it", "it", Path("it"), sae(**metadata))


def test_an_sae_names_its_model_and_its_text(tmp_path: Path):
    lens = language_model_of(told(model_name="gpt2-small", hook_name=HOOK, model_class_name="HookedTransformer"))
    assert isinstance(lens, TransformerLensLM) and lens.hooks == [HOOK]
    ours = language_model_of(told(model_name="m", hook_name=HOOK, hf_hook_name="model.layers.1", model_class_name="HookedTransformer"))
    assert isinstance(ours, HuggingFaceLM) and ours.hooks == ["model.layers.1"]
    assert isinstance(corpus_of(told(dataset_path="docstrings of Python 3.11's installed packages")), PythonDocs)
    assert isinstance(corpus_of(told(dataset_path="owner/text")), HubText)
    (tmp_path / "a.txt").write_text("text")
    assert isinstance(corpus_of(told(dataset_path=str(tmp_path / "a.txt"))), TextFiles)
    (tmp_path / "state.json").write_text("{}")
    assert isinstance(corpus_of(told(dataset_path=str(tmp_path))), SavedDataset)


def test_loading_by_release_asks_for_an_id():
    with pytest.raises(InputError, match="which would be RELEASE:ID"):
        pretrained.load_pretrained("gpt2-small-res-jb")
    with pytest.raises(InputError, match="cannot be loaded as a SAELens SAE"):
        pretrained.load_pretrained("no-such-release:x")


# SAELens's own client, in a process that was told where the hub is before it was imported.
def test_an_sae_comes_from_the_hub_by_its_name(tmp_path: Path):
    made = sae(3, model_name="m", hook_name=HOOK)
    repository = tmp_path / "hub" / "models" / "owner" / "saes"
    made.save_model(repository / "layer_1")
    script = (
        "import sys, torch; from metasae_lightning.evaluation.saes import load_sae\n"
        "one = load_sae('owner/saes:layer_1'); x = torch.ones(2, 32)\n"
        "print(one.name, one.sae.encode(x).sum().item())\n"
        "from metasae_lightning.errors import InputError\n"
        "try: load_sae('owner/saes:layer_2')\n"
        "except InputError as error: print(error)\n"
    )
    with Hub(tmp_path / "hub") as hub:
        environment = {**hub.environment(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    lines = done.stdout.strip().split("\n")
    name, total = lines[0].split()
    assert name == "owner-saes-layer_1" and float(total) == pytest.approx(made.encode(torch.ones(2, D_IN)).sum().item(), rel=1e-5)
    assert "'owner/saes:layer_2' cannot be loaded as a SAELens SAE" in lines[1]
    assert load_sae(str(repository / "layer_1")).name == "layer_1"


def test_runs_on_other_data_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, two = run(tmp_path, "one"), run(tmp_path, "two")
    (two / "config.yaml").write_text(yaml.safe_dump({"data": recipe(tmp_path, held_out=0.3)}))
    assert "were trained on different data (held_out is 0.2 and 0.3)" in failing(capsys, "compare", str(one), str(two))
    assert main(["compare", str(one), str(two), "--data", str(one / "config.yaml"), "--out", str(tmp_path / "c.json"), *QUICK]) == 0


def test_a_runs_own_folder_is_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = run(tmp_path, "one")
    assert load_sae(str(place / "saes" / "primary")).run
    monkeypatch.chdir(place / "saes" / "primary")
    assert main(["calibrate", ".", "--calibration_tokens=512"]) == 0
    assert "threshold_rule" in json.loads((place / "saes" / "primary" / "cfg.json").read_text())["metadata"]
    first, second = tmp_path / "a" / "primary", tmp_path / "b" / "primary"
    for folder in (first, second):
        sae().save_model(folder)
    assert load_sae(str(first)).folder != load_sae(str(second)).folder


def test_what_cannot_be_scored_is_refused(tmp_path: Path):
    scaled = sae()
    scaled.cfg.normalize_activations = "expected_average_only_in"
    scaled.save_model(tmp_path / "scaled")
    with pytest.raises(InputError, match="scaled by a factor that its files do not have"):
        pretrained.load_pretrained(tmp_path / "scaled")
    sizes = {"d_in": 32, "d_out": 32, "d_sae": 8, "dtype": "float32", "device": "cpu"}
    transcoder = JumpReLUTranscoder(JumpReLUTranscoderConfig(**sizes, apply_b_dec_to_input=False))
    transcoder.save_model(tmp_path / "transcoder")
    with pytest.raises(InputError, match="is a transcoder"):
        pretrained.load_pretrained(tmp_path / "transcoder")
