"""SAEBench by a stand-in: a Python whose `sae_bench` has the names that are called in SAEBench 0.6, and writes what they were given."""

import json
import sys
import textwrap
import types
import venv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_lens import SAE
from safetensors.torch import save_file

from metasae_lightning.cli import main
from metasae_lightning.evaluation import saebench_script
from metasae_lightning.evaluation.saebench import held_out_contexts, run_saebench
from metasae_lightning.evaluation.saebench_script import Job
from metasae_lightning.evaluation.saes import load_sae
from tests.helpers.judged import sae, write_run

ROOT = Path(__file__).parents[2]
# Small modules in place of torch and sae_lens, which would take seconds to import.
MODULES = {
    "torch.py": "class Tensor: pass\ndef no_grad(): return lambda function: function\ndef manual_seed(seed): print('noise')\n",
    "sae_lens.py": "class SAE:\n    load_from_disk = staticmethod(lambda folder: folder)\n",
    "sae_bench/evals/meta_structure/eval_config.py": "def MetaStructureEvalConfig(**settings): return settings\n",
    "sae_bench/evals/meta_structure/main.py": """
        import importlib.util, json, os, pathlib, types

        def run_eval_single_sae(release, name, sae, config, device):
            if config["train_steps"] == 2:
                raise ValueError("no figure\\nof it")
            if config["train_steps"] == 3:
                os._exit(9)
            seen = [found for found in ("metasae_lightning", "bootstrap") if importlib.util.find_spec(found)]
            figures = {"decoder_fraction_variance_explained": 0.25, "final_reconstruction_mse": None}
            result = {"sae": sae, "release": release, "seen": seen, **config, "eval_result_metrics": {"meta_structure": figures}}
            write = lambda file, indent: pathlib.Path(file).write_text(json.dumps(result))
            return types.SimpleNamespace(to_json_file=write)
    """,
}


