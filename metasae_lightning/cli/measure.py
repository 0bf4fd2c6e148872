"""The commands `test`, `compare` and `calibrate`."""

import gzip
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from metasae_lightning import report, run_folder
from metasae_lightning.cli.arguments import (
    PLACES,
    all_arms,
    check_same_data,
    data_for,
    opened,
    parsed,
    parser_of,
    plain_parser,
    recipe_of,
    settings_of,
)
from metasae_lightning.cli.publish import publish_run as published
from metasae_lightning.data.datamodule import ActivationsDataModule
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.compare import compare as compared
from metasae_lightning.evaluation.compare import differences
from metasae_lightning.evaluation.evaluate import Evaluation, evaluate
from metasae_lightning.evaluation.matched_l0 import goal_of, sample
from metasae_lightning.evaluation.result_cache import digest
from metasae_lightning.evaluation.saes import Subject, device_of, only_hook
from metasae_lightning.evaluation.top_contexts import latents_record, top_contexts
from metasae_lightning.sae import pretrained
from metasae_lightning.sae.publish import HUB, destination
from metasae_lightning.sae.thresholds import calibrate as thresholds

log = logging.getLogger(__name__)

ELSEWHERE = (
    "With -c RECIPE and --ckpt_path CHECKPOINT, `metasae test` is Lightning's own test of a checkpoint, by the callbacks of its recipe."
)


def test(args: Sequence[str]) -> int:
    """Measure SAEs on held-out tokens."""
    parser = parser_of("test", f"Every measure of one SAE, or of several on the same held-out tokens at matched L0. {ELSEWHERE}")
    parser.add_argument("places", nargs="*", type=str, help=PLACES)
    parser.add_argument("--sae", nargs="+", type=str, default=[], help="More of them.")
    given = parsed(parser, args)
    places = all_arms([*given.places, *given.sae])
    if not places:
        raise InputError("test: name a run, a SAELens folder or RELEASE:ID, or a checkpoint by -c RECIPE --ckpt_path CHECKPOINT")
    subjects = opened(places, given.out)
    check_same_data(subjects, given)
    settings, data = settings_of(given), data_for(subjects[0], given)
    found = evaluate(subjects, data, settings)
    for one in found[1:]:
        one.entry["against"] = {"weights": found[0].entry["weights"], "differences": differences(found[0], one, settings)}
    tokenizer = data.language_model.tokenizer if isinstance(data, ActivationsDataModule) else None
    told: dict[str, bytes] = {}
    for one in found:
        record(one)
        key = digest(one.seen.identity)  # arms may be one SAE
        told[key] = told.get(key) or browsable(one, tokenizer, settings.contexts)
        run_folder.put(one.seen.subject.folder / "latents.json.gz", told[key])
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
    out = Path(given.out) if given.out else Path("runs") / f"compare-{subjects[0].slug}-{subjects[1].slug}.json"
    run_folder.write(out, {"a": a.entry, "b": b.entry, **found})
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
    scores, settings = pretrained.pre_activations(one.sae), settings_of(given)
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
    pretrained.set_thresholds(folder, found.threshold, {"threshold_rule": told})
    run_folder.keep(one.record, "calibration", told, arm=one.arm)
    few = f", {found.few:,} latents that fired too rarely share one threshold" if rule == "rate" else ""
    Console().print(f"{folder}: L0 {before:.2f} -> {found.l0:.2f} by the rule {rule!r} on {found.tokens:,} validation tokens{few}")
    return 0


def publish(args: Sequence[str]) -> int:
    """Publish a run's SAEs."""
    parser = plain_parser("publish", "A run's SAEs in a folder or on the Hub, with a page, once they were loaded back and measured again.")
    parser.add_argument("run", type=str, help="The run.")
    parser.add_argument("dest", type=str, help=f"A folder, or {HUB}OWNER/NAME; several SAEs can go into one.")
    parser.add_argument("--id", type=str | None, default=None, help="What the SAE is called there; none is its hook's name.")
    parser.add_argument("--replace", type=bool, default=False, help="Replace what is there under that id.")
    parser.add_argument("--private", type=bool | None, default=None, help="Whether a repository that is made is private.")
    parser.add_argument("--revision", type=str | None, default=None, help="The repository's branch, made where there is none.")
    parser.add_argument(
        "--tokens", type=int | None, default=None, help="Validation tokens to measure on; none is those of the run's export."
    )
    parser.add_argument(
        "--model_name", type=str | None, default=None, help="The model's name for others, where the run's is a local folder."
    )
    parser.add_argument("--dataset_path", type=str | None, default=None, help="The same for the text.")
    parser.add_argument("--device", type=str | None, default=None, help="Where the language model and the SAE are; none is the recipe's.")
    given = parsed(parser, args)
    given.data = None
    dest = destination(given.dest, private=given.private, revision=given.revision)
    (one,) = opened([given.run], None)
    if one.run is None:
        raise InputError(f"{given.run} is no run: its recipe and what it was measured on are published along")
    named = {key: given[key] for key in ("model_name", "dataset_path") if given[key]}
    for key in ("model_name", "dataset_path"):
        if (value := one.metadata.get(key)) and Path(str(value)).exists() and key not in named:
            log.warning("%s is %s, which others do not have: say what it is to them, --%s NAME", key, value, key)
    recipe, about = recipe_of(one), {"name": given.id, "tokens": given.tokens, "replace": given.replace}
    place, record = published(one, data_for(one, given), dest, recipe, overrides=named, **about)
    found = record["measured"]
    Console().print(f"{record['id']}: FVU {found['fvu']:.4f}, L0 {found['l0']:.2f} on {found['tokens']:,} validation tokens")
    Console().print(f"published: {place}", soft_wrap=True)
    return 0


def active(one: Subject, samples: Sequence[Any]) -> float:
    """Latents active on a token."""
    return sum(one.read(x)[0].values.numel() for x in samples) / sum(map(len, samples))


def record(one: Evaluation) -> None:
    """Keep an evaluation beside its SAE, and log its figures where a run logs."""
    place = one.seen.subject
    run_folder.keep(place.record, "evaluation", one.entry, arm=place.arm)
    flat = {
        f"evaluation/{group}/{name}": value
        for group, figures in one.entry["figures"].items()
        for name, value in figures.items()
        if isinstance(value, float)
    }
    logger = TensorBoardLogger(str(place.record.parent), name="tensorboard", version=place.arm)
    logger.log_metrics(flat, step=int(place.metadata.get("training_tokens") or 0))
    logger.finalize("success")


def browsable(one: Evaluation, tokenizer: Any | None, count: int) -> bytes:
    """What its latents fire on, as it is kept."""
    text = json.dumps(run_folder.finite(latents_record(one.seen, tokenizer, count=count)), ensure_ascii=False)
    return gzip.compress(text.encode(errors="replace"), mtime=0)


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
    found = {side: top_contexts(one.seen, wanted[side], tokenizer) for side, one in sides}
    return {
        side: {str(latent): [{"value": hit.values[hit.at], "text": hit.marked} for hit in hits] for latent, hits in of.items()}
        for side, of in found.items()
    }


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
