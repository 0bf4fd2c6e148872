"""The command line in a process of its own: a dataset server that stalls, and Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from tests.helpers.hub import Fault, Hub
from tests.helpers.models import documents, save_model

ROOT = Path(__file__).parents[2]
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    save_model(root / "tiny", "llama", layers=2)
    texts = documents(400)
    for shard in range(2):
        file = root / "hub" / "datasets" / "org" / "texts" / "data" / f"train-{shard}-of-2.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": texts[shard::2]}), file)
    return root


def recipe(source_folder: Path, **data: Any) -> Path:
    config = {**yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text()), "arms": None}
    lm = {
        "class_path": "metasae_lightning.lm.HuggingFaceLM",
        "init_args": {"name": str(source_folder / "tiny"), "hook": HOOK, "device": "cpu"},
    }
    corpus = {"class_path": "metasae_lightning.corpora.HubText", "init_args": {"path": "org/texts", "shuffle_window": 50, "retries": 1}}
    sizes = {"tokens": 64_000, "batch_size": 64, "context_size": 12, "buffer_size": 640, "held_out": 0.1}
    config["data"]["init_args"] = {"language_model": lm, "corpus": corpus, **sizes, "validation_tokens": 64, "test_tokens": 64, **data}
    for role, size in (("primary", 64), ("meta", 16)):
        config["model"]["init_args"][role]["init_args"] |= {"d_in": 32, "d_sae": size, "k": 4}
    path = source_folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(hub: Hub, home: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = hub.environment(home, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), HF_HUB_DOWNLOAD_TIMEOUT="300")
    command = [sys.executable, str(ROOT / "cli.py"), *arguments]
    # A shell's background job ignores SIGINT and children inherit that, so restore the default.
    child_options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    return subprocess.Popen(command, env=environment, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **child_options)


def own_lines(stderr: str) -> list[str]:
    """The lines before those of Triton's bindings, which list their objects when a process with running threads ends."""
    return stderr.partition("nanobind: leaked")[0].strip().split("\n")


def test_a_stalled_data_source_ends_the_run_with_an_error_that_names_it(source_folder: Path, tmp_path: Path):
    config = recipe(source_folder, stall_seconds=3.0)
    with Hub(source_folder / "hub") as hub:
        hub.faults[:] = [Fault("stall")]
        started_at = time.monotonic()
        process = start(hub, tmp_path, "fit", "-c", str(config), "--run", str(tmp_path / "run"))
        _, stderr = process.communicate(timeout=180)
        assert process.returncode == 2, stderr[-3000:]
        line = own_lines(stderr)[-1]
        assert line.startswith("metasae: error: corpus org/texts: nothing came for 3 s") and time.monotonic() - started_at < 90
        assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(("command", "delay"), [("fit", 0.7), ("cache", 0.0)])
def test_ctrl_c_ends_a_command_within_30_s_and_leaves_no_partial_file(source_folder: Path, tmp_path: Path, command: str, delay: float):
    config = recipe(source_folder, cache=str(tmp_path / "cache") if command == "cache" else None, tokens=640_000)
    with Hub(source_folder / "hub") as hub:
        options = ["--shard_gib", "2e-4"] if command == "cache" else ["--run", str(tmp_path / "run")]
        process = start(hub, tmp_path, command, "-c", str(config), *options)
        deadline = time.monotonic() + 120
        first_file = tmp_path / ("run/config.yaml" if command == "fit" else "cache/train/.progress")
        while not first_file.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        sent_at = time.monotonic()
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr[-2000:]
        assert time.monotonic() - sent_at < 30
        assert command == "fit" or own_lines(stderr)[-1] == "metasae: stopped"
    files = [path for folder in ("run", "cache") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert files and not [path for path in files if re.search(r"\.draft$|^\.(?!progress$)|\.tmp", path.name)]
    if command == "cache":
        assert not (tmp_path / "cache" / "cache.json").exists()
        assert os.path.getsize(tmp_path / "cache" / "train" / ".progress") > 0
