"""A run made public: its SAEs with everything that others need to know, loaded back and measured again before anything goes out."""

import json
import logging
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from rich.console import Console

from metasae_lightning import functional
from metasae_lightning.cli.arguments import data_for, open_saes, recipe_of
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.evaluate import versions
from metasae_lightning.evaluation.held_out_text import as_record, held_out, identity
from metasae_lightning.evaluation.matched_l0 import sample
from metasae_lightning.evaluation.saes import Subject, device_of, only_hook
from metasae_lightning.redaction import redact
from metasae_lightning.report import model_card
from metasae_lightning.run_folder import arm_record, read_record
from metasae_lightning.sae import pretrained
from metasae_lightning.sae.publish import HUB, README, RECORD, Destination, destination, publish, stage

log = logging.getLogger(__name__)

SCHEMA = 1
# A folder that measures further than this from what its run recorded is not what the run left, or the model or the text is not: on the
# same tokens, and on others, since documents differ.
SAME, OTHER = 0.05, 0.3
# What Export keeps for its check, if the recipe does not say otherwise.
MOST = 131_072
NORMALIZERS = {
    "none": "changes nothing",
    "layer_norm": "is applied by the SAE itself, and undone",
    "constant_norm_rescale": "is applied by the SAE itself, and undone",
}


# What goes into an SAE's own config too.
ABOUT = ("trained_as", "normalizer", "normalizer_is", "thresholds", "penalties", "n_p", "n_m", "meta", "init_from", "recipe", "versions")


def publish_saes(args: Namespace) -> int:
    """The command `publish`: write a run's SAEs and a model card to a folder or the Hub, after loading them back and measuring them."""
    args.data = None
    dest = destination(args.dest, private=args.private, revision=args.revision)
    (sae,) = open_saes([args.run], None)
    if sae.run is None:
        raise InputError(f"{args.run} is no run: its recipe and its measurements are published along")
    overrides = {key: args[key] for key in ("model_name", "dataset_path") if args[key]}
    for key in ("model_name", "dataset_path"):
        if (value := sae.metadata.get(key)) and Path(str(value)).exists() and key not in overrides:
            log.warning("%s is %s, a local path: give its public name with --%s NAME", key, value, key)
    place, record = publish_run(
        sae, data_for(sae, args), dest, recipe_of(sae), name=args.id, tokens=args.tokens, replace=args.replace, overrides=overrides
    )
    measured = record["measured"]
    Console().print(f"{record['id']}: FVU {measured['fvu']:.4f}, L0 {measured['l0']:.2f} on {measured['tokens']:,} validation tokens")
    Console().print(f"published: {place}", soft_wrap=True)
    return 0


