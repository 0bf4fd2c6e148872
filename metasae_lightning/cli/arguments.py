"""Objects from a measuring command's arguments: the SAEs, the data module, the settings."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning import LightningDataModule

from metasae_lightning.cli.plugins import load_plugins
from metasae_lightning.data.datamodule import ActivationsDataModule
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.saes import EvaluatedSAE, check_same_activations, corpus_of, language_model_of, load_sae
from metasae_lightning.evaluation.settings import Settings
from metasae_lightning.lm import device
from metasae_lightning.run_folder import arm_folder, config_file, exported_arms, read_config


def settings_of(args: Namespace) -> Settings:
    """The evaluation settings among a command's arguments."""
    return Settings(**{field.name: args[field.name] for field in fields(Settings)})


def open_saes(places: Sequence[str], out: str | None) -> list[EvaluatedSAE]:
    """Load the SAEs at these places, under unique names. `out` is the folder of results, for a single SAE only.

    SAEs that do not read the same activations are an `InputError`.
    """
    if out is not None and len(places) > 1:
        raise InputError("out: the results of several SAEs go into the folder of each")
    subjects = [load_sae(place, out=out) for place in places]
    names = [sae.name for sae in subjects]
    subjects = [sae if names.count(sae.name) == 1 else replace(sae, name=sae.source) for sae in subjects]
    check_same_activations(subjects)
    return subjects


def places_of_arms(places: Sequence[str]) -> list[str]:
    """The places, with each run of several arms replaced by the folders of its exported arms."""
    return [arm for place in places for arm in ([str(arm_folder(Path(place), name)) for name in exported_arms(Path(place))] or [place])]


def data_for(sae: EvaluatedSAE, args: Namespace) -> Any:
    """The data module of `--data`, else of the SAE's run, else one built from the SAE's metadata; `--device` sets its device."""
    recipe = args.data or (None if sae.run is None else config_file(sae.run))
    if recipe is not None:
        data = data_of(Path(recipe))
    else:
        metadata = sae.metadata
        skip = (metadata.get("seqpos_slice") or [0])[0] or 0
        sizes: dict[str, Any] = {"context_size": metadata.get("context_size") or 128, "prepend_bos": metadata.get("prepend_bos", True)}
        sizes |= {"held_out": metadata.get("held_out") or 0.05, "max_norm_ratio": metadata.get("max_norm_ratio")}
        data = ActivationsDataModule(language_model_of(sae), corpus_of(sae), tokens=4096, skip_positions=skip, **sizes)
    if args.device is not None and isinstance(data, ActivationsDataModule):
        data.language_model.set_device(device.parse_device(args.device))
    return data


def check_same_data(saes: Sequence[EvaluatedSAE], args: Namespace) -> None:
    """Reject runs on different data without `--data`: one run may have trained on the text that another holds out."""
    runs = [sae for sae in saes if sae.run is not None]
    if args.data is not None or len(runs) < 2:
        return
    first, *others = (tree_of(config_file(sae.run))["data"].get("init_args", {}) for sae in runs if sae.run is not None)
    for sae, other in zip(runs[1:], others, strict=True):
        for key in ("corpus", "held_out", "skip_positions", "max_norm_ratio", "context_size", "prepend_bos", "cross_document_attention"):
            if first.get(key) != other.get(key):
                difference = f"{key} is {first.get(key)} and {other.get(key)}"
                raise InputError(
                    f"{runs[0].source} and {sae.source} were trained on different data ({difference}): name the data with --data RECIPE"
                )


def data_of(path: Path) -> Any:
    """The data module that a recipe or a run's config.yaml describes."""
    load_plugins()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    return parser.instantiate_classes(parser.parse_object({"data": tree_of(path)["data"]}))["data"]


def recipe_of(sae: EvaluatedSAE) -> dict[str, Any]:
    """The config of the run that the SAE is of; for an arm, the config that trains this arm alone."""
    assert sae.run is not None
    tree = tree_of(config_file(sae.run))
    return {**tree, "model": tree["model"]["init_args"]["arms"][sae.arm]} if sae.arm else tree


def tree_of(path: Path) -> dict[str, Any]:
    """The content of a config file; a file that describes no data is an `InputError`."""
    tree = read_config(path)
    if not isinstance(tree.get("data"), dict):
        raise InputError(f"{path} is no recipe: it has no data")
    return tree
