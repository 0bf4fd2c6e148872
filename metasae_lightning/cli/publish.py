"""The command `publish`: a run's SAEs and a model card, loaded back and measured again before anything is uploaded."""

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
from metasae_lightning.evaluation.held_out_text import json_values, split_stream, stream_cache_key
from metasae_lightning.evaluation.matched_l0 import validation_activations
from metasae_lightning.evaluation.saes import EvaluatedSAE, device_of, select_hook
from metasae_lightning.file_lock import file_lock
from metasae_lightning.redaction import redact
from metasae_lightning.report import model_card
from metasae_lightning.run_folder import arm_record, read_record
from metasae_lightning.sae import pretrained
from metasae_lightning.sae.publish import HUB, README, RECORD, Destination, check_id, open_destination, publish, stage

log = logging.getLogger(__name__)

SCHEMA = 1
# Largest relative difference between a new measurement and the run's record: on the same tokens, and on other tokens, whose documents
# differ. A larger one means that the SAE, the model or the text has changed.
SAME_TOKENS, OTHER_TOKENS = 0.05, 0.3
# The default number of tokens that the Export callback measures on.
EXPORT_TOKENS = 131_072
NORMALIZERS = {
    "none": "changes nothing",
    "layer_norm": "is applied by the SAE itself, and undone",
    "constant_norm_rescale": "is applied by the SAE itself, and undone",
}

# Keys of the record that are also written into the SAE's cfg.json.
CONFIG_KEYS = (
    "trained_as",
    "normalizer",
    "normalizer_is",
    "thresholds",
    "penalties",
    "n_p",
    "n_m",
    "meta",
    "init_from",
    "recipe",
    "versions",
)


def publish_saes(args: Namespace) -> int:
    """The command `publish`: write a run's SAEs and a model card to a folder or the Hub.

    Before that the primary is measured, and a copy of each SAE is loaded back and compared.
    """
    args.data = None
    if args.id is not None:
        check_id(args.id)
    dest = open_destination(args.dest, private=args.private, revision=args.revision)
    (sae,) = open_saes([args.run], None)
    if sae.run is None:
        raise InputError(f"{args.run} is no run: its recipe and its measurements are published along")
    overrides = {key: args[key] for key in ("model_name", "dataset_path") if args[key]}
    for key in ("model_name", "dataset_path"):
        if (value := sae.metadata.get(key)) and Path(str(value)).exists() and key not in overrides:
            log.warning("%s is %s, a local path: give its public name with --%s NAME", key, value, key)
    with file_lock(lock_file(args.dest, sae.run), str(args.dest)):
        destination, record = publish_run(
            sae, data_for(sae, args), dest, recipe_of(sae), name=args.id, tokens=args.tokens, replace=args.replace, overrides=overrides
        )
    measured = record["measured"]
    Console().print(f"{record['id']}: FVU {measured['fvu']:.4f}, L0 {measured['l0']:.2f} on {measured['tokens']:,} validation tokens")
    Console().print(f"published: {destination}", soft_wrap=True)
    return 0


def lock_file(dest: str, run: Path) -> Path:
    """The lock file of a publication: beside a local folder, or in the run's folder for a repository on the Hub."""
    return run / ".publish.lock" if dest.startswith(HUB) else Path(dest).absolute().with_name(f".{Path(dest).name}.publish.lock")


