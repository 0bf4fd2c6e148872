"""One process at a time trains in a run's folder or publishes to a destination; what a process that has ended left is taken over."""

import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jsonargparse import Namespace

from metasae_lightning import run_folder
from metasae_lightning.cli import lightning_cli, main, publish
from metasae_lightning.errors import InputError
from metasae_lightning.file_lock import file_lock

HERE = f"{os.getpid()} on {socket.gethostname()!r}"


def test_a_held_lock_refuses_others_and_names_its_holder(tmp_path: Path):
    with file_lock(tmp_path / "lock", "a run"):
        with pytest.raises(InputError, match=rf"^a run is being written by the process {HERE}: wait until it ends$"):  # noqa: SIM117
            with file_lock(tmp_path / "lock", "a run"):
                pass
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()  # the refused one has not changed it
    with file_lock(tmp_path / "lock", "a run"):  # free again
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "holder"),
    [
        (b'{"pid": 999999999, "host": "elsewhere"}', "999999999 on 'elsewhere'"),  # killed, or copied from another machine
        (b"", None),
        (b"[1]", None),
        (b'{"pid": "x"}', None),
    ],
)
def test_the_lock_of_an_ended_process_is_taken_and_told(
    content: bytes, holder: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "lock").write_bytes(content)
    with file_lock(tmp_path / "lock", "a run"):
        assert json.loads((tmp_path / "lock").read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}
    assert capsys.readouterr().err == (
        f"metasae: a run: the process {holder}, which held it, has ended: its lock is taken\n" if holder else ""
    )


def test_a_failed_block_leaves_no_file_and_no_empty_folder(tmp_path: Path):
    with pytest.raises(ValueError, match="no"), file_lock(tmp_path / "runs" / "a" / "lock", "a run"):
        raise ValueError("no")
    assert not list(tmp_path.iterdir())
    with file_lock(tmp_path / "runs" / "a" / "lock", "a run"):
        (tmp_path / "runs" / "a" / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "runs" / "a").iterdir()] == ["config.yaml"]


def test_a_second_run_in_a_folder_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    words = ["fit", "-c", "synthetic", "--run", str(run), "--data.init_args.tokens", "2048"]
    with file_lock(run_folder.lock_file(run), "it"):
        assert main(words) == 2
        line = capsys.readouterr().err.strip().split("\n")[-1]
        assert line == f"metasae: error: --run {run} is being written by the process {HERE}: wait until it ends"
    assert not run.exists()
    # The control, with what a killed run has left: it is trained, and its lock is gone at the end.
    run.mkdir()
    run_folder.lock_file(run).write_text('{"pid": 999999999, "host": "elsewhere"}')
    assert main(words) == 0
    assert "its lock is taken" in capsys.readouterr().err and not run_folder.lock_file(run).exists()


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_only_the_first_rank_locks_the_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(lightning_cli.MetasaeCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(lightning_cli.MetasaeCLI, "_run_subcommand", lambda self, subcommand: None)
    words = ["fit", "-c", "synthetic", "--run", str(tmp_path / "run")]
    with file_lock(run_folder.lock_file(tmp_path / "run"), "it"):
        for value, status in (("1", 0), ("0", 2)):
            monkeypatch.setenv(name, value)
            assert main(words) == status, capsys.readouterr().err


def test_a_second_publication_to_a_destination_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise InputError("it is published")

    sae = SimpleNamespace(run=tmp_path / "run", metadata={})
    for name, replacement in (("open_saes", lambda *_: [sae]), ("data_for", fail), ("recipe_of", fail), ("publish_run", fail)):
        monkeypatch.setattr(publish, name, replacement)
    options = {"private": None, "revision": None, "model_name": None, "dataset_path": None, "id": None, "tokens": None, "replace": False}
    args = Namespace(run="run", dest=str(tmp_path / "out"), **options)
    assert publish.lock_file("hf://owner/name", sae.run) == tmp_path / "run" / ".publish.lock"
    with pytest.raises(InputError, match="it is published"):
        publish.publish_saes(args)
    with (
        file_lock(publish.lock_file(str(tmp_path / "out"), sae.run), "it"),
        pytest.raises(InputError, match=rf"out is being written by the process {HERE}"),
    ):
        publish.publish_saes(args)