def publish_run(
    one: Subject,
    data: Any,
    dest: Destination,
    recipe: Mapping[str, Any],
    *,
    name: str | None = None,
    tokens: int | None = None,
    replace: bool = False,
    overrides: Mapping[str, str] | None = None,
) -> tuple[str, dict[str, Any]]:
    """Publish a run's SAEs under `name` and `name-meta`, measured on the run's own data; returns where they are and what was recorded."""
    name = name or str(one.metadata.get("hook_name") or one.name)
    found = measured(one, data, tokens)
    kept = arm_record(read_record(one.record), one.arm)
    check(one, found, kept)
    density, probe = found.pop("density"), found.pop("probe")
    record = record_of(one, recipe, kept, found, overrides or {}, name, tested(one, data, kept))
    with tempfile.TemporaryDirectory() as room:
        folders = {name: Path(room) / "primary"}
        about = {**(overrides or {}), "metasae_lightning": {key: record[key] for key in ABOUT}}
        loaded = stage(one.folder / "saes" / "primary", folders[name], metadata=about, density=density)
        if not torch.equal(loaded.encode(probe), one.sae.cpu().encode(probe)):
            raise InputError(f"{one.place}: the folder loaded back does not encode as the run's SAE does")
        if record["meta"]:
            meta = folders[record["meta"]["id"]] = Path(room) / "meta"
            stage(one.folder / "saes" / "meta", meta, metadata={"reads": f"unit decoder rows of {name}"})
        (folders[name] / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        there = dest.listing()
        others = [each for each in map(partial(other, dest), sorted(there)) if each is not None and each["id"] != name]
        before = dest.read(README) if README in there else ""
        repository = dest.place.removeprefix(HUB) if dest.place.startswith(HUB) else None
        text = model_card.page(sorted([*others, record], key=lambda each: each["id"]), repository, before)
        stale = [f"{name}-meta"] if replace else []
        return publish(folders, dest, card=text, replace=replace, remove=stale), record


def other(dest: Destination, path: str) -> dict[str, Any] | None:
    """The record of another SAE that is published there, if that is what a file is."""
    if not path.endswith(f"/{RECORD}"):
        return None
    try:
        record = json.loads(dest.read(path))
        if record["schema"] != SCHEMA:
            raise KeyError("schema")
    except (ValueError, KeyError, TypeError):
        log.warning("%s of %s is not a record of this version: it gets no section on the page", path, dest.place)
        return None
    return record


def tested(one: Subject, data: Any, kept: Mapping[str, Any]) -> dict[str, Any] | None:
    """The run's evaluation, where it is of these very weights and of the run's own test documents."""
    entry = kept.get("evaluation", {})
    if entry.get("weights") != one.identity["sae"] or entry.get("data") is None:
        return None
    own = as_record(identity(held_out(data, "test", 1)))
    if json.loads(json.dumps(own)) != entry["data"]:
        log.warning("%s was evaluated on other data than its own: those figures stay off the page", one.place)
        return None
    return {key: entry.get(key) for key in ("figures", "intervals", "tokens", "documents", "spliced_tokens", "seed")}


def measured(one: Subject, data: Any, tokens: int | None) -> dict[str, Any]:
    """FVU, L0, dead share and each latent's density on validation tokens, all that an export sees if no number is given."""
    if tokens is not None and tokens < 1:
        raise InputError(f"tokens must be at least 1, got {tokens}")
    only_hook(one, data)
    one.sae.to(device_of(data))
    data.setup("test")
    samples = sample(one, data, min(data.validation_tokens, MOST) if tokens is None else tokens)
    fired, sums = torch.zeros(len(one.W_dec), dtype=torch.int64), None
    for x in samples:
        codes, rebuilt = one.read(x)
        fired += codes.firings().cpu()
        added = functional.reconstruction_sums(x.float(), rebuilt)
        sums = added if sums is None else tuple(a + b for a, b in zip(sums, added, strict=True))
    if sums is None:
        raise InputError(f"{one.place}: its data give no validation token to measure on")
    count = sum(map(len, samples))
    fvu = functional.fvu_of_sums(sums).item()  # pyright: ignore[reportArgumentType]
    figures = {"tokens": count, "fvu": fvu, "l0": int(fired.sum()) / count, "dead": (fired == 0).float().mean().item()}
    return {**figures, "density": fired / count, "probe": samples[0][:64].cpu()}


def check(one: Subject, found: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    """What is measured is what the run recorded when it exported, or what its thresholds were found to do when they were set anew."""
    anew = one.metadata.get("threshold_rule") or {}
    export = {} if anew else kept.get("validation", {}).get("exported", {}).get("primary", {})
    for name, record in (("l0", anew or export), ("fvu", export)):
        within = SAME if abs(found["tokens"] / (record.get("tokens") or 1) - 1) < 0.01 else OTHER
        if (value := record.get(name)) and abs(found[name] / value - 1) > within:
            raise InputError(
                f"{one.place} measures {name} {found[name]:.4g} on {found['tokens']:,} tokens, and the run recorded {value:.4g} on "
                f"{record.get('tokens', 0):,}: the SAE, the model or the text is not what it was"
            )
    if not found["fvu"] < 1 or found["l0"] == 0:
        raise InputError(f"{one.place} explains nothing of its activations (FVU {found['fvu']:.4g}, L0 {found['l0']:.4g})")


def record_of(
    one: Subject,
    recipe: Mapping[str, Any],
    kept: Mapping[str, Any],
    found: Mapping[str, Any],
    overrides: Mapping[str, str],
    name: str,
    evaluation: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Everything that a page says, and that who trains the next one wants to know."""
    told = {**one.metadata, **overrides}
    renamed = {str(one.metadata[key]): value for key, value in overrides.items() if one.metadata.get(key)}
    model: dict[str, Any] = recipe.get("model", {}).get("init_args", {})
    normalizer = str(model.get("primary", {}).get("init_args", {}).get("normalize_activations", "none"))
    meta = (one.folder / "saes" / "meta" / "cfg.json").exists()
    penalties = {key: part.get("init_args", {}).get("weight", 0.0) for key, part in (model.get("penalties") or {}).items()}
    record = {
        "schema": SCHEMA,
        "id": name,
        "model": str(told.get("model_name") or "unknown"),
        "hook": str(told.get("hook_name") or "unknown"),
        "dataset": told.get("dataset_path"),
        "context_size": told.get("context_size"),
        "left_out": left_out(told),
        "architecture": one.sae.cfg.architecture(),
        "trained_as": str(told.get("training_architecture") or one.sae.cfg.architecture()),
        "d_in": int(one.W_dec.shape[1]),
        "d_sae": len(one.W_dec),
        "thresholds": thresholds(one, kept),
        "training_tokens": int(told.get("training_tokens") or 0),
        "normalizer": normalizer,
        "normalizer_is": NORMALIZERS.get(normalizer, "is folded into the weights"),
        "penalties": penalties,
        "n_p": model.get("n_p", 10),
        "n_m": model.get("n_m", 5),
        "meta": {"id": f"{name}-meta", "d_sae": model["meta"]["init_args"]["d_sae"]} if meta and model.get("meta") else None,
        "init_from": told.get("init_from"),
        "measured": {key: found[key] for key in ("tokens", "fvu", "l0", "dead")},
        "evaluation": evaluation,
        "recipe": {key: recipe[key] for key in ("seed_everything", "model", "data") if key in recipe},
        "versions": versions(),
    }
    return redact(abroad(record, renamed))


def thresholds(one: Subject, kept: Mapping[str, Any]) -> str | None:
    """Where the thresholds are from, if the SAE has any that training did not learn."""
    rule = one.metadata.get("threshold_rule")
    if rule:
        return f"set for L0 {rule['target_l0']:g} by the rule `{rule['rule']}` on {rule['tokens']:,} validation tokens"
    export = kept.get("validation", {}).get("exported", {}).get("primary", {})
    if one.target_l0 is None or pretrained.pre_activations(one.sae) is None or not export:
        return None
    if export["calibrated"]:
        return f"one for all latents, set for L0 {export['target_l0']:g} on {export['tokens']:,} validation tokens"
    return f"one for all latents, the running mean of training at L0 {export['target_l0']:g}"


def left_out(told: Mapping[str, Any]) -> list[str]:
    """Which tokens neither training nor any figure knows."""
    if not told.get("exclude_special_tokens"):
        return []
    masks = ["special tokens"]
    if skipped := (told.get("seqpos_slice") or [0])[0]:
        masks.append(f"the first {skipped} positions of a context")
    if most := told.get("max_norm_ratio"):
        masks.append(f"tokens whose norm is over {most:g} times the median")
    return masks


def abroad(tree: Any, renamed: Mapping[str, str]) -> Any:
    """A tree of settings in which local paths are what others call them, or else their last part."""
    if isinstance(tree, Mapping):
        return {key: abroad(value, renamed) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [abroad(value, renamed) for value in tree]
    if not isinstance(tree, str):
        return tree
    return renamed.get(tree, Path(tree).name if Path(tree).is_absolute() else tree)
