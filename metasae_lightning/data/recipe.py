"""Builds the data module that a recipe, or a run's `config.yaml`, describes."""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning import LightningDataModule

from metasae_lightning.errors import InputError
from metasae_lightning.run_folder import read_config

# The packages that export the classes in a recipe's data.
PACKAGES = ("metasae_lightning.corpora", "metasae_lightning.data", "metasae_lightning.lm")


def data_of(path: Path) -> Any:
    """The data module that a recipe or a run's config.yaml describes."""
    import_classes(PACKAGES)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    return parser.instantiate_classes(parser.parse_object({"data": tree_of(path)["data"]}))["data"]


def tree_of(path: Path) -> dict[str, Any]:
    """The content of a recipe or config file; a file without `data` is an `InputError`."""
    tree = read_config(path)
    if not isinstance(tree.get("data"), dict):
        raise InputError(f"{path} is no recipe: it has no data")
    return tree


def import_classes(packages: Iterable[str]) -> None:
    """Import every class that these packages export, because jsonargparse finds a short name, such as `PythonDocs`, only then."""
    for package in map(importlib.import_module, packages):
        for name in package.__all__:
            getattr(package, name)
