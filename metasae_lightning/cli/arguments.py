"""Objects from a measuring command's arguments: the SAEs, the data module, the settings."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from metasae_lightning.data.recipe import tree_of
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation import sae_data
from metasae_lightning.evaluation.saes import EvaluatedSAE, check_same_activations, load_sae
from metasae_lightning.evaluation.settings import Settings
from metasae_lightning.run_folder import arm_folder, config_file, exported_arms


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
    return sae_data.data_for(sae, recipe=args.data, device=args.device)


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


def recipe_of(sae: EvaluatedSAE) -> dict[str, Any]:
    """The config of the run that the SAE is of; for an arm, the config that trains this arm alone."""
    assert sae.run is not None
    tree = tree_of(config_file(sae.run))
    return {**tree, "model": tree["model"]["init_args"]["arms"][sae.arm]} if sae.arm else tree
