"""Loading SAEs to evaluate: every failure is one line on stderr and leaves the run's files unchanged."""

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
from tests.helpers.judged import D_IN, HOOK, data_config, sae, write_run

QUICK = ["--critic_seeds=0", "--splice_tokens=0", "--resamples=10", "--calibration_tokens=512"]


def truncate(run_folder: Path) -> None:
    weights = run_folder / "saes" / "primary" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def break_record(run_folder: Path) -> None:
    (run_folder / "saes" / "primary" / "cfg.json").write_text('{"d_in": 32,')


def break_config(run_folder: Path) -> None:
    (run_folder / "config.yaml").write_text("data: [")


def no_data(run_folder: Path) -> None:
    (run_folder / "config.yaml").write_text("model: {}")


def no_sae(run_folder: Path) -> None:
    shutil.rmtree(run_folder / "saes" / "primary")


def no_such_class(run_folder: Path) -> None:
    tree = yaml.safe_load((run_folder / "config.yaml").read_text())
    tree["data"]["class_path"] = "metasae_lightning.ActivationsDataModul"
    (run_folder / "config.yaml").write_text(yaml.safe_dump(tree))


def no_model(run_folder: Path) -> None:
    tree = yaml.safe_load((run_folder / "config.yaml").read_text())
    tree["data"]["init_args"]["language_model"]["init_args"]["name"] = str(run_folder / "nothing")
    (run_folder / "config.yaml").write_text(yaml.safe_dump(tree))


