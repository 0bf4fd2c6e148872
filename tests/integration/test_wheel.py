"""The wheel holds the files of the tree, the two linked folders included, and the light command line works from it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = "metasae_lightning"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, so that nothing is left behind in it, and without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "cli.py"):
        shutil.copy(ROOT / name, tree)
    for name in (OURS, "callbacks", "configs", "tests"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(tree)]
    built = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


# No file is lost, as setuptools' `find` loses the linked folders, and none is added, such as tests or cli.py.
def test_the_wheel_holds_the_package_as_the_tree_shows_it(wheel: Path):
    tree = {
        path.relative_to(ROOT).as_posix()
        for folder in [ROOT / OURS, *(child for child in (ROOT / OURS).iterdir() if child.is_dir())]
        for pattern in ("*.py", "*.yaml", "page.*")
        for path in folder.glob(pattern)
    }
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert shipped == tree


def test_the_command_ships_and_the_script_of_the_checkout_does_not(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    (entry,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "metasae = metasae_lightning.cli:main" in zipfile.ZipFile(wheel).read(entry).decode()
    assert "cli.py" not in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {OURS}


def test_the_unpacked_wheel_imports_its_callbacks_and_finds_its_recipes(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import metasae_lightning.callbacks as c; from importlib.resources import files; "
        "print(c.__path__[0]); print(*sorted(f.name for f in files('metasae_lightning').joinpath('configs').iterdir()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert ran.returncode == 0, ran.stderr
    where, recipes = ran.stdout.splitlines()
    assert Path(where) == tmp_path / OURS / "callbacks"
    assert set(recipes.split()) == {path.name for path in (ROOT / "configs").glob("*.yaml")}


def test_the_unpacked_wheel_lists_its_recipes(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "metasae_lightning.cli", "recipes"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert ran.returncode == 0, ran.stderr
    assert str(tmp_path) in ran.stdout and all(path.stem in ran.stdout for path in (ROOT / "configs").glob("*.yaml"))
