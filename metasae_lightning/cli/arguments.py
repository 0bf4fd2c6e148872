"""What the measuring commands are given: SAEs by their places, the data to read, the settings."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning import LightningDataModule

from metasae_lightning.cli.parser_errors import complaint
from metasae_lightning.data.datamodule import ActivationsDataModule
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.evaluate import Settings
from metasae_lightning.evaluation.saes import Subject, check_same_activations, corpus_of, model_of, subject
from metasae_lightning.lm import device
from metasae_lightning.run_folder import arms_in, config_of

PLACES = "Runs, SAELens folders, or SAEs on the Hub as RELEASE:ID."


def parser_of(name: str, description: str) -> ArgumentParser:
    """A command's parser, with what all of them take."""
    parser = plain_parser(name, description)
    parser.add_class_arguments(Settings, as_group=True)
    parser.add_argument(
        "--data", type=str | None, default=None, help="Recipe or run's config.yaml whose data are read; none is the first SAE's own."
    )
    parser.add_argument("--device", type=str | None, default=None, help="Where the language model and the SAEs are; none is the recipe's.")
    parser.add_argument("--out", type=str | None, default=None, help="Where results go; none is the run, or under runs/.")
    return parser


def plain_parser(name: str, description: str) -> ArgumentParser:
    """A parser whose complaints are lines of ours."""
    return ArgumentParser(prog=f"metasae {name}", description=description, exit_on_error=False, allow_abbrev=False)


def parsed(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """The arguments; what is wrong with them in one line."""
    try:
        return parser.parse_args(list(args))
    except ArgumentError as error:
        raise InputError(complaint(error, parser.get_defaults().keys())) from error


def settings_of(given: Namespace) -> Settings:
    """What is measured."""
    return Settings(**{field.name: given[field.name] for field in fields(Settings)})


def opened(places: Sequence[str], out: str | None) -> list[Subject]:
    """The SAEs of these places, each under a name of its own."""
    if out is not None and len(places) > 1:
        raise InputError("out: several SAEs' results go into their own folders")
    subjects = [subject(place, out=out) for place in places]
    names = [one.name for one in subjects]
    subjects = [one if names.count(one.name) == 1 else replace(one, name=one.place) for one in subjects]
    check_same_activations(subjects)
    return subjects


def all_arms(places: Sequence[str]) -> list[str]:
    """Places with a run of several arms replaced by its arms."""
    return [arm for place in places for arm in ([str(Path(place) / "arms" / name) for name in arms_in(Path(place))] or [place])]


def data_for(one: Subject, given: Namespace) -> Any:
    """The data that a recipe names, or a run was made on, or an SAE says it was."""
    recipe = given.data or (None if one.run is None else one.run / "config.yaml")
    if recipe is not None:
        data = data_of(Path(recipe))
    else:
        told = one.metadata
        skip = (told.get("seqpos_slice") or [0])[0] or 0
        sizes: dict[str, Any] = {"context_size": told.get("context_size") or 128, "prepend_bos": told.get("prepend_bos", True)}
        sizes |= {"held_out": told.get("held_out") or 0.05, "max_norm_ratio": told.get("max_norm_ratio")}
        data = ActivationsDataModule(model_of(one), corpus_of(one), tokens=4096, skip_positions=skip, **sizes)
    if given.device is not None and isinstance(data, ActivationsDataModule):
        data.language_model.place(device.found(given.device))
    return data


def check_same_data(subjects: Sequence[Subject], given: Namespace) -> None:
    """What one run holds out another may have been trained on."""
    runs = [one for one in subjects if one.run is not None]
    if given.data is not None or len(runs) < 2:
        return
    first, *others = (tree_of(one.run / "config.yaml")["data"].get("init_args", {}) for one in runs if one.run is not None)
    for one, other in zip(runs[1:], others, strict=True):
        for key in ("corpus", "held_out", "skip_positions", "max_norm_ratio", "context_size", "prepend_bos", "cross_document_attention"):
            if first.get(key) != other.get(key):
                said = f"{key} is {first.get(key)} and {other.get(key)}"
                raise InputError(
                    f"{runs[0].place} and {one.place} were made on other data ({said}): say which to measure on, --data RECIPE.yaml"
                )


def data_of(path: Path) -> Any:
    """The data module of a recipe or of a run's config."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    return parser.instantiate_classes(parser.parse_object({"data": tree_of(path)["data"]}))["data"]


def recipe_of(one: Subject) -> dict[str, Any]:
    """The recipe of a run; of an arm, the recipe that trains it alone."""
    assert one.run is not None
    tree = tree_of(one.run / "config.yaml")
    return {**tree, "model": tree["model"]["init_args"]["arms"][one.arm]} if one.arm else tree


def tree_of(path: Path) -> dict[str, Any]:
    """A recipe that has data."""
    tree = config_of(path)
    if not isinstance(tree.get("data"), dict):
        raise InputError(f"{path} is no recipe: it has no data")
    return tree
