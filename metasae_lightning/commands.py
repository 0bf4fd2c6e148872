"""The commands that measure what is there: `test` on runs and SAEs, `calibrate`, `compare`."""

import json
import logging
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning import LightningDataModule
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from metasae_lightning import report, saelens
from metasae_lightning.calibration import calibrate as thresholds
from metasae_lightning.callbacks.summary import finite, keep
from metasae_lightning.comparison import compare as compared
from metasae_lightning.complaints import complaint
from metasae_lightning.contexts import top_contexts
from metasae_lightning.data import ActivationsDataModule
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation import Evaluation, Settings, evaluate
from metasae_lightning.subjects import Subject, check_same_activations, corpus_of, device_of, model_of, only_hook, subject
from metasae_lightning.thresholds import goal_of, sample

PLACES = "Runs, SAELens folders, or SAEs on the Hub as RELEASE:ID."
ELSEWHERE = (
    "With -c RECIPE and --ckpt_path CHECKPOINT, `metasae test` is Lightning's own test of a checkpoint, by the callbacks of its recipe."
)


def test(args: Sequence[str]) -> int:
    """Measure SAEs on held-out tokens."""
    parser = parser_of("test", f"Every measure of one SAE, or of several on the same held-out tokens at matched L0. {ELSEWHERE}")
    parser.add_argument("places", nargs="*", type=str, help=PLACES)
    parser.add_argument("--sae", nargs="+", type=str, default=[], help="More of them.")
    given = parsed(parser, args)
    places = [*given.places, *given.sae]
    if not places:
        raise InputError("test: name a run, a SAELens folder or RELEASE:ID, or a checkpoint by -c RECIPE --ckpt_path CHECKPOINT")
    subjects = opened(places, given.out)
    check_same_data(subjects, given)
    found = evaluate(subjects, data_for(subjects[0], given), settings_of(given))
    for one in found:
        record(one)
    Console().print(report.evaluations({one.seen.subject.name: one.entry for one in found}))
    return 0


def compare(args: Sequence[str]) -> int:
    """Measure two SAEs and what they have to do with each other."""
    parser = parser_of("compare", "Two SAEs on the same held-out tokens at matched L0: differences, matches, splits and merges.")
    parser.add_argument("a", type=str, help=f"The first. {PLACES}")
    parser.add_argument("b", type=str, help="The second.")
    given = parsed(parser, args)
    subjects, settings = opened([given.a, given.b], None), settings_of(given)
    check_same_data(subjects, given)
    data = data_for(subjects[0], given)
    a, b = evaluate(subjects, data, settings)
    names = (subjects[0].name, subjects[1].name)
    found = compared(a, b, settings)
    found["contexts"] = contexts(found, a, b, data)
    out = Path(given.out) if given.out else Path("runs") / f"compare-{names[0]}-{names[1]}.json"
    write(out, {"a": a.entry, "b": b.entry, **found})
    console = Console()
    for table in tables(found, (a, b), names):
        console.print(table)
        console.print()
    matching = found["matching"]
    console.print(
        f"{matching['pairs']:,} pairs one to one: mean cosine {matching['mean_cosine']:.3f}, {matching['above_0.9']:.1%} above 0.9"
    )
    console.print(f"everything, with each latent's best matches: {out}")
    return 0


def calibrate(args: Sequence[str]) -> int:
    """Set the thresholds of an exported SAE."""
    parser = parser_of("calibrate", "Set the thresholds of a run's exported SAE, or of a SAELens folder, from validation tokens.")
    parser.add_argument("place", type=str, help="A run or a SAELens folder; it is changed whole or not at all.")
    given = parsed(parser, args)
    (one,) = opened([given.place], given.out)
    folder = (Path(one.place) / "saes" / "primary" if one.run else Path(one.place)).resolve()
    scores, settings = saelens.pre_activations(one.sae), settings_of(given)
    if not folder.is_dir():
        raise InputError(f"{given.place}: only a folder can be written to")
    if scores is None:
        raise InputError(f"{given.place}: the architecture {one.sae.cfg.architecture()} has no thresholds to set")
    rule = "rate" if settings.rule is None else settings.rule
    if rule == "stored":
        raise InputError("rule: global, rate or eer set thresholds; stored leaves them as they are")
    l0 = goal_of([one], settings.l0)
    data = data_for(one, given)
    only_hook(one, data)
    one.sae.to(device_of(data))
    data.setup("test")
    samples = sample(one, data, settings.calibration_tokens)
    before = active(one, samples)
    found = thresholds(scores, samples, l0, rule)
    told = {"rule": rule, "target_l0": l0, "l0_before": before, "l0": found.l0, "few_firings": found.few, "tokens": found.tokens}
    saelens.set_thresholds(folder, found.threshold, {"threshold_rule": told})
    keep(one.folder / "evaluation.json", "calibration", told)
    few = f", {found.few:,} latents that fired too rarely share one threshold" if rule == "rate" else ""
    Console().print(f"{folder}: L0 {before:.2f} -> {found.l0:.2f} by the rule {rule!r} on {found.tokens:,} validation tokens{few}")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"test": test, "calibrate": calibrate, "compare": compare}


def run(args: Sequence[str]) -> int:
    """Run the command that a line names."""
    with telling():
        return COMMANDS[args[0]](args[1:])


def is_ours(args: Sequence[str]) -> bool:
    """Whether a command line is one of these commands', and not LightningCLI's."""
    lightnings = any(word in ("-c", "--config", "--ckpt_path") or word.startswith(("--config=", "--ckpt_path=")) for word in args)
    return bool(args) and args[0] in COMMANDS and not (args[0] == "test" and lightnings)


