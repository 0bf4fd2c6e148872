"""A run of the command line that is killed and resumed equals an uninterrupted one."""

import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from metasae_lightning.cli import main
from metasae_lightning.cli.loggers import csv_logger
from tests.helpers.command_line import CommandLine

ROOT = Path(__file__).parents[2]


def fit_command(run: Path, checkpoint: bool) -> list[str]:
    size = ["--data.init_args.tokens", "200000", "--data.init_args.validation_tokens", "4096"]
    arguments = ["fit", "-c", "synthetic", "--run", str(run), *size]
    overlay = run.parent / "often.yaml"
    overlay.write_text(
        "trainer:\n  callbacks:\n    - class_path: Export\n    - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n"
        "      init_args: {save_last: true, save_top_k: 1, every_n_train_steps: 7}\n"
    )
    return [*arguments, "-c", str(overlay), *(["--ckpt_path", "last"] if checkpoint else [])]


def run_to_end(run: Path, checkpoint: bool = False) -> None:
    process = CommandLine(fit_command(run, checkpoint), cwd=ROOT)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr[-2000:]


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path):
    uninterrupted, killed = tmp_path / "whole", tmp_path / "killed"
    run_to_end(uninterrupted)
    process = CommandLine(fit_command(killed, False), cwd=ROOT)
    deadline = time.monotonic() + 120
    while not list((killed / "checkpoints").glob("last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before the kill"
    assert not (killed / "saes").exists()
    run_to_end(killed, checkpoint=True)
    for name in ("primary", "meta"):
        expected, resumed = (load_file(run / "saes" / name / "sae_weights.safetensors") for run in (uninterrupted, killed))
        assert all((expected[key] == resumed[key]).all() for key in expected), name


@pytest.mark.parametrize("checkpoint", ["none.ckpt", "last"])
def test_a_missing_checkpoint_is_a_one_line_error(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [*fit_command(tmp_path / "run", False), "--ckpt_path", checkpoint]
    assert main(arguments) == 2
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert line.startswith("metasae: error: --ckpt_path ") and checkpoint in line
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_the_earlier_logs(tmp_path: Path):
    for text in ("first", "second"):
        (tmp_path / "metrics.csv").write_text(text)
        csv_logger(str(tmp_path))
    assert (tmp_path / "metrics.1.csv").read_text() == "first" and (tmp_path / "metrics.2.csv").read_text() == "second"
