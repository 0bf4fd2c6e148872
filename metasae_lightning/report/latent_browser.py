"""Single latents for the page: where each fires and with which others, its nearest latents, its match and its meta-latents.

NumPy reads decoders and JumpReLU encoders, so that most pages need no torch. Other SAEs are loaded with SAELens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from metasae_lightning.errors import InputError
from metasae_lightning.report.example_texts import Example, examples_of
from metasae_lightning.report.judged_latents import JudgedLatent, judged_entry, judged_latents
from metasae_lightning.report.load_runs import Arm

Matrix: TypeAlias = NDArray[np.float32]
Pair: TypeAlias = list[float]  # index and value
# Per latent: nearest decoder rows and meta-latents that are shown; per meta-latent: latents that are shown.
NEIGHBOURS, METAS, SHARING = 6, 4, 8
# Cosine from which a latent of the other arm counts as like its nearest row.
ALIKE = 0.3
# Decoder rows whose cosines with all others are in memory at once.
ROWS = 1024
SEGMENTS = 64  # of a row, whose maxima bound its largest values
# Fields of a latent and their names in `latents.json.gz`, which older records lack.
RECORDED = {"partners": "partners", "histogram": "histograms", "promoted": "promoted", "suppressed": "suppressed"}
# Architectures whose folder holds the decoder as SAELens uses it.
DIRECT = {"standard", "gated", "jumprelu", "topk"}


@dataclass(frozen=True)
class Decoder:
    """Decoder directions of one arm, and how its meta-SAE composes them."""

    rows: Matrix
    """Unit decoder rows, of shape (d_sae, d_in)."""
    metas: Matrix | None
    """Activation of each meta-latent on each row, of shape (d_sae, d_meta); None without a meta-SAE."""


def read_decoder(arm: Arm) -> Decoder | None:
    """The decoder that an arm exported, or that of the SAELens folder which was evaluated; None without such a folder."""
    folder, entry = arm.folder / "saes", arm.entry or {}
    if not (folder / "primary" / "cfg.json").exists():
        evaluated = Path(entry.get("sae", ""))
        return Decoder(directions(decoder_rows(evaluated), entry), None) if (evaluated / "cfg.json").exists() else None
    rows = directions(decoder_rows(folder / "primary"), entry)
    if not (folder / "meta" / "cfg.json").exists():
        return Decoder(rows, None)
    width = decoder_rows(folder / "meta").shape[1]
    if width != rows.shape[1]:
        raise InputError(f"{folder / 'meta'} reads rows of {width}, and {folder / 'primary'} has rows of {rows.shape[1]}")
    return Decoder(rows, encode(folder / "meta", rows))


def directions(matrix: Matrix, entry: Mapping[str, Any]) -> Matrix:
    """Rows divided by their lengths; then minus these, if the evaluation's entry counts each sign as a latent."""
    rows = matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
    return np.concatenate([rows, -rows]) if entry.get("by_polarity") else rows


def decoder_rows(folder: Path) -> Matrix:
    """The directions of a SAELens folder's units, read with NumPy; SAELens loads architectures outside `DIRECT` and bfloat16."""
    config, weights = read_folder(folder)
    if weights is not None and config.get("architecture") in DIRECT:
        return weights["W_dec"].astype(np.float32)
    from metasae_lightning.sae.pretrained import load_directions

    return load_directions(folder).numpy()


