"""The commands `evaluate` (also `test`), `compare` and `calibrate`."""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from metasae_lightning import report, run_folder
from metasae_lightning.cli.arguments import check_same_data, data_for, open_saes, places_of_arms, settings_of
from metasae_lightning.data.datamodule import ActivationsDataModule
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.compare import compare, differences
from metasae_lightning.evaluation.evaluate import Evaluation, evaluate
from metasae_lightning.evaluation.latents_record import latents_record
from metasae_lightning.evaluation.matched_l0 import target_l0, validation_activations
from metasae_lightning.evaluation.promoted_tokens import promoted_tokens
from metasae_lightning.evaluation.result_cache import hash_settings
from metasae_lightning.evaluation.saes import EvaluatedSAE, device_of, select_hook
from metasae_lightning.evaluation.settings import Settings
from metasae_lightning.evaluation.top_contexts import top_contexts
from metasae_lightning.memory.evaluation_plan import print_and_check_evaluation_plan
from metasae_lightning.sae import pretrained
from metasae_lightning.sae.thresholds import calibrate


def evaluate_saes(args: Namespace) -> int:
    """The command `evaluate`: measure SAEs on held-out tokens, print a table, and write the results beside each SAE."""
    places = places_of_arms([*args.places, *args.sae])
    if not places:
        raise InputError("name a run, a SAELens folder or RELEASE:ID, or for `metasae test` a checkpoint by -c RECIPE --ckpt_path FILE")
    saes = open_saes(places, args.out)
    check_same_data(saes, args)
    settings, data = settings_of(args), data_for(saes[0], args)
    print_plan(saes, data, settings, args.memory_gib)
    results = evaluate(saes, data, settings)
    for result in results[1:]:
        result.entry["against"] = {"weights": results[0].entry["weights"], "differences": differences(results[0], result, settings)}
    model = data.language_model if isinstance(data, ActivationsDataModule) else None
    latents: dict[str, bytes] = {}
    for result in results:
        write_evaluation(result)
        key = hash_settings(result.collected.cache_key)  # arms may hold the same SAE
        latents[key] = latents.get(key) or latents_file(result, model, settings)
        run_folder.write_file(result.collected.subject.folder / "latents.json.gz", latents[key])
    Console().print(report.evaluations({result.collected.subject.name: result.entry for result in results}))
    return 0


def compare_saes(args: Namespace) -> int:
    """The command `compare`: measure two SAEs, match their latents, and print and write the differences."""
    saes, settings = open_saes([args.a, args.b], None), settings_of(args)
    check_same_data(saes, args)
    data = data_for(saes[0], args)
    print_plan(saes, data, settings, args.memory_gib)
    a, b = evaluate(saes, data, settings)
    names = (saes[0].name, saes[1].name)
    comparison = compare(a, b, settings)
    comparison["contexts"] = contexts(comparison, a, b, data)
    out = Path(args.out) if args.out else Path("runs") / f"compare-{saes[0].slug}-{saes[1].slug}.json"
    run_folder.write_record(out, {"a": a.entry, "b": b.entry, **comparison})
    console = Console()
    for table in tables(comparison, (a, b), names):
        console.print(table)
        console.print()
    matching = comparison["matching"]
    console.print(
        f"{matching['pairs']:,} pairs one to one: mean cosine {matching['mean_cosine']:.3f}, {matching['above_0.9']:.1%} above 0.9"
    )
    console.print(f"all results, with the best matches of each latent: {out}")
    return 0


def calibrate_thresholds(args: Namespace) -> int:
    """The command `calibrate`: set the thresholds of an exported SAE from validation tokens."""
    (sae,) = open_saes([args.place], args.out)
    folder = (run_folder.exported_sae(Path(sae.source)) if sae.run else Path(sae.source)).resolve()
    scores, settings = pretrained.pre_activations(sae.sae), settings_of(args)
    if not folder.is_dir():
        raise InputError(f"{args.place}: only a folder can be written to")
    if scores is None:
        raise InputError(f"{args.place}: the architecture {sae.sae.cfg.architecture()} has no thresholds to set")
    rule = "rate" if settings.rule is None else settings.rule
    if rule == "stored":
        raise InputError("rule: global, rate or eer set thresholds; stored leaves them as they are")
    l0 = target_l0([sae], settings.l0)
    data = data_for(sae, args)
    select_hook(sae, data)
    sae.sae.to(device_of(data))
    data.setup("test")
    samples = validation_activations(sae, data, settings.calibration_tokens)
    before = mean_l0(sae, samples)
    result = calibrate(scores, samples, l0, rule)
    entry = {"rule": rule, "target_l0": l0, "l0_before": before, "l0": result.l0, "few_firings": result.n_rare, "tokens": result.tokens}
    pretrained.set_thresholds(folder, result.threshold, {"threshold_rule": entry, "l0": result.l0})
    run_folder.add_entry(sae.record, "calibration", entry, arm=sae.arm)
    few = f", {result.n_rare:,} latents that fired too rarely share one threshold" if rule == "rate" else ""
    Console().print(f"{folder}: L0 {before:.2f} -> {result.l0:.2f} by the rule {rule!r} on {result.tokens:,} validation tokens{few}")
    return 0


