"""The classes that YAML can name. jsonargparse resolves short names such as `Decomposability` among the imported subclasses only."""

import inspect
from collections.abc import Iterator
from typing import Any

from jsonargparse.typing import register_type
from lightning.pytorch import Callback, LightningDataModule, LightningModule

from metasae_lightning.corpora.base import Corpus
from metasae_lightning.data import ActivationsDataModule, SyntheticDataModule
from metasae_lightning.data.recipe import import_classes
from metasae_lightning.lm.base import LanguageModel
from metasae_lightning.penalties import Penalty
from metasae_lightning.sae import SAEMetadata
from metasae_lightning.training import JointSAE

BASES = (Penalty, Corpus, LanguageModel, Callback, LightningModule, LightningDataModule)
PACKAGES = tuple(f"metasae_lightning{package}" for package in ("", ".callbacks", ".corpora", ".data", ".lm", ".training"))

# Metadata that SAELens derives from the config and its own version.
DERIVED = {"sae_lens_version", "sae_lens_training_version", "training_architecture", "training_architecture_details"}


def load_plugins() -> None:
    """Import every class that a recipe can name."""
    import_classes(PACKAGES)


def class_names() -> set[str]:
    """The short names of all imported classes that YAML can name."""
    return {cls.__name__ for base in BASES for cls in descendants(base)}


def argument_names() -> set[str]:
    """The argument names of this package's classes that YAML can name."""
    ours = [cls for base in BASES for cls in descendants(base) if cls.__module__.startswith("metasae_lightning.")]
    return {name for cls in ours for name in inspect.signature(cls).parameters}


def argument_options() -> dict[str, str]:
    """The option of each argument of the model and of the data modules, such as `--model.n_p`, by the argument's name.

    A recipe with arms has the same options: its model is what the arms change.
    """
    owners = {"data": (ActivationsDataModule, SyntheticDataModule), "model": (JointSAE,)}
    return {name: f"--{key}.{name}" for key, classes in owners.items() for cls in classes for name in inspect.signature(cls).parameters}


def descendants(cls: type) -> Iterator[type]:
    """A class and all its subclasses."""
    yield cls
    for child in cls.__subclasses__():
        yield from descendants(child)


def user_metadata(metadata: SAEMetadata) -> dict[str, Any]:
    """The metadata that the user gave in a config, without those that SAELens derives.

    jsonargparse shares one default object among all configs, so what SAELens derives for one SAE could be read for another.
    """
    return {key: value for key, value in metadata.items() if key not in DERIVED}


# jsonargparse could write SAEMetadata, which has no fixed fields, but not read it back.
register_type(SAEMetadata, serializer=user_metadata, deserializer=lambda record: SAEMetadata(**record))
