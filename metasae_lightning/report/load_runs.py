"""What runs have left behind, each arm's apart, and what of it is missing."""

import csv
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from metasae_lightning.errors import InputError
from metasae_lightning.run_folder import (
    arm_folder,
    arm_record,
    config_file,
    find_run,
    is_exported,
    model_args,
    read_config,
    read_record,
    record_file,
)

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Arm:
    """One SAE and what is known of it."""

    name: str
    """What the page calls it."""
    place: Path
    """The folder with its `saes/`."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The arguments of its model."""
    record: dict[str, Any] = field(default_factory=dict)
    """Its part of `evaluation.json`."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """Figures while it trained, by tokens trained on."""
    missing: list[str] = field(default_factory=list)
    """What is not there, in words."""

    @property
    def entry(self) -> dict[str, Any] | None:
        """What `metasae test` found."""
        return self.record.get("evaluation")

    def figure(self, path: str) -> float | None:
        """One of its figures, `GROUP/NAME`."""
        group, name = path.split("/")
        value = ((self.entry or {}).get("figures", {}).get(group) or {}).get(name)
        return float(value) if isinstance(value, int | float) else None

    def histogram(self, path: str, counts: str) -> tuple[list[float], list[float]] | None:
        """Edges and counts, where there are such."""
        group, name = path.split("/")
        found = ((self.entry or {}).get("figures", {}).get(group) or {}).get(name)
        return (found["edges"], found[counts]) if isinstance(found, Mapping) else None

    @property
    def seed(self) -> int:
        """The seed that it began from."""
        return int(self.recipe.get("seed") or 0)

    @property
    def penalties(self) -> dict[str, dict[str, Any]]:
        """Class and arguments of each of its penalties that weighs something."""
        found: dict[str, dict[str, Any]] = {}
        for name, one in (self.recipe.get("penalties") or {}).items():
            arguments = one.get("init_args") or {}
            if arguments.get("weight", 1) != 0:
                found[name] = {"class": str(one.get("class_path", "")).rsplit(".", 1)[-1], **arguments}
        return found

    @cached_property
    def latents(self) -> dict[str, Any] | None:
        """Its latents and where they fire."""
        path = self.place / "latents.json.gz"
        if not path.exists():
            return None
        try:
            return json.loads(gzip.decompress(path.read_bytes()))
        except (OSError, EOFError, ValueError) as error:
            raise InputError(f"{path} is damaged: measure again, metasae test {self.place} ({error})") from error


def gather(places: Sequence[str]) -> list[Arm]:
    """Every arm of some runs, in order, under names of their own."""
    runs = [Path(place) for place in places]
    for run in runs:
        if not run.is_dir():
            raise InputError(f"{run}: there is no such run")
        if find_run(run) is None and not record_file(run).exists():
            raise InputError(f"{run} is no run: it has neither config.yaml nor evaluation.json")
    found = [arm for run in runs for arm in arms_of(run)]
    names = [arm.name for arm in found]
    if len(set(names)) < len(names):
        found = [arm for run in runs for arm in arms_of(run, prefix=f"{run}/")]
    return found


def arms_of(path: Path, prefix: str = "") -> list[Arm]:
    """The arms of a run, itself where it has but one, or the arm that the folder is."""
    whole, run = path.resolve(), find_run(path) or path
    only = None if run == path else whole.name
    model = model_args(read_config(config_file(run))) if config_file(run).exists() else {}
    record, curves = read_record(record_file(run)), metrics(run)
    arms: dict[str, Any] = model.get("arms") or {}
    if not arms:
        name = prefix.rstrip("/") or whole.name
        return [arm_of(name, run, model, record, curves)]
    found: list[Arm] = []
    for name, one in arms.items():
        if only in (None, name):
            own = {key.removeprefix(f"{name}/"): curve for key, curve in curves.items() if key.startswith(f"{name}/")}
            of = arm_record(record, name)
            found.append(arm_of(prefix + name, arm_folder(run, name), (one or {}).get("init_args") or {}, of, own))
    return found


def arm_of(name: str, place: Path, recipe: dict[str, Any], record: dict[str, Any], curves: dict[str, Curve]) -> Arm:
    """An arm, and in words what it lacks."""
    missing: list[str] = []
    if why := (record.get("validation") or {}).get("stopped"):
        missing.append(f"it stopped: {why}")
    if not is_exported(place):
        missing.append("no SAE under saes/primary: training did not end, or nothing exported")
    if "evaluation" not in record:
        missing.append(f"no evaluation: metasae test {place}")
    elif not (place / "latents.json.gz").exists():
        missing.append(f"nothing of single latents: metasae test {place}")
    if not recipe:
        missing.append("no config.yaml that tells what was trained")
    if not curves:
        missing.append("no metrics.csv with training curves")
    return Arm(name, place, recipe, record, curves, missing)


def metrics(run: Path) -> dict[str, Curve]:
    """What was logged while training, by its name: pairs of tokens and value. A resumed run's parts are put together."""

    def number(path: Path) -> float:
        part = re.fullmatch(r"metrics\.(\d+)", path.stem)
        return float(part[1]) if part else float("inf")

    # A resumed run logs again what lay behind its checkpoint: the later part holds.
    points: dict[str, dict[float, float]] = {}
    for path in sorted(run.glob("metrics*.csv"), key=number):
        tokens = 0.0  # a line without, as a validation's, is of those of the line before
        with path.open(newline="", errors="replace") as file:
            rows = [row for row in csv.DictReader(file) if value_of(row.get("step")) is not None]
        for row in rows:
            seen = [value_of(value) for key, value in row.items() if key and key.endswith("train/tokens")]
            tokens = next((count for count in seen if count is not None), tokens)
            for name, text in row.items():
                if name and name not in ("step", "epoch") and (value := value_of(text)) is not None:
                    points.setdefault(name, {})[tokens] = value
    return {name: sorted(curve.items()) for name, curve in points.items()}


def value_of(text: str | None) -> float | None:
    """A number in a table, if it is one.

    >>> value_of("0.5"), value_of(""), value_of("torn")
    (0.5, None, None)
    """
    try:
        return float(text) if text else None
    except ValueError:
        return None
