"""The command line answers at once what needs no computation, and finds each command."""

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from metasae_lightning.cli import main
from metasae_lightning.cli.commands import COMMANDS, TABLE
from metasae_lightning.cli.entry import run
from metasae_lightning.cli.recipes import RECIPES, is_recipe, recipe_names, recipe_path, summary, with_recipe_paths
from metasae_lightning.errors import InputError

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "lightning", "sae_lens", "transformers", "datasets", "numpy", "matplotlib")
# Loaded machines need several times what an idle one does; importing torch alone takes longer than this.
SECONDS = 4.0
INSTANT: dict[str, tuple[list[str], int]] = {
    "no argument": ([], 0),
    "help": (["--help"], 0),
    "version": (["--version"], 0),
    "recipes": (["recipes"], 0),
    "completion": (["completion", "bash"], 0),
    "mistyped command": (["fti"], 2),
    "mistyped recipe": (["fit", "-c", "quickstrt"], 2),
    "mistyped option": (["compare", "runs/a", "runs/b", "--rul", "rate"], 2),
    **{f"{name} --help": ([name, "--help"], 0) for name in COMMANDS},
}


def in_new_process(code: str) -> Any:
    """What the last line of `code`'s output says, as JSON."""
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL, env=environment)
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", INSTANT)
def test_an_answer_without_computation_imports_nothing_heavy(case: str):
    words, status = INSTANT[case]
    begin = time.monotonic()
    code = (
        "import json, sys; from metasae_lightning.cli import main; "
        f"status = main({words!r}); print(); print(json.dumps([status, [name for name in {HEAVY!r} if name in sys.modules]]))"
    )
    assert in_new_process(code) == [status, []]
    assert time.monotonic() - begin < SECONDS