def parser_of(name: str, description: str) -> ArgumentParser:
    """A command's parser, with what all of them take."""
    parser = ArgumentParser(prog=f"metasae {name}", description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(Settings, as_group=True)
    parser.add_argument(
        "--data", type=str | None, default=None, help="Recipe or run's config.yaml whose data are read; none is the first SAE's own."
    )
    parser.add_argument("--device", type=str | None, default=None, help="Where the language model and the SAEs are; none is the recipe's.")
    parser.add_argument("--out", type=str | None, default=None, help="Where results go; none is the run, or under runs/.")
    return parser


@contextmanager
def telling() -> Generator[None, None, None]:
    """Say on stderr what is being done."""
    logger, handler = logging.getLogger(__package__), logging.StreamHandler(sys.stderr)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


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


def data_for(one: Subject, given: Namespace) -> Any:
    """The data that a recipe names, or a run was made on, or an SAE says it was."""
    if given.data is not None or one.run:
        data = data_of(Path(given.data) if given.data is not None else Path(one.place) / "config.yaml")
    else:
        told = one.metadata
        skip = (told.get("seqpos_slice") or [0])[0] or 0
        sizes: dict[str, Any] = {"context_size": told.get("context_size") or 128, "prepend_bos": told.get("prepend_bos", True)}
        sizes |= {"held_out": told.get("held_out") or 0.05, "max_norm_ratio": told.get("max_norm_ratio")}
        data = ActivationsDataModule(model_of(one), corpus_of(one), tokens=4096, skip_positions=skip, **sizes)
    if given.device is not None and isinstance(data, ActivationsDataModule):
        data.language_model.place(device(given.device))
    return data


def check_same_data(subjects: Sequence[Subject], given: Namespace) -> None:
    """What one run holds out another may have been trained on."""
    runs = [one for one in subjects if one.run]
    if given.data is not None or len(runs) < 2:
        return
    first, *others = (tree_of(Path(one.place) / "config.yaml")["data"].get("init_args", {}) for one in runs)
    for one, other in zip(runs[1:], others, strict=True):
        for key in ("corpus", "held_out", "skip_positions", "max_norm_ratio", "context_size", "prepend_bos", "cross_document_attention"):
            if first.get(key) != other.get(key):
                said = f"{key} is {first.get(key)} and {other.get(key)}"
                raise InputError(
                    f"{runs[0].place} and {one.place} were made on other data ({said}): say which to measure on, --data RECIPE.yaml"
                )


def device(name: str) -> str:
    """A device that is there."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: {name!r} is not there: {str(error).splitlines()[0]}") from error
    return name


def data_of(path: Path) -> Any:
    """The data module of a recipe or of a run's config."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    return parser.instantiate_classes(parser.parse_object({"data": tree_of(path)["data"]}))["data"]


def tree_of(path: Path) -> dict[str, Any]:
    """A recipe as it is written."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as a recipe: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("data"), dict):
        raise InputError(f"{path} is no recipe: it has no data")
    return tree


def active(one: Subject, samples: Sequence[Any]) -> float:
    """Latents active on a token."""
    return sum(one.read(x)[0].values.numel() for x in samples) / sum(map(len, samples))


def record(one: Evaluation) -> None:
    """Keep an evaluation beside its SAE, and log its figures where a run logs."""
    place = one.seen.subject
    keep(place.folder / "evaluation.json", "evaluation", one.entry)
    flat = {
        f"evaluation/{group}/{name}": value
        for group, figures in one.entry["figures"].items()
        for name, value in figures.items()
        if isinstance(value, float)
    }
    logger = TensorBoardLogger(str(place.folder), name="tensorboard", version="")
    logger.log_metrics(flat, step=int(place.metadata.get("training_tokens") or 0))
    logger.finalize("success")


def contexts(found: Mapping[str, Any], a: Evaluation, b: Evaluation, data: Any) -> dict[str, dict[str, Any]]:
    """Where the latents of splits and merges fire."""
    if not isinstance(data, ActivationsDataModule):
        return {"a": {}, "b": {}}
    wanted: dict[str, set[int]] = {"a": set(), "b": set()}
    for kind, own, other in (("splits", "a", "b"), ("merges", "b", "a")):
        for split in found[kind]:
            wanted[own].add(split["latent"])
            wanted[other].update(split["into"])
    tokenizer = data.language_model.tokenizer
    sides = (("a", a), ("b", b))
    return {side: {str(latent): hits for latent, hits in top_contexts(one.seen, wanted[side], tokenizer).items()} for side, one in sides}


def tables(found: Mapping[str, Any], both: tuple[Evaluation, Evaluation], names: tuple[str, str]) -> list[Any]:
    """What is printed of a comparison."""
    told = found["contexts"]
    forth, back = {"from": told["a"], "into": told["b"]}, {"from": told["b"], "into": told["a"]}
    return [
        report.evaluations({name: one.entry for name, one in zip(names, both, strict=True)}),
        report.differences(found["differences"], names),
        report.cross(found["cross_phi"], names),
        *report.shared(found["splits"], forth, f"{names[0]} splits:"),
        *report.shared(found["merges"], back, f"{names[1]} merges:"),
    ]


def write(path: Path, entry: Mapping[str, Any]) -> None:
    """A file that is whole or not there."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(finite(entry), indent=1) + "\n")
        draft.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
