"""The data module that a recipe, or a run's `config.yaml`, describes."""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning import LightningDataModule

from metasae_lightning.errors import InputError
from metasae_lightning.run_folder import read_config

# The packages whose classes the data of a recipe name.
PACKAGES = ("metasae_lightning.corpora", "metasae_lightning.data", "metasae_lightning.lm")


def data_of(path: Path) -> Any:
    """The data module that a recipe or a run's config.yaml describes."""
    import_classes(PACKAGES)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    return parser.instantiate_classes(parser.parse_object({"data": tree_of(path)["data"]}))["data"]


def tree_of(path: Path) -> dict[str, Any]:
    """The content of a config file; a file that describes no data is an `InputError`."""
    tree = read_config(path)
    if not isinstance(tree.get("data"), dict):
        raise InputError(f"{path} is no recipe: it has no data")
    return tree


def import_classes(packages: Iterable[str]) -> None:
    """Import every class that these packages export: jsonargparse resolves short names, such as `PythonDocs`, among imported ones only."""
    for package in map(importlib.import_module, packages):
        for name in package.__all__:
            getattr(package, name)
