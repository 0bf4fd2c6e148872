"""A run started by the command line in its own process is killed and resumed."""

import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from metasae_lightning.cli import main
from metasae_lightning.cli.loggers import default_loggers
from tests.helpers.command_line import CommandLine

ROOT = Path(__file__).parents[2]


def command(run: Path, checkpoint: bool) -> list[str]:
    size = ["--data.init_args.tokens", "200000", "--data.init_args.validation_tokens", "4096"]
    arguments = ["fit", "-c", "synthetic", "--run", str(run), *size]
    overlay = run.parent / "often.yaml"
    overlay.write_text(
        "trainer:\n  callbacks:\n    - class_path: Export\n    - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n"
        "      init_args: {save_last: true, save_top_k: 1, every_n_train_steps: 7}\n"
    )
    return [*arguments, "-c", str(overlay), *(["--ckpt_path", "last"] if checkpoint else [])]


def finished(run: Path, checkpoint: bool = False) -> None:
    process = CommandLine(command(run, checkpoint), cwd=ROOT)
    _, printed = process.communicate()
    assert process.returncode == 0, printed[-2000:]


def test_killed_and_resumed_equals_never_stopped(tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished(whole)
    process = CommandLine(command(killed, False), cwd=ROOT)
    deadline = time.monotonic() + 120
    while not list((killed / "checkpoints").glob("last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it had ended before it could be killed"
    assert not (killed / "saes").exists()
    finished(killed, checkpoint=True)
    for name in ("primary", "meta"):
        one, two = (load_file(run / "saes" / name / "sae_weights.safetensors") for run in (whole, killed))
        assert all((one[key] == two[key]).all() for key in one), name


@pytest.mark.parametrize("checkpoint", ["none.ckpt", "last"])
def test_a_missing_checkpoint_is_a_one_line_error(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [*command(tmp_path / "run", False), "--ckpt_path", checkpoint]
    assert main(arguments) == 2
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert line.startswith("metasae: error: --ckpt_path ") and checkpoint in line
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_the_earlier_logs(tmp_path: Path):
    for text in ("first", "second"):
        (tmp_path / "metrics.csv").write_text(text)
        default_loggers(str(tmp_path))
    assert (tmp_path / "metrics.1.csv").read_text() == "first" and (tmp_path / "metrics.2.csv").read_text() == "second"