def error_line_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The error line of a command that must fail with exit status 2 and print exactly one."""
    assert main([*args, *QUICK]) == 2
    lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("metasae: error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("metasae: error: ")


@pytest.mark.parametrize("command", ["test", "calibrate", "compare"])
@pytest.mark.parametrize(
    ("damage", "message"),
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
def test_a_damaged_run_is_reported_in_one_line_and_left_unchanged(
    command: str, damage: Callable[[Path], None], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_folder, other_run = write_run(tmp_path, "one"), write_run(tmp_path, "two")
    damage(run_folder)
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    assert message in error_line_of(capsys, command, str(run_folder), *([str(other_run)] if command == "compare" else []))
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before


def test_saes_with_different_hooks_models_or_widths_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_a, other_hook = write_run(tmp_path, "one"), write_run(tmp_path, "elsewhere", hook="blocks.0.hook_resid_post")
    for command in ("compare", "test"):
        line = error_line_of(capsys, command, str(run_a), str(other_hook))
        assert "do not read the same activations: hook blocks.1.hook_resid_post and blocks.0.hook_resid_post" in line
    other_model = write_run(tmp_path, "other", model_name="another")
    assert "do not read the same activations: model" in error_line_of(capsys, "compare", str(run_a), str(other_model))
    narrow = write_run(tmp_path, "narrow")
    torch.manual_seed(0)
    narrow_sae = type(sae())(type(sae().cfg)(d_in=D_IN // 2, d_sae=8, dtype="float32", device="cpu"))
    narrow_sae.cfg.metadata.hook_name = HOOK
    shutil.rmtree(narrow / "saes" / "primary")
    narrow_sae.save_model(narrow / "saes" / "primary")
    assert "d_in 32 and 16" in error_line_of(capsys, "compare", str(run_a), str(narrow))
    assert "reads activations 16 wide, and the data give 32" in error_line_of(capsys, "test", str(narrow))


def test_an_sae_without_model_hook_or_dataset_metadata_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_folder = write_run(tmp_path, "one")
    sae().save_model(tmp_path / "no_metadata")
    no_metadata = str(tmp_path / "no_metadata")
    assert "does not name the model and hook that it reads" in error_line_of(capsys, "test", "--sae", no_metadata)
    assert "does not tell what L0 it was trained at" in error_line_of(
        capsys, "calibrate", no_metadata, "--data", str(run_folder / "config.yaml")
    )
    sae(model_name=str(tmp_path / "model"), hook_name=HOOK).save_model(tmp_path / "half")
    assert "tells no dataset_path" in error_line_of(capsys, "test", "--sae", str(tmp_path / "half"))
    sae(hook_name="blocks.0.hook_mlp_out").save_model(tmp_path / "wrong")
    line = error_line_of(capsys, "test", str(tmp_path / "wrong"), "--data", str(run_folder / "config.yaml"))
    assert "wrong reads blocks.0.hook_mlp_out, and the data give blocks.1.hook_resid_post" in line


@pytest.mark.parametrize(
    ("args", "message"),
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
def test_wrong_arguments_are_reported_in_one_line(args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_folder = write_run(tmp_path, "one")
    (tmp_path / "empty").mkdir()
    assert message in error_line_of(capsys, *(word.format(run=run_folder, empty=tmp_path / "empty") for word in args))


def test_a_full_disk_during_calibrate_leaves_the_sae_unchanged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run_folder = write_run(tmp_path, "one")
    before = {path: path.read_bytes() for path in (run_folder / "saes").rglob("*") if path.is_file()}

    def raise_no_space(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", raise_no_space)
    assert "No space left on device" in error_line_of(capsys, "calibrate", str(run_folder))
    assert {path: path.read_bytes() for path in (run_folder / "saes").rglob("*") if path.is_file()} == before


def test_a_damaged_cached_result_is_named_in_the_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_folder = write_run(tmp_path, "one")
    assert main(["test", str(run_folder), *QUICK]) == 0
    cached = next((run_folder / "evaluation").glob("passage-00001-*"))
    cached.write_bytes(cached.read_bytes()[:50])
    assert f"{cached} is damaged: remove it" in error_line_of(capsys, "test", str(run_folder))
    cached.unlink()
    assert main(["test", str(run_folder), *QUICK]) == 0
    (run_folder / "evaluation.json").write_text("{")
    assert "evaluation.json" in error_line_of(capsys, "test", str(run_folder))


def subject_with(**metadata: Any) -> EvaluatedSAE:
    return EvaluatedSAE("it", "it", Path("it"), sae(**metadata))


def test_language_model_and_corpus_are_built_from_the_sae_metadata(tmp_path: Path):
    transformer_lens = language_model_of(subject_with(model_name="gpt2-small", hook_name=HOOK, model_class_name="HookedTransformer"))
    assert isinstance(transformer_lens, TransformerLensLM) and transformer_lens.hooks == [HOOK]
    hugging_face = language_model_of(
        subject_with(model_name="m", hook_name=HOOK, hf_hook_name="model.layers.1", model_class_name="HookedTransformer")
    )
    assert isinstance(hugging_face, HuggingFaceLM) and hugging_face.hooks == ["model.layers.1"]
    assert isinstance(corpus_of(subject_with(dataset_path="docstrings of Python 3.11's installed packages")), PythonDocs)
    assert isinstance(corpus_of(subject_with(dataset_path="owner/text")), HubText)
    (tmp_path / "a.txt").write_text("text")
    assert isinstance(corpus_of(subject_with(dataset_path=str(tmp_path / "a.txt"))), TextFiles)
    (tmp_path / "state.json").write_text("{}")
    assert isinstance(corpus_of(subject_with(dataset_path=str(tmp_path))), SavedDataset)


def test_a_release_without_id_or_unknown_is_refused():
    with pytest.raises(InputError, match="which would be RELEASE:ID"):
        pretrained.load_pretrained("gpt2-small-res-jb")
    with pytest.raises(InputError, match="cannot be loaded as a SAELens SAE"):
        pretrained.load_pretrained("no-such-release:x")


# SAELens's own client reads the hub's endpoint when it is imported, so it runs in a process of its own.
def test_an_sae_loads_from_the_hub_by_repository_and_id(tmp_path: Path):
    saved = sae(3, model_name="m", hook_name=HOOK)
    repository = tmp_path / "hub" / "models" / "owner" / "saes"
    saved.save_model(repository / "layer_1")
    script = (
        "import sys, torch; from metasae_lightning.evaluation.saes import load_sae\n"
        "loaded = load_sae('owner/saes:layer_1'); x = torch.ones(2, 32)\n"
        "print(loaded.name, loaded.sae.encode(x).sum().item())\n"
        "from metasae_lightning.errors import InputError\n"
        "try: load_sae('owner/saes:layer_2')\n"
        "except InputError as error: print(error)\n"
    )
    with Hub(tmp_path / "hub") as hub:
        environment = {**hub.environment(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    lines = process.stdout.strip().split("\n")
    name, total = lines[0].split()
    assert name == "owner-saes-layer_1" and float(total) == pytest.approx(saved.encode(torch.ones(2, D_IN)).sum().item(), rel=1e-5)
    assert "'owner/saes:layer_2' cannot be loaded as a SAELens SAE" in lines[1]
    assert load_sae(str(repository / "layer_1")).name == "layer_1"


def test_runs_trained_on_different_data_are_refused_unless_data_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_a, run_b = write_run(tmp_path, "one"), write_run(tmp_path, "two")
    (run_b / "config.yaml").write_text(yaml.safe_dump({"data": data_config(tmp_path, held_out=0.3)}))
    assert "were trained on different data (held_out is 0.2 and 0.3)" in error_line_of(capsys, "compare", str(run_a), str(run_b))
    assert main(["compare", str(run_a), str(run_b), "--data", str(run_a / "config.yaml"), "--out", str(tmp_path / "c.json"), *QUICK]) == 0


def test_an_exported_folder_inside_a_run_is_recognised_as_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run_folder = write_run(tmp_path, "one")
    assert load_sae(str(run_folder / "saes" / "primary")).run
    monkeypatch.chdir(run_folder / "saes" / "primary")
    assert main(["calibrate", ".", "--calibration_tokens=512"]) == 0
    assert "threshold_rule" in json.loads((run_folder / "saes" / "primary" / "cfg.json").read_text())["metadata"]
    first, second = tmp_path / "a" / "primary", tmp_path / "b" / "primary"
    for folder in (first, second):
        sae().save_model(folder)
    assert load_sae(str(first)).folder != load_sae(str(second)).folder


def test_a_scaled_sae_and_a_transcoder_are_refused(tmp_path: Path):
    scaled_sae = sae()
    scaled_sae.cfg.normalize_activations = "expected_average_only_in"
    scaled_sae.save_model(tmp_path / "scaled")
    with pytest.raises(InputError, match="scaled by a factor that its files do not have"):
        pretrained.load_pretrained(tmp_path / "scaled")
    sizes = {"d_in": 32, "d_out": 32, "d_sae": 8, "dtype": "float32", "device": "cpu"}
    transcoder = JumpReLUTranscoder(JumpReLUTranscoderConfig(**sizes, apply_b_dec_to_input=False))
    transcoder.save_model(tmp_path / "transcoder")
    with pytest.raises(InputError, match="is a transcoder"):
        pretrained.load_pretrained(tmp_path / "transcoder")
