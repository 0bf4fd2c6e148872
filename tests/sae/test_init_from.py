"""Runs that start from another SAE (`init_from`): where it is found, which SAEs are refused, and resuming without it."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from metasae_lightning.cli import main
from metasae_lightning.sae.init_from import InitFrom, mismatches, official_model_name
from tests.helpers.judged import D_IN, HOOK, data_config, sae

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (".*LeafSpec.*:FutureWarning", "The dirpath has changed", "Using ModelCheckpoint with manual")
]
WEIGHTS = "saes/primary/sae_weights.safetensors"
ONE_OF = "expected one of 'model', 'hook', 'context'"


def write_recipe(folder: Path, **model_args: Any) -> Path:
    """Write a recipe on a tiny model; `model_args` are arguments of JointSAE, such as `init_from`."""
    primary = {"class_path": "sae_lens.JumpReLUTrainingSAEConfig", "init_args": {"d_in": D_IN, "d_sae": 48, "l0_coefficient": 0.01}}
    meta = {"class_path": "sae_lens.BatchTopKTrainingSAEConfig", "init_args": {"d_in": D_IN, "d_sae": 8, "k": 2}}
    penalties = {"decomposability": {"class_path": "Decomposability", "init_args": {"weight": 0.3, "sigma_sq": 1.0}}}
    model = {"primary": primary, "meta": meta, "penalties": penalties, "n_p": 5, "n_m": 2, **model_args}
    callbacks = [{"class_path": name} for name in ("HeldOut", "Export", "Summary")]
    save_checkpoints = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"save_last": "link", "save_top_k": -1, "every_n_train_steps": 8},
    }
    tree = {
        "model": {"class_path": "metasae_lightning.JointSAE", "init_args": model},
        "data": data_config(folder),
        "trainer": {"accelerator": "cpu", "callbacks": [*callbacks, save_checkpoints]},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def write_source(folder: Path, name: str = "source", **changes: Any) -> Path:
    """Write a run's folder with a primary and a meta SAE; `changes` to the primary's metadata."""
    metadata = {"model_name": str(folder / "model"), "hook_name": HOOK, "context_size": 16, "prepend_bos": True, **changes}
    sae(threshold=0.5, **metadata).save_model(folder / name / "saes" / "primary")
    sae(1, 8, 0.1).save_model(folder / name / "saes" / "meta")
    return folder / name


def fit_error(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one error line of a `metasae fit` that fails."""
    assert main(["fit", *args]) == 2
    lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("metasae: error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("metasae: error: ")


def test_a_run_starts_from_another_sae_and_resumes_without_it(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source_folder = write_source(tmp_path)
    path = write_recipe(tmp_path, init_from=str(source_folder), meta_init_from=str(source_folder))
    with caplog.at_level("INFO"):
        assert main(["fit", "-c", str(path), "--run", str(tmp_path / "one")]) == 0
    reports = [record.getMessage() for record in caplog.records if f"from {source_folder}" in record.getMessage()]
    assert [line.split()[0] for line in reports] == ["primary", "meta"]
    assert "jumprelu: FVU" in reports[0] and "jumprelu as batchtopk" in reports[1] and "ranks a batch's activations" in reports[1]
    # 32 steps at 3e-4 turn each row by a small angle; a row with a random start would be nearly orthogonal to the source's.
    rows, source_rows = (load_file(folder / WEIGHTS)["W_dec"] for folder in (tmp_path / "one", source_folder))
    cosines = torch.nn.functional.cosine_similarity(rows, source_rows)
    assert cosines.min() > 0.9 and cosines.max() < 1 - 1e-7
    metadata = json.loads((tmp_path / "one" / "saes" / "primary" / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == HOOK and metadata["init_from"] == str(source_folder)
    # Resumed from the middle, with the source gone, the run ends with the same bits.
    source_folder.rename(tmp_path / "away")
    middle = sorted((tmp_path / "one" / "checkpoints").glob("epoch*.ckpt"), key=lambda path: path.stat().st_mtime_ns)[1]
    assert main(["fit", "-c", str(path), "--run", str(tmp_path / "two"), "--ckpt_path", str(middle)]) == 0
    resumed = load_file(tmp_path / "two" / WEIGHTS)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in load_file(tmp_path / "one" / WEIGHTS).items())


@pytest.mark.parametrize(
    ("metadata", "difference"),
    [
        ({"model_name": "gpt2"}, "the model gpt2, and this run's is"),
        ({"hook_name": "blocks.0.hook_resid_post"}, f"the hook blocks.0.hook_resid_post, and this run's is {HOOK}"),
        ({"context_size": 1024}, "the context 1024, and this run's is 16"),
        ({"prepend_bos": False}, "the context prepend_bos: False, and this run's is prepend_bos: True"),
    ],
)
def test_an_sae_of_other_data_is_refused_unless_allow_mismatch_lists_the_difference(
    metadata: dict[str, Any], difference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source_folder = write_source(tmp_path, **metadata)
    path = write_recipe(tmp_path, init_from=str(source_folder))
    error = fit_error(capsys, "-c", str(path), "--run", str(tmp_path / "one"))
    assert difference in error and not (tmp_path / "one" / "config.yaml").exists()
    suggestion = yaml.safe_load(error[error.index("{place") :])
    assert set(suggestion) == {"place", "allow_mismatch"}
    write_recipe(tmp_path, init_from=suggestion)
    assert main(["fit", "-c", str(path), "--run", str(tmp_path / "one")]) == 0


def test_the_old_key_anyway_means_allow_mismatch_and_saved_configs_with_it_load(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    init_from = InitFrom("somewhere", allow_mismatch=["model"], anyway=["hook"])
    assert (init_from.allow_mismatch, init_from.anyway) == (("model", "hook"), ())
    source_folder = write_source(tmp_path, context_size=1024)
    path = write_recipe(tmp_path, init_from={"place": str(source_folder), "anyway": ["context"]})
    caplog.clear()
    assert main(["fit", "-c", str(path), "--run", str(tmp_path / "one")]) == 0
    assert any("`anyway` is now called `allow_mismatch`" in record.getMessage() for record in caplog.records)
    saved = tmp_path / "one" / "config.yaml"
    assert yaml.safe_load(saved.read_text())["model"]["init_args"]["init_from"]["anyway"] == ["context"]
    assert main(["fit", "-c", str(saved), "--run", str(tmp_path / "two")]) == 0


def remove_tensor(source_folder: Path) -> None:
    weights = load_file(source_folder / WEIGHTS)
    weights.pop("b_enc")
    save_file(weights, source_folder / WEIGHTS)


def change_shape(source_folder: Path) -> None:
    weights = load_file(source_folder / WEIGHTS)
    save_file({**weights, "b_enc": torch.zeros(7)}, source_folder / WEIGHTS)


def write_nan(source_folder: Path) -> None:
    weights = load_file(source_folder / WEIGHTS)
    weights["W_enc"][3, 5] = float("nan")
    save_file(weights, source_folder / WEIGHTS)


class MaliciousPickle:
    """A pickle that creates a file when it is loaded, in place of harmful code."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def write_pickle(source_folder: Path) -> None:
    (source_folder / WEIGHTS).write_bytes(pickle.dumps(MaliciousPickle()))


def write_with_torch_save(source_folder: Path) -> None:
    torch.save({"W_dec": MaliciousPickle()}, source_folder / WEIGHTS)


def remove_weights(source_folder: Path) -> None:
    (source_folder / WEIGHTS).unlink()


def write_unknown_architecture(source_folder: Path) -> None:
    path = source_folder / "saes" / "primary" / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architecture": "crosscoder"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_tensor, 'Missing key(s) in state_dict: "b_enc"'),
        (change_shape, "size mismatch for b_enc"),
        (write_nan, "has NaN or infinite numbers in W_enc"),
        (write_pickle, "cannot be loaded as a SAELens SAE"),
        (write_with_torch_save, "cannot be loaded as a SAELens SAE"),
        (remove_weights, "sae_weights.safetensors"),
        (write_unknown_architecture, "crosscoder"),
    ],
)
def test_a_broken_folder_is_refused(
    damage: Callable[[Path], None], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    source_folder = write_source(tmp_path)
    damage(source_folder)
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path, init_from=str(source_folder))
    assert message in fit_error(capsys, "-c", str(path), "--run", str(tmp_path / "one"))
    assert not (tmp_path / "executed").exists() and not (tmp_path / "one" / "config.yaml").exists()
    # Control: loading the pickle does create the file.
    if damage is write_pickle:
        pickle.loads((source_folder / WEIGHTS).read_bytes())
        assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"init_from": "no/such:thing"}, "'no/such:thing' cannot be loaded as a SAELens SAE"),
        ({"init_from": "nowhere"}, "init_from: 'nowhere' is neither a folder nor an SAE on the Hub, which would be RELEASE:ID"),
        ({"init_from": "gpt2-small-res-jb:blocks.99.hook_resid_pre"}, "ID blocks.99.hook_resid_pre not found in release"),
        ({"meta_init_from": "SOURCE", "meta": None, "penalties": {}}, "meta_init_from: there is no meta SAE: set model.meta"),
        *(({"init_from": {"place": "SOURCE", key: ["weather"]}}, f"{key}: {ONE_OF}, got weather") for key in ("allow_mismatch", "anyway")),
    ],
)
def test_a_missing_or_invalid_init_from_is_refused(
    model: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries
    source_folder = str(write_source(tmp_path))
    arguments = yaml.safe_load(yaml.safe_dump(model).replace("SOURCE", source_folder))
    assert message in fit_error(capsys, "-c", str(write_recipe(tmp_path, **arguments)), "--run", str(tmp_path / "one"))


def test_an_sae_of_other_widths_and_a_run_without_saes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_recipe(tmp_path, init_from=str(write_source(tmp_path)))
    error = fit_error(capsys, "-c", str(path), "--run", str(tmp_path / "one"), "--model.init_args.primary.init_args.d_sae", "64")
    assert f"primary.d_sae is 64, and {tmp_path / 'source'} has 48: set d_sae: 48" in error
    arm = tmp_path / "source" / "arms" / "joint"
    (arm / "saes").mkdir(parents=True)
    (tmp_path / "source" / "saes" / "primary").rename(arm / "saes" / "primary")
    error = fit_error(capsys, "-c", str(path), "--run", str(tmp_path / "one"))
    assert f"holds no SAE under saes/primary: name one of its arms, such as {arm}" in error
    (arm / "saes" / "primary" / "cfg.json").unlink()
    (tmp_path / "source" / "arms" / "joint").rename(tmp_path / "elsewhere")
    assert "holds no SAE under saes/primary" in fit_error(capsys, "-c", str(path), "--run", str(tmp_path / "one"))


def test_aliases_of_one_model_or_hook_are_no_mismatch():
    assert official_model_name("gpt2-small") == official_model_name("gpt2") == official_model_name("openai-community/gpt2")
    assert official_model_name("gemma-2-9b") == official_model_name("google/gemma-2-9b") != official_model_name("google/gemma-2-9b-it")
    data = {"hook_name": "blocks.3.hook_resid_post"}
    assert mismatches(data, {"hook_name": "model.layers.3"}) and not mismatches(data, {**data, "hf_hook_name": "model.layers.3"})
    assert not mismatches({}, {"model_name": "gpt2", **data, "context_size": 8, "prepend_bos": True})
