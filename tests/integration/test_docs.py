"""Commands, Python code, links and make targets in the documents work."""

import re
import shlex
from pathlib import Path

import pytest
from lightning import Trainer

from metasae_lightning import report
from metasae_lightning.cli import lightning_cli, main, measure
from metasae_lightning.cli import publish as publish_command
from metasae_lightning.cli.commands import is_lightning_test
from metasae_lightning.cli.lightning_cli import MetasaeCLI
from metasae_lightning.errors import InputError

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
FIT = re.compile(r"^    (metasae (?:fit|cache) [^#\n]*)", re.MULTILINE)
# The command line that a launcher runs: the words behind `cli.py` or `metasae`.
LAUNCHED = re.compile(r"^    (?:torchrun|srun) [^#\n]*?(?:cli\.py|metasae) (fit [^#\n]*)", re.MULTILINE)
MEASURING = re.compile(r"^    (metasae (?:test|evaluate|calibrate|compare|report|publish) [^#\n]*)", re.MULTILINE)
COMMANDS = [line.strip() for text in DOCUMENTS for line in FIT.findall(text.read_text().replace("\\\n", " ")) if "--help" not in line]
COMMANDS += [f"metasae {line.strip()}" for text in DOCUMENTS for line in LAUNCHED.findall(text.read_text().replace("\\\n", " "))]
# Overlays shown in a document, by file name.
OVERLAYS = dict(re.findall(r"`(\w+\.yaml)`:\n\n```yaml\n(.*?)```", "\n".join(text.read_text() for text in DOCUMENTS), re.DOTALL))
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_documents_have_commands_code_and_an_overlay():
    assert len(COMMANDS) >= 8 and len(BLOCKS) >= 2
    assert len([command for command in COMMANDS if "-c nodes" in command]) == 2  # with torchrun and with srun
    assert len(OVERLAYS) == len([command for command in COMMANDS if any(name in command for name in OVERLAYS)]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_a_fit_command_in_the_documents_parses(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    run_directories: list[str] = []
    monkeypatch.setattr(MetasaeCLI, "instantiate_classes", lambda self: run_directories.append(self.run_directory.as_posix()))
    monkeypatch.setattr(MetasaeCLI, "_run_subcommand", lambda self, subcommand: None)
    (tmp_path / "last.ckpt").touch()
    monkeypatch.setattr(lightning_cli, "last_checkpoint", lambda run: "last.ckpt")  # for commands that resume a run
    monkeypatch.setattr(lightning_cli, "check_settings", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    for name, overlay in OVERLAYS.items():
        Path(name).write_text(overlay)
    if ".help" in command:
        with pytest.raises(SystemExit, match=r"^0$"):
            main(shlex.split(command)[1:])
        return
    assert main(shlex.split(command)[1:]) == 0
    assert run_directories[0].startswith("runs/")


@pytest.mark.parametrize("command", [line.strip() for text in DOCUMENTS for line in MEASURING.findall(text.read_text())])
def test_an_evaluation_command_in_the_documents_parses(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def raise_with_count(sources: list[str], out: str | None = None) -> None:
        raise InputError(f"opens {len(sources)}")

    monkeypatch.setattr(measure, "open_saes", raise_with_count)
    monkeypatch.setattr(publish_command, "open_saes", raise_with_count)
    monkeypatch.setattr(report, "study", raise_with_count)
    words = shlex.split(command)[1:]
    if "--ckpt_path" in words:
        assert is_lightning_test(words)
        return
    assert main(words) == 2
    assert re.search(r"metasae: error: opens [12]$", capsys.readouterr().err.strip())


def test_the_readmes_example_with_own_activations_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (block,) = [block for block in BLOCKS if "JointSAE" in block]
    monkeypatch.chdir(tmp_path)
    quiet = "enable_progress_bar=False, enable_model_summary=False, logger=False"
    assert "logger=False" in block
    names: dict[str, object] = {"Trainer": Trainer}
    exec(block.replace("logger=False", quiet), names)
    assert int(names["module"].primary.steps) == 50  # type: ignore[attr-defined]
    assert int(names["module"].meta.steps) == 25  # type: ignore[attr-defined]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_in_the_documents_point_to_existing_files(document: Path):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
        assert (document.parent / link).exists(), link


def test_make_targets_named_in_the_documents_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for text in [*DOCUMENTS, ROOT / "CONTRIBUTING.md"] for name in re.findall(r"(?:`|    )make ([a-z-]+)", text.read_text())}
    assert {"quickstart", "test"} <= named <= targets
