"""The wheel has the files of the source tree, including the two linked folders, and the command line works from it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "metasae_lightning"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built without the network from a copy of the tree, so that no build files are left in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "cli.py"):
        shutil.copy(ROOT / name, tree)
    for name in (PACKAGE, "callbacks", "configs", "tests"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(tree)]
    built = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


# setuptools' `find` would lose the linked folders; tests and cli.py must not be added.
def test_the_wheel_has_exactly_the_files_of_the_package(wheel: Path):
    tree = {
        path.relative_to(ROOT).as_posix()
        # Folders that are links, such as that of the callbacks, are followed.
        for folder in [ROOT / PACKAGE, *(child for child in (ROOT / PACKAGE).iterdir() if child.is_dir())]
        for pattern in ("**/*.py", "**/*.yaml", "**/page.*", "**/prompts/*.txt", "**/py.typed")
        for path in folder.glob(pattern)
    }
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert shipped == tree


def test_the_wheel_has_the_metasae_command_and_not_cli_py(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    (entry,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "metasae = metasae_lightning.cli:main" in zipfile.ZipFile(wheel).read(entry).decode()
    assert "cli.py" not in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {PACKAGE}


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
    callbacks_folder, recipes = ran.stdout.splitlines()
    assert Path(callbacks_folder) == tmp_path / PACKAGE / "callbacks"
    assert set(recipes.split()) == {path.name for path in (ROOT / "configs").glob("*.yaml")}


def test_the_unpacked_wheel_lists_its_recipes(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "metasae_lightning.cli", "recipes"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert ran.returncode == 0, ran.stderr
    assert str(tmp_path) in ran.stdout and all(path.stem in ran.stdout for path in (ROOT / "configs").glob("*.yaml"))