def publish_run(
    sae: EvaluatedSAE,
    data: Any,
    dest: Destination,
    recipe: Mapping[str, Any],
    *,
    name: str | None = None,
    tokens: int | None = None,
    replace: bool = False,
    overrides: Mapping[str, str] | None = None,
) -> tuple[str, dict[str, Any]]:
    """Publish a run's SAEs under `name` and `name-meta`, measured on the run's own data; returns their address and the record.

    An SAE that measures differently from its run's record, or encodes differently once loaded back, is an `InputError`.

    Args:
        sae: The run's primary SAE.
        data: The run's data module.
        dest: The folder or repository.
        recipe: The config of the run.
        name: Id of the primary SAE in `dest`; by default the name of its hook.
        tokens: Number of validation tokens to measure on; by default as in `measure_exported`.
        replace: Whether to replace an SAE of the same name.
        overrides: Public names in place of local paths, by key of the SAE's metadata.
    """
    name = name if name is not None else str(sae.metadata.get("hook_name") or sae.name)
    measured = measure_exported(sae, data, tokens)
    run_record = arm_record(read_record(sae.record), sae.arm)
    check_measurement(sae, measured, run_record)
    density, probe = measured.pop("density"), measured.pop("probe")
    evaluation = evaluation_for_page(sae, data, run_record)
    record = publication_record(sae, recipe, run_record, measured, overrides or {}, name, evaluation)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / "primary"}
        metadata = {**public_metadata(sae.folder / "saes" / "primary"), **(overrides or {})}
        metadata["metasae_lightning"] = {key: record[key] for key in CONFIG_KEYS}
        loaded = stage(sae.folder / "saes" / "primary", folders[name], metadata=metadata, density=density)
        if not torch.equal(loaded.encode(probe), sae.sae.cpu().encode(probe)):
            raise InputError(f"{sae.source}: the folder loaded back does not encode as the run's SAE does")
        if record["meta"]:
            meta = folders[record["meta"]["id"]] = Path(temporary) / "meta"
            metadata = {**public_metadata(sae.folder / "saes" / "meta"), **(overrides or {}), "reads": f"unit decoder rows of {name}"}
            stage(sae.folder / "saes" / "meta", meta, metadata=metadata)
        (folders[name] / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        existing = dest.list_files()
        published = map(partial(published_record, dest), sorted(existing))
        others = [other for other in published if other is not None and other["id"] != name]
        old_page = dest.read_text(README) if README in existing else ""
        repository = dest.address.removeprefix(HUB) if dest.address.startswith(HUB) else None
        text = model_card.page(sorted([*others, record], key=lambda entry: entry["id"]), repository, old_page)
        replaced_meta = [f"{name}-meta"] if replace else []
        return publish(folders, dest, card=text, replace=replace, remove=replaced_meta), record


def published_record(dest: Destination, path: str) -> dict[str, Any] | None:
    """The record in a published file; None if the file is no record, or, with a warning, if its schema is another."""
    if not path.endswith(f"/{RECORD}"):
        return None
    try:
        record = json.loads(dest.read_text(path))
        if record["schema"] != SCHEMA:
            raise KeyError("schema")
    except (ValueError, KeyError, TypeError):
        log.warning("%s of %s is not a record of this version: the page has no section for it", path, dest.address)
        return None
    return record


def evaluation_for_page(sae: EvaluatedSAE, data: Any, run_record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The run's evaluation if it used these weights and the run's own test documents, else None."""
    entry = run_record.get("evaluation", {})
    if entry.get("weights") != sae.cache_key["sae"] or entry.get("data") is None:
        return None
    own_data = json_values(stream_cache_key(split_stream(data, "test", 1)))
    if json.loads(json.dumps(own_data)) != entry["data"]:
        log.warning("%s was evaluated on other data than its run's: the page does not show that evaluation", sae.source)
        return None
    return {key: entry.get(key) for key in ("figures", "intervals", "tokens", "documents", "spliced_tokens", "seed")}


def measure_exported(sae: EvaluatedSAE, data: Any, tokens: int | None) -> dict[str, Any]:
    """FVU, L0, share of dead latents and density of each latent, on validation tokens; by default as many as an export measures on.

    The result also has `tokens`, the number of tokens, and `probe`, activations of the first tokens (at most 64).
    """
    if tokens is not None and tokens < 1:
        raise InputError(f"tokens must be at least 1, got {tokens}")
    select_hook(sae, data)
    sae.sae.to(device_of(data))
    data.setup("test")
    samples = validation_activations(sae, data, min(data.validation_tokens, EXPORT_TOKENS) if tokens is None else tokens)
    fired, sums = torch.zeros(len(sae.W_dec), dtype=torch.int64), None
    for x in samples:
        codes, rebuilt = sae.encode_decode(x)
        fired += codes.firings().cpu()
        new = functional.reconstruction_sums(x.float(), rebuilt)
        sums = new if sums is None else tuple(a + b for a, b in zip(sums, new, strict=True))
    if sums is None:
        raise InputError(f"{sae.source}: its data have no validation tokens to measure on")
    count = sum(map(len, samples))
    fvu = functional.fvu_of_sums(sums).item()  # pyright: ignore[reportArgumentType]
    figures = {"tokens": count, "fvu": fvu, "l0": int(fired.sum()) / count, "dead": (fired == 0).float().mean().item()}
    return {**figures, "density": fired / count, "probe": samples[0][:64].cpu()}


def check_measurement(sae: EvaluatedSAE, measured: Mapping[str, Any], run_record: Mapping[str, Any]) -> None:
    """Reject an SAE that measures differently from the record of its export, or of its calibration if it was calibrated later.

    L0 is compared with either record, FVU only with that of the export. An SAE with an FVU of 1 or more, or an L0 of 0, is rejected too.
    """
    calibration = sae.metadata.get("threshold_rule") or {}
    export = {} if calibration else run_record.get("validation", {}).get("exported", {}).get("primary", {})
    for name, record in (("l0", calibration or export), ("fvu", export)):
        tolerance = SAME_TOKENS if abs(measured["tokens"] / (record.get("tokens") or 1) - 1) < 0.01 else OTHER_TOKENS
        if (value := record.get(name)) and abs(measured[name] / value - 1) > tolerance:
            raise InputError(
                f"{sae.source} measures {name} {measured[name]:.4g} on {measured['tokens']:,} tokens, and the run recorded {value:.4g} on "
                f"{record.get('tokens', 0):,}: the SAE, the model or the text is not what it was"
            )
    if not measured["fvu"] < 1 or measured["l0"] == 0:
        raise InputError(f"{sae.source} explains nothing of its activations (FVU {measured['fvu']:.4g}, L0 {measured['l0']:.4g})")


def publication_record(
    sae: EvaluatedSAE,
    recipe: Mapping[str, Any],
    run_record: Mapping[str, Any],
    measured: Mapping[str, Any],
    overrides: Mapping[str, str],
    name: str,
    evaluation: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The record of a published SAE, without secrets and local paths: the content of its model card and the recipe to train it again."""
    metadata = {**sae.metadata, **overrides}
    public_names = {str(sae.metadata[key]): value for key, value in overrides.items() if sae.metadata.get(key)}
    model: dict[str, Any] = recipe.get("model", {}).get("init_args", {})
    normalizer = str(model.get("primary", {}).get("init_args", {}).get("normalize_activations", "none"))
    meta = (sae.folder / "saes" / "meta" / "cfg.json").exists()
    penalties = {key: part.get("init_args", {}).get("weight", 0.0) for key, part in (model.get("penalties") or {}).items()}
    record = {
        "schema": SCHEMA,
        "id": name,
        "model": str(metadata.get("model_name") or "unknown"),
        "hook": str(metadata.get("hook_name") or "unknown"),
        "dataset": metadata.get("dataset_path"),
        "context_size": metadata.get("context_size"),
        "left_out": excluded_tokens(metadata),
        "architecture": sae.sae.cfg.architecture(),
        "trained_as": str(metadata.get("training_architecture") or sae.sae.cfg.architecture()),
        "d_in": int(sae.W_dec.shape[1]),
        "d_sae": len(sae.decoder_rows),
        "thresholds": describe_thresholds(sae, run_record),
        "training_tokens": int(metadata.get("training_tokens") or 0),
        "normalizer": normalizer,
        "normalizer_is": NORMALIZERS.get(normalizer, "is folded into the weights"),
        "penalties": penalties,
        "n_p": model.get("n_p", 10),
        "n_m": model.get("n_m", 5),
        "meta": {"id": f"{name}-meta", "d_sae": model["meta"]["init_args"]["d_sae"]} if meta and model.get("meta") else None,
        "init_from": metadata.get("init_from"),
        "measured": {key: measured[key] for key in ("tokens", "fvu", "l0", "dead")},
        "evaluation": evaluation,
        "recipe": {key: recipe[key] for key in ("seed_everything", "model", "data") if key in recipe},
        "versions": versions(),
    }
    return redact(without_local_paths(record, public_names))


def describe_thresholds(sae: EvaluatedSAE, run_record: Mapping[str, Any]) -> str | None:
    """The origin of the thresholds; None if training learned them, the SAE has none, or the run's record has no export of it."""
    rule = sae.metadata.get("threshold_rule")
    if rule:
        return f"set for L0 {rule['target_l0']:g} by the rule `{rule['rule']}` on {rule['tokens']:,} validation tokens"
    export = run_record.get("validation", {}).get("exported", {}).get("primary", {})
    if sae.target_l0 is None or pretrained.pre_activations(sae.sae) is None or not export:
        return None
    if export["calibrated"]:
        return f"one for all latents, set for L0 {export['target_l0']:g} on {export['tokens']:,} validation tokens"
    return f"one for all latents, the running mean of training at L0 {export['target_l0']:g}"


def excluded_tokens(metadata: Mapping[str, Any]) -> list[str]:
    """Kinds of tokens that training and measurements exclude; none if the metadata do not say that special tokens are excluded."""
    if not metadata.get("exclude_special_tokens"):
        return []
    masks = ["special tokens"]
    if skipped := (metadata.get("seqpos_slice") or [0])[0]:
        masks.append(f"the first {skipped} positions of a context")
    if max_ratio := metadata.get("max_norm_ratio"):
        masks.append(f"tokens whose norm is over {max_ratio:g} times the median")
    return masks


def public_metadata(folder: Path) -> dict[str, Any]:
    """The metadata in an SAE's cfg.json that are or contain an absolute path, with only its last part."""
    metadata: dict[str, Any] = json.loads((folder / "cfg.json").read_text()).get("metadata", {})
    return {key: public for key, value in metadata.items() if (public := without_local_paths(value, {})) != value}


def without_local_paths(tree: Any, public_names: Mapping[str, str]) -> Any:
    """A copy of nested settings: each text in `public_names` is replaced by its public name, any other absolute path by its last part."""
    if isinstance(tree, Mapping):
        return {key: without_local_paths(value, public_names) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_local_paths(value, public_names) for value in tree]
    if not isinstance(tree, str):
        return tree
    return public_names.get(tree, Path(tree).name if Path(tree).is_absolute() else tree)
