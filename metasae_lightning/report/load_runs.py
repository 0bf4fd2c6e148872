"""Load the results of finished runs, arm by arm, and list what is missing."""

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
    """One SAE of a run with its results."""

    name: str
    """Name on the page."""
    folder: Path
    """Folder that contains `saes/`."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Arguments of its model in `config.yaml`."""
    record: dict[str, Any] = field(default_factory=dict)
    """Its entry in `evaluation.json`."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """Metrics logged in training: pairs of tokens and value, by name."""
    missing: list[str] = field(default_factory=list)
    """Missing results, a phrase each."""

    @property
    def entry(self) -> dict[str, Any] | None:
        """Results of the evaluation of the arm's exported SAE (`metasae test RUN`); None if it was not evaluated."""
        return self.record.get("evaluation")

    @property
    def judging(self) -> dict[str, Any] | None:
        """Scores of the arm's latents (`metasae judge RUN`); None if they were not judged, or if the SAE has other weights since."""
        return None if self.is_judged_as_another_sae else self.record.get("judging")

    @property
    def is_judged_as_another_sae(self) -> bool:
        """Whether the judged weights differ from the evaluated ones."""
        return is_another_sae(self.record.get("judging") or {}, self.entry or {})

    def figure(self, path: str) -> float | None:
        """One measured number, `GROUP/NAME`, or the mean of a score, `judging/NAME`; None if it was not measured or is no number."""
        group, name = path.split("/")
        if group == "judging":
            score = ((self.judging or {}).get("scores") or {}).get(name) or {}
            value = (score.get("mean") or {}).get("value")
        else:
            value = ((self.entry or {}).get("figures", {}).get(group) or {}).get(name)
        return float(value) if isinstance(value, int | float) else None

    def histogram(self, path: str, counts: str) -> tuple[list[float], list[float]] | None:
        """Edges and counts of a histogram, `GROUP/NAME`, whose counts have the key `counts`; None if it was not measured."""
        group, name = path.split("/")
        histogram = ((self.entry or {}).get("figures", {}).get(group) or {}).get(name)
        return (histogram["edges"], histogram[counts]) if isinstance(histogram, Mapping) else None

    @property
    def seed(self) -> int:
        """Seed of its initial weights; 0 if the recipe has none."""
        return int(self.recipe.get("seed") or 0)

    @property
    def penalties(self) -> dict[str, dict[str, Any]]:
        """Class and arguments of each penalty whose weight is not 0."""
        penalties: dict[str, dict[str, Any]] = {}
        for name, config in (self.recipe.get("penalties") or {}).items():
            arguments = config.get("init_args") or {}
            if arguments.get("weight", 1) != 0:
                penalties[name] = {"class": str(config.get("class_path", "")).rsplit(".", 1)[-1], **arguments}
        return penalties

    @cached_property
    def latents(self) -> dict[str, Any] | None:
        """Number of firings, maximum and top contexts of each latent, from `latents.json.gz`; None if there is no such file."""
        return read_latents(self.folder)

    @cached_property
    def judged(self) -> dict[str, Any] | None:
        """Judged latents and splits, from `judged.json.gz`; None without such a file, or if it is of other weights or latents."""
        if (self.entry or {}).get("by_polarity"):  # a judge reads latents, and this evaluation counts each sign of a latent
            return None
        judged = read_compressed(self.folder / "judged.json.gz", f"judge again, metasae judge {self.folder}")
        return None if judged is None or is_another_sae(judged, self.entry or {}) else judged


def is_another_sae(judged: Mapping[str, Any], evaluated: Mapping[str, Any]) -> bool:
    """Whether two records are of different SAEs, by the decoder where both name it, else by all weights; False where nothing tells.

    Evaluation may set other thresholds, which changes the hash of all weights.
    """
    known = (name for name in ("decoder", "weights") if judged.get(name) is not None and evaluated.get(name) is not None)
    return any(judged[name] != evaluated[name] for name in list(known)[:1])


def read_latents(folder: Path) -> dict[str, Any] | None:
    """The content of `latents.json.gz` in a folder of results; None if there is no such file."""
    return read_compressed(folder / "latents.json.gz", f"measure again, metasae test {folder}")


def read_compressed(path: Path, remedy: str) -> dict[str, Any] | None:
    """The content of a compressed JSON file; None if there is no such file. A damaged file is refused with the remedy."""
    if not path.exists():
        return None
    try:
        return json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path} is damaged: {remedy} ({error})") from error


