"""Packages whose names are imported on first use."""

import ast
import importlib
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import metasae_lightning
from metasae_lightning.lazy_exports import lazy_exports

ROOT = Path(metasae_lightning.__file__).parent
LAZY = ["", *sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if "lazy_exports" in path.read_text())]


def package_of(name: str):
    return importlib.import_module(f"metasae_lightning.{name}".rstrip("."))


def test_every_package_that_exports_names_is_lazy():
    assert set(LAZY) == {"", "callbacks", "compute", "corpora", "data", "evaluation", "lm", "metrics", "report", "sae", "training"}


# A type checker reads the imports, Python the table: both must say the same of every name.
@pytest.mark.parametrize("name", LAZY)
def test_the_imports_for_type_checkers_are_the_lazy_names(name: str):
    package = package_of(name)
    tree = ast.parse(Path(str(package.__file__)).read_text())
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [(alias.name, node.module) for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(exported for exported, _ in imports) == sorted(package.__all__)
    for exported, module in imports:
        assert getattr(package, exported) is getattr(importlib.import_module(str(module)), exported)
        assert exported in dir(package)


# Importing the submodule would put the module in the place of the exported function of the same name.
@pytest.mark.parametrize("name", LAZY)
def test_no_exported_name_is_a_submodules(name: str):
    package = package_of(name)
    assert not set(package.__all__) & {module.name for module in pkgutil.iter_modules(package.__path__)}


def test_classes_pickle_by_reference_and_submodules_are_attributes():
    code = (
        "import pickle, metasae_lightning; from metasae_lightning.corpora import TextFiles; "
        "assert pickle.loads(pickle.dumps(TextFiles)) is TextFiles; "
        "assert pickle.loads(pickle.dumps(metasae_lightning.JointSAE)) is metasae_lightning.JointSAE; "
        "assert metasae_lightning.run_folder.__name__ == 'metasae_lightning.run_folder'"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT.parent)
    assert ran.returncode == 0, ran.stderr
    assert pickle.loads(pickle.dumps(metasae_lightning.JointSAE)) is metasae_lightning.JointSAE


def test_a_missing_name_is_an_attribute_error_and_a_broken_submodule_shows_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(AttributeError, match="module 'metasae_lightning' has no attribute 'JointSAEs'"):
        _ = metasae_lightning.JointSAEs
    (tmp_path / "faulty").mkdir()
    (tmp_path / "faulty" / "__init__.py").touch()
    (tmp_path / "faulty" / "broken.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("faulty")
    get, _ = lazy_exports("faulty", {})
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        get("broken")