# Triton's bindings would print a line for each object that the interpreter does not free at its end.
def test_a_command_in_its_own_process_freezes_modules_only_while_it_runs(monkeypatch: pytest.MonkeyPatch):
    frozen: list[int] = []
    monkeypatch.setattr("metasae_lightning.memory.malloc.keep_freed_blocks", lambda: frozen.append(gc.get_freeze_count()))
    monkeypatch.setattr("metasae_lightning.cli.recipes.list_recipes", lambda args: 1 // 0)
    before = gc.get_freeze_count()
    with pytest.raises(ZeroDivisionError):
        run(["recipes"], owns_process=True)
    assert frozen[0] > before and gc.get_freeze_count() == 0


def test_importing_the_package_imports_nothing_heavy():
    begin = time.monotonic()
    code = f"import json, sys, metasae_lightning; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    assert in_new_process(code) == []
    assert time.monotonic() - begin < SECONDS


def test_help_lists_every_command_with_its_line(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    text = capsys.readouterr().out
    wanted = {"fit", "validate", "test", "cache", "evaluate", "calibrate", "compare", "report", "publish"}
    assert COMMANDS.keys() == wanted | {"export-dashboard", "saebench", "serve", "judge", "recipes", "completion"}
    assert all(f"  {command.name} " in text and command.summary in text for command in TABLE)
    assert main(["--help"]) == 0 and capsys.readouterr().out == text


def test_a_closed_pipe_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        command = [sys.executable, "-m", "metasae_lightning.cli", "--help"]
        ran = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, check=False, stdin=subprocess.DEVNULL)
    assert (ran.returncode, ran.stderr) == (141, b"")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_has_one_example_of_that_command(name: str, capsys: pytest.CaptureFixture[str]):
    for flag in ("-h", "--help"):
        assert main([name, flag]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert text.count("Example: ") == 1 and f"Example: {COMMANDS[name].example}" in text
        assert f"metasae {name}" in COMMANDS[name].example


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fti"], "there is no command fti (did you mean fit?)"),
        (["xyzzy"], "there is no command xyzzy; see metasae --help"),
        (["--versoin"], "there is no option --versoin (did you mean --version?)"),
        (["fit", "-c", "quickstrt"], "-c quickstrt: there is no such file or recipe (did you mean quickstart?)"),
        (["fit", "--config=soloo"], "--config soloo: there is no such file or recipe (did you mean solo?)"),
        (["fit", "-c", "quickstart", "-c", "folder/contrl.yaml"], "(did you mean control?)"),
        (["fit", "-cquickstrat"], "-c quickstrat: there is no such file or recipe (did you mean quickstart?)"),
        (["fit", "-c=quickstrat"], "-c quickstrat: there is no such file or recipe (did you mean quickstart?)"),
        (["fit", "-c", "{arms: null"], "-c: not YAML: line 1, column 12: expected ',' or '}'"),
        (["fit", "-c", ""], "-c needs a file or a recipe"),
        (["fit", "-c", "xyzzy"], "-c xyzzy: there is no such file or recipe (`metasae recipes` lists the recipes)"),
        (["evaluate", "runs/a", "--data", "quickstrt"], "--data quickstrt: there is no such file or recipe (did you mean quickstart?)"),
        (["compare", "a", "b", "--rul", "rate"], "there is no option rul (did you mean rule?)"),
        (["completion", "fish"], "invalid choice: 'fish'"),
    ],
)
def test_a_mistake_is_one_line_that_offers_the_closest_name(words: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    assert main(words) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("metasae: error: ") and output.err.count("\n") == 1
    assert says in output.err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "there are no settings in it: write them as `key: value`"),
        (b"# a comment", "there are no settings"),
        (b"- a", "there are no settings"),
        (b"5", "there are no settings"),
        (b"# caf\xe9", "the file is not UTF-8 text (byte 6): save it as UTF-8"),
        (b"a:\n\tb: 1", "not YAML: line 2, column 1: found character"),
        (b"a: 2001-99-99", "not YAML: month must be in 1..12"),
        (b"[" * 5000, "not YAML: "),
        (None, "a folder is no recipe: name a file"),
    ],
)
@pytest.mark.parametrize("words", [["fit", "-c"], ["cache", "-c", "synthetic", "--config"], ["evaluate", "run", "--data"]])
def test_a_file_without_settings_is_one_line_that_names_it(
    words: list[str], content: bytes | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "recipe.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    assert main([*words, str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"metasae: error: {words[-1]} {path}: ") and says in error and error.count("\n") == 1


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("METASAE_DEBUG", "1")
    with pytest.raises(InputError, match="there is no command fti"):
        main(["fti"])


@pytest.mark.parametrize(("name", "number"), [("RANK", 3), ("SLURM_PROCID", 5), ("RANK", 0)])
def test_an_error_beside_other_ranks_names_the_rank_before_lightning_is_imported(name: str, number: int):
    code = (
        f"import io, json, os, sys; os.environ[{name!r}] = '{number}'; sys.stderr = io.StringIO(); "
        "from metasae_lightning.cli import main; main(['fti']); print(json.dumps(sys.stderr.getvalue()))"
    )
    assert in_new_process(code).startswith(f"metasae: error: {f'rank {number}: ' if number else ''}there is no command")


def test_every_recipe_is_listed_with_its_first_line(capsys: pytest.CaptureFixture[str]):
    assert main(["recipes"]) == 0
    recipes, overlays = capsys.readouterr().out.split("overlays")
    for path in RECIPES.glob("*.yaml"):
        line = summary(path)
        assert path.read_text().startswith(f"# {line}\n") and 20 < len(line) <= 120 and line.endswith(".")
        assert line in (recipes if is_recipe(path) else overlays)
    assert {path.stem for path in RECIPES.glob("*.yaml") if is_recipe(path)} == {
        "quickstart",
        "synthetic",
        "gpt2_large_l20",
        "gemma2_9b_l23",
    }


def test_a_recipe_name_becomes_a_path_and_everything_else_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    solo = str(RECIPES / "solo.yaml")
    assert with_recipe_paths(["fit", "-c", "solo", "--config", "solo.yaml", "--config=solo"]) == [
        *("fit", "-c", solo, "--config", solo),
        f"--config={solo}",
    ]
    assert with_recipe_paths(["fit", "--run", "solo", "--data", "SyntheticDataModule"]) == [
        "fit",
        "--run",
        "solo",
        "--data",
        "SyntheticDataModule",
    ]
    assert with_recipe_paths(["evaluate", "solo", "--data", "solo"], data_is_recipe=True) == ["evaluate", "solo", "--data", solo]
    assert recipe_path("{arms: null}") == "{arms: null}" and recipe_path("arms: null") == "arms: null"
    assert with_recipe_paths(["fit", "-csolo", "-c=solo"]) == ["fit", f"--config={solo}", f"--config={solo}"]
    (tmp_path / "solo").write_text("arms: null")
    assert recipe_path("solo") == "solo"
    with pytest.raises(InputError, match="no such file or recipe"):
        recipe_path("../solo")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_that_its_shell_reads(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in (*COMMANDS, *recipe_names(), "--memory_gib", "--grid", "--rule", "--private"):
        assert word in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        assert subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, check=False).stderr == b""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("metasae ca", {"cache", "calibrate"}),
        ("metasae fit -c quick", {"quickstart", "quickstart_grid", "quickstart_seeds"}),
        ("metasae fit --mem", {"--memory_gib"}),
        ("metasae compare --rul", {"--rule"}),
    ],
)
def test_bash_completes_commands_recipes_and_options(typed: str, offered: set[str], capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["completion", "bash"]) == 0
    words = typed.split()
    script = (
        f"{capsys.readouterr().out}\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; COMP_LINE='{typed}'; "
        f"COMP_POINT={len(typed)}; _shtab_metasae; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert {word.strip() for word in ran.stdout.split()} == offered