def load_arms(folders: Sequence[str]) -> list[Arm]:
    """Every arm of some runs, in their order. If two arms would have the same name, all names include the run.

    Runs without any result are an `InputError`.
    """
    runs = [Path(folder) for folder in folders]
    for run in runs:
        if not run.is_dir():
            raise InputError(f"{run}: there is no such run")
        if find_run(run) is None and not record_file(run).exists():
            raise InputError(f"{run} is no run: it has neither config.yaml nor evaluation.json")
    arms = [arm for run in runs for arm in arms_of(run)]
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        arms = [arm for run in runs for arm in arms_of(run, prefix=f"{run}/")]
    if not any(arm.record or arm.curves or is_exported(arm.folder) for arm in arms):
        raise InputError(f"{', '.join(folders)}: there is no result to report: no evaluation, no SAE and no training curve")
    return arms


def arms_of(path: Path, prefix: str = "") -> list[Arm]:
    """The arms of a run; a run without arms counts as one arm; the folder of an arm gives that arm alone."""
    resolved, run = path.resolve(), find_run(path) or path
    selected = None if run == path else resolved.name
    model = model_args(read_config(config_file(run))) if config_file(run).exists() else {}
    record, curves = read_record(record_file(run)), training_curves(run)
    arm_configs: dict[str, Any] = model.get("arms") or {}
    if not arm_configs:
        name = prefix.rstrip("/") or resolved.name
        return [load_arm(name, run, model, record, curves)]
    arms: list[Arm] = []
    for name, config in arm_configs.items():
        if selected in (None, name):
            arm_curves = {key.removeprefix(f"{name}/"): curve for key, curve in curves.items() if key.startswith(f"{name}/")}
            recipe = (config or {}).get("init_args") or {}
            arms.append(load_arm(prefix + name, arm_folder(run, name), recipe, arm_record(record, name), arm_curves))
    return arms


def load_arm(name: str, folder: Path, recipe: dict[str, Any], record: dict[str, Any], curves: dict[str, Curve]) -> Arm:
    """An arm with a list of its missing results."""
    missing: list[str] = []
    if reason := (record.get("validation") or {}).get("stopped"):
        missing.append(f"it stopped: {reason}")
    if not is_exported(folder):
        missing.append("no SAE under saes/primary: training did not end, or nothing exported")
    if "evaluation" not in record:
        missing.append(f"no evaluation: metasae test {folder}")
    elif not (folder / "latents.json.gz").exists():
        missing.append(f"nothing of single latents: metasae test {folder}")
    if not recipe:
        missing.append("no config.yaml that tells what was trained")
    if not curves:
        missing.append("no metrics.csv with training curves")
    arm = Arm(name, folder, recipe, record, curves, missing)
    if arm.is_judged_as_another_sae:
        missing.append(f"the judged latents are of another SAE, with other weights: metasae judge {folder}")
    return arm


def training_curves(run: Path) -> dict[str, Curve]:
    """Metrics logged in training, by name: pairs of tokens and value. The files of a resumed run are joined."""

    def part_number(path: Path) -> float:
        part = re.fullmatch(r"metrics\.(\d+)", path.stem)
        return float(part[1]) if part else float("inf")

    # A resumed run repeats the steps after its checkpoint: the later file wins.
    points: dict[str, dict[float, float]] = {}
    for path in sorted(run.glob("metrics*.csv"), key=part_number):
        tokens = 0.0  # a line without tokens, such as one of validation, has those of the line before
        with path.open(newline="", errors="replace") as file:
            rows = [row for row in csv.DictReader(file) if parse_number(row.get("step")) is not None]
        for row in rows:
            counts = [parse_number(value) for key, value in row.items() if key and key.endswith("train/tokens")]
            tokens = next((count for count in counts if count is not None), tokens)
            for name, text in row.items():
                if name and name not in ("step", "epoch") and (value := parse_number(text)) is not None:
                    points.setdefault(name, {})[tokens] = value
    return {name: sorted(curve.items()) for name, curve in points.items()}


def parse_number(text: str | None) -> float | None:
    """The number in a cell of a table, or None if the cell holds no number.

    >>> parse_number("0.5"), parse_number(""), parse_number("torn")
    (0.5, None, None)
    """
    try:
        return float(text) if text else None
    except ValueError:
        return None
