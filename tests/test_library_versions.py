"""Libraries that exclude each other: one line names the bound, from sae-lens's own metadata."""

import sys
from importlib import metadata
from typing import Any

import pytest

from metasae_lightning.cli import main
from metasae_lightning.lazy_exports import lazy_exports
from metasae_lightning.library_versions import version_conflict

own_version = metadata.version


def install(monkeypatch: pytest.MonkeyPatch, version: str, bound: str = ">=2.16.1,<4.0.0") -> None:
    """Let the metadata of the installed packages name this transformer-lens, and this bound of sae-lens."""
    versions = {"transformer-lens": version, "sae-lens": "6.54.12"}
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or own_version(name))
    monkeypatch.setattr(metadata, "requires", lambda name: [f"transformer-lens{bound}", "torch>=2"])


LINE = "sae-lens 6.54.12 needs transformer-lens<4.0.0,>=2.16.1, and 4.3.0 is installed: pip install 'transformer-lens<4.0.0,>=2.16.1'"


def test_the_bound_is_sae_lenss_own_and_follows_it(monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch, "3.9.0")
    assert version_conflict() is None
    install(monkeypatch, "4.3.0")
    assert version_conflict() == LINE
    install(monkeypatch, "4.3.0", ">=4.2,<5")
    assert version_conflict() is None


def fail(*_: Any, **__: Any) -> int:
    raise ModuleNotFoundError("No module named 'transformer_lens.utils'", name="transformer_lens.utils")


def test_a_failed_import_prints_the_bound_and_any_other_stays_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("metasae_lightning.cli.entry.run", fail)
    install(monkeypatch, "4.3.0")
    assert main(["fit"]) == 2
    assert capsys.readouterr().err == f"metasae: error: {LINE}\n"
    install(monkeypatch, "3.9.0")
    with pytest.raises(ModuleNotFoundError, match="utils"):
        main(["fit"])


def test_a_class_imported_on_first_use_names_the_bound_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules["metasae_lightning.lazy_exports"], "import_module", fail)
    get, _ = lazy_exports("metasae_lightning", {"JointSAE": "metasae_lightning.training.joint"})
    install(monkeypatch, "4.3.0")
    with pytest.raises(ImportError, match=r"needs transformer-lens<4\.0\.0.* 4\.3\.0 is installed"):
        get("JointSAE")
    install(monkeypatch, "3.9.0")
    with pytest.raises(ImportError, match="No module named"):
        get("JointSAE")
