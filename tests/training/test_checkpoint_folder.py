"""Checkpoints from outside: a crafted file or folder is refused in one line, runs nothing, and the checkpoint before it is used."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from metasae_lightning.cli import main
from metasae_lightning.errors import InputError
from metasae_lightning.training.checkpoint_files import AtomicCheckpointIO, last_checkpoint
from metasae_lightning.training.checkpoint_folder import part_checksums, write_checksums
from tests.helpers.checkpoints import RunsCode, write_parts

REFUSED = (
    r"tokens=2\.ckpt was refused, and nothing in it was run \(it names posix\.mkdir: a checkpoint holds tensors and plain values alone\)"
)


def write_folder(folder: Path, state: dict[str, Any] | None = None, content: Any = None) -> None:
    weights = {
        "weights": torch.ones(4),
        "half": torch.ones(2).bfloat16(),
        "mask": torch.ones(2, dtype=torch.bool),
        "count": torch.tensor(3),
    }
    write_parts(folder, {"state_dict": weights, **(state or {})}, content)


def craft(path: Path, kind: str, hostile: RunsCode) -> None:
    """Write a checkpoint with a pickle that runs code: in a file, or in one place of a folder whose checksums are right."""
    if kind == "file":
        torch.save({"state_dict": {"weights": torch.ones(4)}, "callbacks": hostile}, path)
        return
    optimizer = {"state": {}, "param_groups": [{"params": ["weights"], "lr": hostile if kind == "parts" else 0.1}]}
    write_folder(path, {"optimizer_0": optimizer}, {"epoch": hostile} if kind == "content" else None)
    if kind == "list of parts":
        (path / ".metadata").write_bytes(pickle.dumps(hostile))
    write_checksums(path, part_checksums(path, 0))


@pytest.mark.parametrize("kind", ["file", "content", "list of parts", "parts"])
def test_a_crafted_checkpoint_is_refused_and_the_one_before_it_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str):
    folder, made = tmp_path / "checkpoints", tmp_path / "made"
    write_folder(folder / "tokens=1.ckpt")
    write_checksums(folder / "tokens=1.ckpt", part_checksums(folder / "tokens=1.ckpt", 0))
    craft(folder / "tokens=2.ckpt", kind, RunsCode(made))
    for number in (1, 2):
        os.utime(folder / f"tokens={number}.ckpt", ns=(number, number))
    with pytest.raises(InputError, match=REFUSED):
        AtomicCheckpointIO().load_checkpoint(folder / "tokens=2.ckpt", weights_only=False)
    assert last_checkpoint(tmp_path) == str(folder / "tokens=1.ckpt")
    assert "tokens=2.ckpt was refused" in capsys.readouterr().err and not made.exists()
    assert AtomicCheckpointIO().load_checkpoint(folder / "tokens=1.ckpt")["state_dict"]["weights"].tolist() == [1, 1, 1, 1]
    # The control: plain pickle runs it.
    pickle.loads(pickle.dumps(RunsCode(made)))
    assert made.exists()


@pytest.mark.parametrize(("kind", "reason"), [("file", "was refused, and nothing in it was run"), ("damaged", "is damaged")])
def test_a_run_on_a_crafted_or_damaged_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, reason: str):
    checkpoint = tmp_path / "tokens=2.ckpt"
    checkpoint.write_bytes(b"PK damaged")
    if kind == "file":
        craft(checkpoint, kind, RunsCode(tmp_path / "made"))
    assert main(["fit", "-c", "synthetic", "--run", str(tmp_path / "run"), "--ckpt_path", str(checkpoint)]) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert line.startswith(f"metasae: error: the checkpoint {checkpoint} {reason}") and "weights_only" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["tokens=2.ckpt"]


def test_a_state_that_would_be_refused_is_not_written(tmp_path: Path):
    with pytest.raises(InputError, match=r"cannot be written.*it was refused.*it names posix\.mkdir"):
        AtomicCheckpointIO().save_checkpoint({"callbacks": RunsCode(tmp_path / "made")}, tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())