@pytest.fixture(scope="module")
def pythons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The stand-in, `bare` without sae_bench, and a program that is no Python."""
    folder = tmp_path_factory.mktemp("pythons")
    for name in ("standin", "bare"):
        venv.create(folder / name, symlinks=True)
    (packages,) = (folder / "standin").glob("lib/python*/site-packages")
    for name, text in MODULES.items():
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text(textwrap.dedent(text))
    program = folder / "program"
    program.write_text("#!/bin/sh\necho hello\n")
    program.chmod(0o755)
    return {"standin": str(folder / "standin/bin/python"), "bare": str(folder / "bare/bin/python"), "program": str(program)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("saebench"), "one", dataset_path="some text", prepend_bos=True)


def of_decoder(run: Path, python: str, *words: str) -> int:
    return main(["saebench", str(run), "--python", python, "--evals", "meta_structure", *words])


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_saebenchs_results_of_every_arm_are_in_its_folder(
    pythons: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("joint", "solo"):
        sae().save_model(tmp_path / "arms" / name / "saes" / "primary")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"arms": {"joint": {}, "solo": {}}}}}))
    assert of_decoder(tmp_path, pythons["standin"], "--steps", "7", "--seed", "5") == 0
    results = {name: tmp_path / "arms" / name / "saebench" / "meta_structure.json" for name in ("joint", "solo")}
    assert capsys.readouterr().out.splitlines() == [f"{file}: decoder_fraction_variance_explained 0.25" for file in results.values()]
    for name, file in results.items():
        result = read(file)
        assert Path(result["sae"]) == tmp_path / "arms" / name / "saes" / "primary" and result["release"] == f"{tmp_path.name}-{name}"
        assert (result["train_steps"], result["random_seed"], result["autocast"]) == (7, 5, False)
        assert result["seen"] == []  # neither this environment nor the script's folder


@pytest.mark.parametrize(("steps", "reason"), [("2", "ValueError: no figure of it"), ("3", "exit status 9")])
def test_a_failed_evaluation_is_one_line_and_older_results_stay(
    steps: str, reason: str, pythons: dict[str, str], run: Path, capfd: pytest.CaptureFixture[str]
):
    file = run / "saebench" / "meta_structure.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text("older")
    assert of_decoder(run, pythons["standin"], "--steps", steps) == 2
    assert capfd.readouterr().err.replace("noise\n", "") == f"metasae: error: SAEBench's meta_structure of {run} failed: {reason}\n"
    assert file.read_text() == "older" and list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("python", "says"),
    [
        ("missing/python", "there is no Python missing/python; an environment with SAEBench is made by: python -m venv saebench && "),
        ("program", "program does not run as a Python"),
        ("bare", 'bare/bin/python -m pip install sae-bench==0.6.0 "datasets<4"'),
        (None, "SAEBench is not installed here; make an environment for it (python -m venv saebench"),
    ],
)
def test_a_python_without_saebench_is_one_line_that_says_how_to_install_it(
    python: str | None, says: str, pythons: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "executable", pythons["bare"])
    assert main(["saebench", "missing", *(["--python", pythons.get(python, python)] if python else [])]) == 2
    error = capsys.readouterr().err
    assert error.startswith("metasae: error: python: ") and error.count("\n") == 1 and says in error


def test_the_core_evaluation_gets_the_model_and_full_batches_of_held_out_text(
    pythons: dict[str, str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked: list[Any] = []

    def run_evaluation(*args: Any, **settings: Any) -> bytes:
        asked.append((args[2], settings))
        return json.dumps({"eval_result_metrics": {"sparsity": {"l0": 3.5}, "misc_metrics": {"ce_loss_score": None}}}).encode()

    monkeypatch.setattr("metasae_lightning.cli.saebench.run_saebench", run_evaluation)
    words = ["--evals", "core", "core", "--tokens", "300", "--out", str(tmp_path)]
    assert main(["saebench", str(run), "--python", pythons["standin"], *words]) == 0
    ((evaluation, settings),) = asked
    assert evaluation == "core" and settings["model"] == str(run.parent / "model")
    assert settings["tokens"].shape == (16, 16)  # 300 tokens are 18.75 contexts, two full batches of 8
    assert capsys.readouterr().out == f"{tmp_path / 'core.json'}: l0 3.5\n"
    assert read(tmp_path / "core.json")["eval_result_metrics"]["sparsity"] == {"l0": 3.5}


def test_planted_activations_have_no_core_evaluation(run: Path):
    with pytest.raises(ValueError, match="SAEBench's core evaluation needs a language model: --evals meta_structure"):
        held_out_contexts(load_sae(str(run)), types.SimpleNamespace(), 100)


# An SAE without a folder: SAEBench reads a copy of it.
def test_an_sae_from_the_hub_is_written_for_saebench(pythons: dict[str, str], run: Path, monkeypatch: pytest.MonkeyPatch):
    subject = replace(load_sae(str(run)), source="release:id", run=None)
    saved: list[Path] = []
    monkeypatch.setattr(subject.sae, "save_model", lambda folder: saved.append(folder))
    assert json.loads(run_saebench(pythons["standin"], subject, "meta_structure"))["sae"] == str(saved[0])


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning", "ignore:To copy construct:UserWarning")
def test_the_script_hands_saebench_the_sae_the_tokens_and_transformers_model(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def run_evals(sae: Any, store: Any, model: Any, config: Any, ignore_tokens: set[int]) -> Any:
        read = torch.cat([store.get_batch_tokens(config.batch_size_prompts) for _ in range(config.n_eval_reconstruction_batches)])
        figures = {"same_tokens": torch.equal(read.sort(0).values, tokens.sort(0).values), "decoder": sae.W_dec.sum().item()}
        return {"figures": {**figures, "ignored": sorted(ignore_tokens)}}, {}

    def save(result: Any, number: str, version: str, commit: str, file: str, sae: Any) -> None:
        Path(file).write_text(json.dumps(result["metrics"]))

    evaluation = {"run_evals": run_evals, "calculate_misc_metrics": lambda latents: {}, "save_single_eval_result": save}
    attributes: dict[str, dict[str, Any]] = {
        "evals.core": {"main": types.SimpleNamespace(**evaluation, replace_nans_with_negative_one=lambda result: result)},
        "evals.core.eval_config": {"CoreEvalConfig": types.SimpleNamespace},
        "sae_bench_utils": {"get_eval_uuid": lambda: "1", "get_sae_lens_version": lambda: "6"},
        "sae_bench_utils.general_utils": {"load_and_format_sae": lambda release, sae, device: ("custom_sae", sae, None)},
    }
    for name in ("", "evals", *attributes):
        module = types.ModuleType(f"sae_bench.{name}".rstrip("."))
        vars(module).update(attributes.get(name, {}))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    tokens = torch.randint(2, 300, (16, 16), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens.int()}, tmp_path / "tokens")
    folder, out = run / "saes" / "primary", tmp_path / "out"
    job = Job("core", str(folder), "one", str(out), model=str(run.parent / "model"), tokens=str(tmp_path / "tokens"))
    saebench_script.core(job)
    decoder = SAE.load_from_disk(folder).W_dec.sum().item()
    assert read(out) == {"figures": {"same_tokens": True, "decoder": decoder, "ignored": [0, 1]}, "misc_metrics": {}}
    assert float(capsys.readouterr().out.split()[-1]) < 1e-4  # TransformerLens's model is transformers'
