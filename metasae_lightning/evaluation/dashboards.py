"""Dashboards of an SAE's latents as the JSON files of SAEDashboard, which Neuronpedia imports."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning.atomic_files import draft_of
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.collect import CollectedCodes
from metasae_lightning.evaluation.top_contexts import Context, Spelling, top_contexts

# SAEDashboard's sizes: bins of a histogram, tokens promoted and suppressed, rows of a table.
BINS, TOKENS, TABLE_ROWS = 50, 10, 3
# Logits in memory at once: 256 MiB of float32.
LOGITS = 2**26


@dataclass(frozen=True)
class Source:
    """The names that Neuronpedia has for the SAE, its model and its text, and the size of the text."""

    model_id: str
    """Neuronpedia's id of the language model, such as `gpt2-small`."""
    sae_set: str
    """Name of the set of SAEs."""
    layer: int
    """Layer of the hook."""
    dataset: str
    """Name of the text."""
    prompts: int
    """Number of contexts."""
    context_size: int
    """Tokens in a context."""


def layer_of(hook: str) -> int:
    """The layer in a hook's name.

    >>> layer_of("blocks.15.hook_resid_post"), layer_of("model.layers.3")
    (15, 3)
    """
    match = re.search(r"\.(\d+)(?:\.|$)", hook)
    if match is None:
        raise InputError(f"the hook {hook} names no layer, which dashboards need: choose an SAE of one layer")
    return int(match[1])


def write_dashboards(collected: CollectedCodes, model: Any, folder: Path, source: Source, *, contexts: int, per_file: int) -> int:
    """Write SAEDashboard's folder: `batch-N.json` with `per_file` latents each, and the dead latents; returns the number of live ones.

    The folder is written atomically. One that holds anything but dashboards is an `InputError`.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "run_settings.json").exists():
        raise InputError(f"{folder} holds something other than dashboards: name another folder with --out")
    firings = activations_by_latent(collected)
    live, tokens = sorted(firings), int(collected.reconstruction.tokens)
    names = {"model_id": source.model_id, "layer": source.layer, "sae_set": source.sae_set}
    dead = sorted(set(range(len(collected.subject.W_dec))) - set(live))
    threshold = math.log10(1 / tokens)
    with draft_of(folder) as draft:
        draft.mkdir()
        for number, begin in enumerate(range(0, len(live), per_file)):
            latents = live[begin : begin + per_file]
            features = [*dashboards(collected, model, latents, firings, source, contexts=contexts)]
            write_json(draft / f"batch-{number}.json", {**names, "sae_id_suffix": None, "features": features})
        skipped = {**names, "layer": str(source.layer), "log_sparsity": threshold, "skipped_indexes": dead}
        write_json(draft / "skipped_indexes.json", skipped)
        sizes = {"n_prompts_total": source.prompts, "n_tokens_in_prompt": source.context_size, "n_features_at_a_time": per_file}
        settings = {**names, "huggingface_dataset_path": source.dataset, **sizes, "sparsity_threshold": threshold}
        write_json(draft / "run_settings.json", settings)
    return len(live)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file; parts of characters, which UTF-8 cannot hold, are escaped."""
    path.write_text(json.dumps(content), encoding="utf-8")


def activations_by_latent(collected: CollectedCodes) -> dict[int, Float[np.ndarray, " firing"]]:
    """The activations of each latent that fired, on all tokens."""
    parts = [(codes.latents.numpy(), codes.values.numpy()) for codes, _ in collected.codes()]
    latents, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(latents, kind="stable")
    live, starts = np.unique(latents[order], return_index=True)
    return dict(zip(live.tolist(), np.split(values[order], starts[1:]), strict=True)) if len(live) else {}


def dashboards(
    collected: CollectedCodes,
    model: Any,
    latents: Sequence[int],
    firings: Mapping[int, np.ndarray],
    source: Source,
    *,
    contexts: int,
) -> Iterator[dict[str, Any]]:
    """The dashboard of each latent, with SAEDashboard's names of its entries."""
    rows, tokens = collected.subject.W_dec[list(latents)], int(collected.reconstruction.tokens)
    spelling, best = Spelling(model.tokenizer), top_contexts(collected, latents, model.tokenizer, count=contexts)
    for latent, row, logits in zip(latents, rows, logits_in_chunks(model, rows), strict=True):
        values = firings[latent]
        yield {
            "feature_index": latent,
            **neuron_alignment(row),
            **{f"correlated_{kind}_{key}": [] for kind in ("neurons", "features") for key in ("indices", "l1", "pearson")},
            **promoted_and_suppressed(logits, spelling),
            "frac_nonzero": len(values) / tokens,
            **histogram("freq_hist_data", values),
            **histogram("logits_hist_data", np.zeros(0) if logits is None else logits.numpy()),
            "n_prompts_total": source.prompts,
            "n_tokens_in_prompt": source.context_size,
            "dataset": source.dataset,
            "decoder_weights_dist": [],
            "activations": [activation(context, float(values.max())) for context in best[latent]],
            "vector": [],
        }


def logits_in_chunks(model: Any, rows: Float[Tensor, "latent d_in"]) -> Iterator[Tensor | None]:
    """The logits that each decoder row adds, on the CPU; None where the model's unembedding does not read the hook's activations."""
    chunk = max(1, LOGITS // max(1, len(model.tokenizer)))
    for part in rows.split(chunk):
        logits = model.logits_of_directions(part)
        yield from [None] * len(part) if logits is None else logits.cpu()


def neuron_alignment(row: Float[Tensor, " d_in"]) -> dict[str, list[Any]]:
    """The largest coordinates of a decoder row, and their share of its L1 norm."""
    values, indices = row.float().cpu().topk(min(TABLE_ROWS, len(row)))
    shares = values.abs() / row.abs().sum().float().cpu()
    names = ("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1")
    return dict(zip(names, (indices.tolist(), rounded(values), rounded(shares)), strict=True))


def promoted_and_suppressed(logits: Float[Tensor, " vocabulary"] | None, spelling: Spelling) -> dict[str, list[Any]]:
    """Texts and logits of the tokens that a latent raises and lowers most."""
    if logits is None:
        return {"neg_str": [], "neg_values": [], "pos_str": [], "pos_values": []}
    result: dict[str, list[Any]] = {}
    for name, largest in (("neg", False), ("pos", True)):
        values, tokens = logits.topk(min(TOKENS, len(logits)), largest=largest)
        result[f"{name}_str"] = [spelling.token_texts([token])[0] for token in tokens.tolist()]
        result[f"{name}_values"] = rounded(values)
    return result


def histogram(name: str, values: np.ndarray) -> dict[str, list[float]]:
    """The centres and heights of a histogram's bars; empty without values."""
    if not len(values):
        return {f"{name}_bar_values": [], f"{name}_bar_heights": []}
    heights, edges = np.histogram(values, BINS)
    return {f"{name}_bar_values": rounded((edges[1:] + edges[:-1]) / 2), f"{name}_bar_heights": heights.astype(float).tolist()}


def activation(context: Context, maximum: float) -> dict[str, Any]:
    """One of a latent's top contexts; SAEDashboard marks them by a bin from -1 to the latent's largest activation."""
    place = {"bin_min": -1.0, "bin_max": round(maximum, 3), "bin_contains": -1.0, "qualifying_token_index": context.at}
    return {**place, "tokens": context.tokens, "values": context.values}


def rounded(values: Any) -> list[float]:
    """The values to three decimal places."""
    return [round(float(value), 3) for value in torch.as_tensor(values).tolist()]