def mean_l0(sae: EvaluatedSAE, samples: Sequence[Any]) -> float:
    """The mean number of the SAE's active latents per token, over batches of raw activations."""
    return sum(sae.encode_decode(x)[0].values.numel() for x in samples) / sum(map(len, samples))


def print_plan(saes: Sequence[EvaluatedSAE], data: Any, settings: Settings, limit_gib: float | None) -> None:
    """Print the memory plan of an evaluation, and reject one that does not fit, before the language model is loaded."""
    if isinstance(data, ActivationsDataModule):
        data.reading_cache = False  # an evaluation reads text
    print_and_check_evaluation_plan(
        [sae.sae for sae in saes],
        data,
        pairs_gib=settings.pairs_gib,
        critics=settings.critic_seeds > 0,
        splices=settings.splice_tokens > 0,
        limit_gib=limit_gib,
        by_polarity=settings.by_polarity,
    )


def write_evaluation(result: Evaluation) -> None:
    """Write an evaluation into the record of its SAE or run, and log its numbers to TensorBoard in the record's folder."""
    sae = result.collected.subject
    run_folder.add_entry(sae.record, "evaluation", result.entry, arm=sae.arm)
    flat = {
        f"evaluation/{group}/{name}": value
        for group, figures in result.entry["figures"].items()
        for name, value in figures.items()
        if isinstance(value, float)
    }
    logger = TensorBoardLogger(str(sae.record.parent), name="tensorboard", version=sae.arm)
    logger.log_metrics(flat, step=int(sae.metadata.get("training_tokens") or 0))
    logger.finalize("success")


def latents_file(result: Evaluation, model: Any | None, settings: Settings) -> bytes:
    """The gzipped JSON that the report's latent browser reads (see `latents_record`). Without a language model it has no texts."""
    record = latents_record(result.collected, model and model.tokenizer, count=settings.contexts, memory_gib=settings.pairs_gib)
    if model is not None:
        live = [latent for latent, count in enumerate(record["firings"]) if count]
        record |= promoted_tokens(result.collected.subject, model, live)
    text = json.dumps(run_folder.null_non_finite(record), ensure_ascii=False)
    return gzip.compress(text.encode(errors="replace"), compresslevel=6, mtime=0)


def contexts(comparison: Mapping[str, Any], a: Evaluation, b: Evaluation, data: Any) -> dict[str, dict[str, Any]]:
    """The top contexts of all latents that are part of a split or a merge, by side (`a`, `b`) and latent; none for data without text."""
    if not isinstance(data, ActivationsDataModule):
        return {"a": {}, "b": {}}
    latents: dict[str, set[int]] = {"a": set(), "b": set()}
    for kind, from_side, into_side in (("splits", "a", "b"), ("merges", "b", "a")):
        for split in comparison[kind]:
            latents[from_side].add(split["latent"])
            latents[into_side].update(split["into"])
    tokenizer = data.language_model.tokenizer
    hits_by_side = {side: top_contexts(result.collected, latents[side], tokenizer) for side, result in (("a", a), ("b", b))}
    return {
        side: {str(latent): [{"value": hit.values[hit.at], "text": hit.marked} for hit in hits] for latent, hits in by_latent.items()}
        for side, by_latent in hits_by_side.items()
    }


def tables(comparison: Mapping[str, Any], results: tuple[Evaluation, Evaluation], names: tuple[str, str]) -> list[Any]:
    """The tables of a comparison: measures, differences, phi between the SAEs, splits and merges. `names` are the SAEs' names."""
    texts = comparison["contexts"]
    a_into_b, b_into_a = {"from": texts["a"], "into": texts["b"]}, {"from": texts["b"], "into": texts["a"]}
    return [
        report.evaluations({name: result.entry for name, result in zip(names, results, strict=True)}),
        report.differences(comparison["differences"], names),
        report.cross(comparison["cross_phi"], names),
        *report.shared(comparison["splits"], a_into_b, f"{names[0]} splits:"),
        *report.shared(comparison["merges"], b_into_a, f"{names[1]} merges:"),
    ]
