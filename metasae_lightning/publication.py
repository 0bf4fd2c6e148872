"""A run made public: its SAEs with everything that others need to know, loaded back and measured again before anything goes out."""

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from metasae_lightning import card, functional, saelens
from metasae_lightning.destinations import HUB, Destination, hidden
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation import versions
from metasae_lightning.subjects import Subject, device_of, only_hook
from metasae_lightning.thresholds import sample

log = logging.getLogger(__name__)

RECORD = "metasae.json"
# A folder that measures further than this from what its run recorded is not what the run left, or the model or the text is not.
TOLERANCE = 0.1
NORMALIZERS = {
    "none": "changes nothing",
    "layer_norm": "is applied by the SAE itself, and undone",
    "constant_norm_rescale": "is applied by the SAE itself, and undone",
}


def publish(
    one: Subject,
    data: Any,
    dest: Destination,
    recipe: Mapping[str, Any],
    *,
    name: str | None = None,
    tokens: int = 32_768,
    replace: bool = False,
    overrides: Mapping[str, str] | None = None,
) -> tuple[str, dict[str, Any]]:
    """Publish a run's SAEs under `name` and `name-meta`; returns where they are and what was recorded of them."""
    told = {**one.metadata, **(overrides or {})}
    name = name or str(told.get("hook_name") or one.name)
    found = measured(one, data, tokens)
    kept = recorded(one.folder)
    check(one, found, kept)
    with tempfile.TemporaryDirectory() as room:
        folders = {name: Path(room) / "primary"}
        record = record_of(one, recipe, kept, found, told, name)
        about = {**(overrides or {}), "metasae_lightning": {key: record[key] for key in ABOUT}}
        density = found.pop("density")
        loaded = saelens.stage(one.folder / "saes" / "primary", folders[name], metadata=about, density=density)
        if not torch.equal(loaded.encode(found["probe"]), one.sae.cpu().encode(found.pop("probe"))):
            raise InputError(f"{one.place}: the folder loaded back does not encode as the run's SAE does")
        if record["meta"]:
            meta = folders[record["meta"]["id"]] = Path(room) / "meta"
            saelens.stage(
                one.folder / "saes" / "meta", meta, metadata={"reads": f"unit decoder rows of {name}, as its normaliser has them"}
            )
        (folders[name] / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        there = dest.listing()
        others = [json.loads(dest.read(path)) for path in sorted(there) if path.endswith(f"/{RECORD}") and path != f"{name}/{RECORD}"]
        before = dest.read("README.md") if "README.md" in there else ""
        repository = dest.place.removeprefix(HUB) if dest.place.startswith(HUB) else None
        text = card.page(sorted([*others, record], key=lambda each: each["id"]), repository, before)
        return saelens.publish(folders, dest, card=text, replace=replace), record


ABOUT = ("trained_as", "normalizer", "normalizer_is", "penalties", "n_p", "n_m", "meta", "init_from", "measured", "recipe", "versions")


def measured(one: Subject, data: Any, tokens: int) -> dict[str, Any]:
    """FVU, L0, dead share and each latent's density on validation tokens, and a few activations to compare codes on."""
    only_hook(one, data)
    one.sae.to(device_of(data))
    data.setup("test")
    samples = sample(one, data, tokens)
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


def recorded(folder: Path) -> dict[str, Any]:
    """What the run says of itself."""
    path = folder / "evaluation.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error})") from error


def check(one: Subject, found: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    """What is measured is what the run recorded when it exported, or when its thresholds were set anew."""
    export = kept.get("validation", {}).get("exported", {}).get("primary", {})
    anew = kept.get("calibration", {})
    for name, value in (("l0", anew.get("l0", export.get("l0"))), ("fvu", None if anew else export.get("fvu"))):
        if value and abs(found[name] / value - 1) > TOLERANCE:
            raise InputError(
                f"{one.place} measures {name} {found[name]:.4g} on {found['tokens']:,} tokens, and the run recorded {value:.4g}: "
                "the SAE, the model or the text is not what it was"
            )
    if not found["fvu"] < 1 or found["l0"] == 0:
        raise InputError(f"{one.place} explains nothing of its activations (FVU {found['fvu']:.4g}, L0 {found['l0']:.4g})")


def record_of(
    one: Subject, recipe: Mapping[str, Any], kept: Mapping[str, Any], found: Mapping[str, Any], told: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """Everything that a page says, and that who trains the next one wants to know."""
    model: dict[str, Any] = recipe.get("model", {}).get("init_args", {})
    normalizer = str(model.get("primary", {}).get("init_args", {}).get("normalize_activations", "none"))
    meta = (one.folder / "saes" / "meta" / "cfg.json").exists()
    penalties = {key: part.get("init_args", {}).get("weight", 0.0) for key, part in (model.get("penalties") or {}).items()}
    evaluated = kept.get("evaluation", {})
    if evaluated.get("weights") != one.identity["sae"]:  # of other thresholds
        evaluated = None
    return {
        "id": name,
        "model": str(told.get("model_name") or "unknown"),
        "hook": str(told.get("hook_name") or "unknown"),
        "dataset": told.get("dataset_path"),
        "context_size": told.get("context_size"),
        "skip_positions": (told.get("seqpos_slice") or [0])[0] or 0,
        "max_norm_ratio": told.get("max_norm_ratio"),
        "architecture": one.sae.cfg.architecture(),
        "trained_as": str(told.get("training_architecture") or one.sae.cfg.architecture()),
        "d_in": int(one.W_dec.shape[1]),
        "d_sae": len(one.W_dec),
        "target_l0": one.target_l0 if saelens.pre_activations(one.sae) is not None else None,
        "rule": (told.get("threshold_rule") or {}).get("rule", "global"),
        "training_tokens": int(told.get("training_tokens") or 0),
        "normalizer": normalizer,
        "normalizer_is": NORMALIZERS.get(normalizer, "is folded into the weights"),
        "penalties": penalties,
        "n_p": model.get("n_p", 10),
        "n_m": model.get("n_m", 5),
        "meta": {"id": f"{name}-meta", "d_sae": model["meta"]["init_args"]["d_sae"]} if meta and model.get("meta") else None,
        "init_from": told.get("init_from"),
        "measured": {key: found[key] for key in ("tokens", "fvu", "l0", "dead")},
        "evaluation": {key: evaluated[key] for key in ("figures", "intervals", "tokens", "documents", "seed")} if evaluated else None,
        "recipe": hidden({key: recipe[key] for key in ("seed_everything", "model", "data") if key in recipe}),
        "versions": versions(),
    }
