"""LightningCLI behind the `metasae` command: its full help, its options, and the names that it resolves."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.utilities.exceptions import SIGTERMException

from metasae_lightning import callbacks, corpora
from metasae_lightning.cli import lightning_cli, main
from metasae_lightning.cli.commands import COMMANDS
from metasae_lightning.cli.parser_errors import import_hint
from metasae_lightning.cli.plugins import argument_names, class_names, load_plugins

ROOT = Path(__file__).parents[2]
LIGHTNING_COMMANDS = [command for command in COMMANDS.values() if command.is_lightning]


# The short help is kept by hand: each of its options must be one of the real parser.
@pytest.mark.parametrize("command", LIGHTNING_COMMANDS, ids=lambda command: command.name)
def test_all_options_of_the_short_help_are_options_of_lightning_cli(command, capsys: pytest.CaptureFixture[str]):
    assert main([command.name, "--help_all"]) == 0
    text = capsys.readouterr().out
    options = set(re.findall(r"--[a-z_]\w*(?:\.\w+)*|-c\b", text))
    assert {"--trainer.max_epochs", "--model.help", "--data.help"} <= options
    assert {name for option, _, _ in command.options for name in option.split("/")} <= options


def test_help_all_of_test_is_lightnings_and_help_lists_our_options(capsys: pytest.CaptureFixture[str]):
    assert main(["test", "--help_all"]) == 0
    assert "--trainer.max_epochs" in capsys.readouterr().out
    assert main(["test", "--help"]) == 0
    assert "--splice_tokens" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["fit", "-c", "synthetic", "-c", "solo", "--print_config"], ["-c", "none.yaml", "fit"]])
def test_print_config_and_options_before_the_command_reach_the_parser(words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path):
    if "none.yaml" in words:
        assert main(words) == 2 and "-c none.yaml: there is no such file or recipe" in capsys.readouterr().err
        return
    with pytest.raises(SystemExit) as exit_error:
        main(words)
    assert exit_error.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["run"] == "runs/synthetic" and config["model"]["init_args"]["meta"] is None


# In a new process, where no other test has imported the classes.
def test_short_class_names_resolve_before_their_modules_are_imported(tmp_path: Path):
    recipe = yaml.safe_load((ROOT / "configs" / "synthetic.yaml").read_text())
    recipe["model"]["class_path"], recipe["data"]["class_path"] = "JointSAE", "SyntheticDataModule"
    recipe["trainer"]["callbacks"] = [{"class_path": "Summary"}, {"class_path": "metasae_lightning.callbacks.HeldOut"}]
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "metasae_lightning.cli", "fit", "-c", str(tmp_path / "short.yaml"), "--print_config"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, ran.stderr
    config = yaml.safe_load(ran.stdout)
    # Saved paths are short, as in the config.yaml of earlier runs.
    assert config["model"]["class_path"] == "metasae_lightning.JointSAE"
    assert config["data"]["class_path"] == "metasae_lightning.SyntheticDataModule"
    names = [callback["class_path"] for callback in config["trainer"]["callbacks"]]
    assert names == ["metasae_lightning.callbacks.Summary", "metasae_lightning.callbacks.HeldOut"]
    penalties = config["model"]["init_args"]["penalties"].values()
    assert {penalty["class_path"] for penalty in penalties} == {"metasae_lightning.penalties.Decomposability"}


def test_suggestions_in_errors_include_our_classes_and_arguments():
    load_plugins()
    assert {*callbacks.__all__, "TextFiles", "HuggingFaceLM", "Decomposability", "JointSAE", "SyntheticDataModule"} <= class_names()
    assert {"n_p", "weight", "batch_size", "hook"} <= argument_names()
    assert {"HubText", "SavedDataset", "PythonDocs", "InMemory"} <= {*corpora.__all__} & class_names()


def test_a_missing_module_of_the_current_folder_is_an_error_that_says_how_to_import_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert import_hint("No module named 'mine'") == ""
    (tmp_path / "mine.py").touch()
    assert "python -m metasae_lightning.cli" in import_hint("No module named 'mine'")
    (tmp_path / "ours").mkdir()
    assert "python -m metasae_lightning.cli" in import_hint("No module named 'ours.penalties'")


def interrupt_as_lightning_does(*_: Any) -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def end_as_lightning_does_on_sigterm(*_: Any) -> None:
    raise SIGTERMException


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (interrupt_as_lightning_does, 130),
        (end_as_lightning_does_on_sigterm, 143),
        (lambda *_: sys.exit(129), 129),
        (lambda *_: None, 0),
    ],
)
def test_a_run_that_was_told_to_stop_has_the_exit_status_of_the_signal(
    end: Callable[..., None], status: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lightning_cli, "run_command", end)
    assert main(["fit", "-c", "synthetic"]) == status
    monkeypatch.setattr(lightning_cli, "run_command", lambda *_: sys.exit(1))  # the control: another end is not hidden
    with pytest.raises(SystemExit, match=r"^1$"):
        main(["fit", "-c", "synthetic"])