def encode(folder: Path, x: Matrix) -> Matrix:
    """Latent activations of a SAELens SAE on some rows.

    NumPy computes them for a JumpReLU SAE with the normaliser `none` or `layer_norm`. Any other SAE, and weights in bfloat16, need torch
    and SAELens, which are imported then.
    """
    config, weights = read_folder(folder)
    normalizer = config.get("normalize_activations", "none")
    if weights is None or config.get("architecture") != "jumprelu" or normalizer not in ("none", "layer_norm"):
        import torch

        from metasae_lightning.sae.pretrained import load_pretrained

        with torch.no_grad():
            return load_pretrained(folder).encode(torch.from_numpy(x)).float().numpy()
    if normalizer == "layer_norm":
        x = x - x.mean(1, keepdims=True)
        x = x / (x.std(1, ddof=1, keepdims=True) + np.float32(1e-5))
    if config.get("apply_b_dec_to_input"):
        x = x - weights["b_dec"]
    pre_activations = x @ weights["W_enc"] + weights["b_enc"]
    return np.where((pre_activations > weights["threshold"]) & (pre_activations > 0), pre_activations, np.float32(0))


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Config and weights of a SAELens folder; the weights are None if NumPy lacks their type (bfloat16)."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        config = json.loads((folder / "cfg.json").read_text())
        return config, dict(load_file(folder / "sae_weights.safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be read: {' '.join(str(error).split())}") from error
    except (KeyError, TypeError, AttributeError):  # bfloat16
        return json.loads((folder / "cfg.json").read_text()), None


@dataclass(frozen=True)
class Latent:
    """What the page shows of one latent."""

    number: int
    """Its index in the SAE."""
    firings: int
    """Number of tokens that it fires on."""
    maximum: float
    """Its largest activation."""
    neighbours: list[Pair]
    """Nearest decoder rows and their cosines."""
    match: Pair
    """Nearest decoder row of the other arm and its cosine; empty without another arm."""
    matched_by: list[Pair]
    """Latents of the other arm whose nearest row is this one, and their cosines: several if the other arm splits it."""
    metas: list[Pair]
    """Meta-latents that compose its row, and their activations."""
    partners: list[Pair]
    """Latents that it fires together with most, and their phi."""
    histogram: list[int]
    """Number of firings in equal steps from 0 to the maximum; empty in an older record."""
    promoted: list[str]
    """Tokens whose logits its row raises most; empty if they were not computed."""
    suppressed: list[str]
    """Tokens whose logits its row lowers most."""
    examples: list[Example]
    """Tokens that it fires on, strongest first."""
    judged: JudgedLatent | None = None
    """What a judge said of it; None if it was not judged."""

    @property
    def index_row(self) -> list[Any]:
        """The latent in the list of all: number, firings, maximum, largest cosines and phi, token that it fires on most, and judgement."""
        first = self.examples[0].tokens[self.examples[0].at] if self.examples else ""
        scores = [pairs[0][1] if pairs else None for pairs in (self.neighbours, [self.match] if self.match else [], self.partners)]
        return [self.number, self.firings, self.maximum, *scores, first, *(self.judged.index_columns if self.judged else [])]


@dataclass(frozen=True)
class BrowsedArm:
    """The latents of one arm on the page."""

    entry: dict[str, Any]
    """The arm's name and counts, the index of the other arm, and the latents of each meta-latent."""
    latents: list[Latent]
    """Latents that fired, in the order of their numbers."""


def browsed_latents(arms: Sequence[Arm], decoders: Sequence[Decoder | None], matches: Sequence[list[Pair]], limit: int) -> list[BrowsedArm]:
    """Of each arm up to `limit` of the latents that fired, from the rarest to the commonest.

    An arm without recorded latents, or with a decoder that does not fit them, is left out; without a decoder, as for an SAE from the Hub,
    neighbours are left out. `matches` is the result of `matches_of_arms`.
    """
    browsed: list[BrowsedArm] = []
    for index, (arm, decoder) in enumerate(zip(arms, decoders, strict=True)):
        latents = arm.latents
        if latents is None or (decoder is not None and len(latents["firings"]) != len(decoder.rows)):
            continue
        firings = np.asarray(latents["firings"])
        other = next((number for number, other in enumerate(decoders) if number != index and other is not None), None)
        counts = {"latents": len(firings), "live": int((firings > 0).sum()), "tokens": latents["tokens"]}
        metas = latents_of_metas(None if decoder is None else decoder.metas)
        entry = {"arm": index, "name": arm.name, **counts, "other": other, "metas": metas, **judged_entry(arm, arms)}
        matches_of_other = [] if other is None else matches[other]
        judged = judged_latents(arm)
        chosen = spread_latents(firings, limit, list(judged))
        browsed.append(BrowsedArm(entry, describe_latents(decoder, chosen, latents, matches[index], matches_of_other, judged)))
    return browsed


def matches_of_arms(decoders: Sequence[Decoder | None]) -> list[list[Pair]]:
    """For each arm, the pair of each decoder row with the nearest row of the other arm; pairs are empty unless two arms have decoders."""
    if len(decoders) == 2 and decoders[0] is not None and decoders[1] is not None:
        return list(best_matches(decoders[0].rows, decoders[1].rows))
    return [[] if decoder is None else [[] for _ in decoder.rows] for decoder in decoders]


def best_matches(rows: Matrix, others: Matrix) -> tuple[list[Pair], list[Pair]]:
    """The index and cosine of the nearest row of `others` to each row, and of the nearest of `rows` to each of `others`.

    >>> best_matches(np.eye(2, dtype=np.float32), np.array([[0.6, 0.8]], dtype=np.float32))
    ([[0, 0.6], [0, 0.8]], [[1, 0.8]])
    """
    forward: list[Pair] = []
    index, cosine = np.zeros(len(others), dtype=int), np.full(len(others), -np.inf, dtype=np.float32)
    for begin in range(0, len(rows), ROWS):
        cosines = rows[begin : begin + ROWS] @ others.T
        forward += [pairs[0] for pairs in largest(cosines, 1)]
        nearest = cosines.argmax(0)
        best = np.take_along_axis(cosines, nearest[None], 0)[0]
        better = np.flatnonzero(best > cosine)
        index[better], cosine[better] = begin + nearest[better], best[better]
    rounded = cosine.astype(float).round(3).tolist()
    return forward, [list(pair) for pair in zip(index.tolist(), rounded, strict=True)]


def spread_latents(firings: NDArray[Any], limit: int, preferred: Sequence[int] = ()) -> list[int]:
    """Numbers of latents that fired, ascending: all, or `limit`: the preferred, and others evenly from the rarest to the commonest."""
    live = np.flatnonzero(firings)
    if len(live) <= limit:
        return live.tolist()
    kept = np.intersect1d(live, np.asarray(preferred, dtype=int))[:limit]
    others = np.setdiff1d(live, kept)
    order = others[np.argsort(firings[others], kind="stable")]
    drawn = order[np.linspace(0, len(order) - 1, limit - len(kept), dtype=np.float32).round().astype(int)]
    return sorted([*kept.tolist(), *drawn.tolist()])


def describe_latents(
    decoder: Decoder | None,
    chosen: list[int],
    latents: Mapping[str, Any],
    matches: list[Pair],
    matches_of_other: list[Pair],
    judged: Mapping[int, JudgedLatent],
) -> list[Latent]:
    """The chosen latents; `latents` is the content of `latents.json.gz`. `matches_of_other` are of the other arm's latents in this one."""
    described: list[Latent] = []
    matched_by = latents_by_match(matches_of_other)
    for begin in range(0, len(chosen), ROWS):
        numbers = np.asarray(chosen[begin : begin + ROWS])
        neighbours: list[list[Pair]] = [[]] * len(numbers)
        metas: list[list[Pair]] = [[]] * len(numbers)
        if decoder is not None:
            cosines = decoder.rows[numbers] @ decoder.rows.T
            cosines[np.arange(len(numbers)), numbers] = -np.inf
            neighbours = largest(cosines, min(NEIGHBOURS, len(decoder.rows) - 1))
            metas = metas if decoder.metas is None else largest(decoder.metas[numbers], METAS)
        for row, latent in enumerate(numbers.tolist()):
            described.append(
                Latent(
                    *(latent, latents["firings"][latent], latents["maximum"][latent]),
                    neighbours=neighbours[row],
                    match=matches[latent] if matches else [],
                    matched_by=matched_by.get(latent, []),
                    metas=[pair for pair in metas[row] if pair[1] > 0],
                    **{kind: latents.get(key, {}).get(str(latent), []) for kind, key in RECORDED.items()},
                    examples=examples_of(latents, latent),
                    judged=judged.get(latent),
                )
            )
    return described


def latents_by_match(matches: Sequence[Pair]) -> dict[int, list[Pair]]:
    """For each row that is the match of rows of the other decoder: these and their cosines from `ALIKE` up, largest first.

    >>> latents_by_match([[5, 0.4], [5, 0.9], [5, 0.1], [2, 0.8]])
    {5: [[1, 0.9], [0, 0.4]], 2: [[3, 0.8]]}
    """
    by_match: dict[int, list[Pair]] = {}
    for latent, match in enumerate(matches):
        if match and match[1] >= ALIKE:
            by_match.setdefault(int(match[0]), []).append([latent, match[1]])
    return {match: sorted(pairs, key=lambda pair: -pair[1])[:SHARING] for match, pairs in by_match.items()}


def latents_of_metas(metas: Matrix | None) -> list[list[Pair]]:
    """For each meta-latent, the latents that it is most active on; empty without a meta-SAE."""
    if metas is None:
        return []
    return [[pair for pair in pairs if pair[1] > 0] for pairs in largest(np.ascontiguousarray(metas.T), SHARING)]


def largest(matrix: NDArray[Any], count: int) -> list[list[Pair]]:
    """Index and value, to 3 decimals, of the `count` largest values of each row, largest first; equal values in order of index.

    Each row is cut into segments. The `count`-th largest of the segments' maxima is a lower bound: only values from it up are sorted.

    >>> largest(np.array([[0.5, 2.0, 1.0], [3.0, 0.0, 3.0]]), 2)
    [[[1, 2.0], [2, 1.0]], [[0, 3.0], [2, 3.0]]]
    """
    rows, width = matrix.shape
    count = min(count, width)
    if not rows or not count:
        return [[] for _ in range(rows)]
    segments = np.linspace(0, width, min(max(SEGMENTS, count), width), endpoint=False).astype(int)
    maxima = np.maximum.reduceat(matrix, segments, axis=1)
    bound = np.partition(maxima, -count, axis=1)[:, -count]
    row, column = np.divmod(np.flatnonzero(matrix >= bound[:, None]), width)  # 8 times as fast as `nonzero` of a matrix
    value = matrix[row, column]
    order = np.lexsort((-value, row))
    picked = order[np.searchsorted(row, np.arange(rows))[:, None] + np.arange(count)]
    numbers = value[picked].astype(float).round(3).tolist()
    return [list(map(list, zip(*pairs, strict=True))) for pairs in zip(column[picked].tolist(), numbers, strict=True)]
