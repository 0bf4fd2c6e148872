"""The whole evaluation of one SAE or of several on the same held-out tokens: every measure, with its spread, its floor and its cost."""

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning.evaluation.bootstrap import PhiByGroup, bootstrap_weights, interval, jackknife_interval
from metasae_lightning.evaluation.collect import CollectedCodes, SplicedLosses, collect, collect_spliced_losses
from metasae_lightning.evaluation.held_out_text import json_values, split_stream, stream_cache_key
from metasae_lightning.evaluation.matched_l0 import at_matched_l0
from metasae_lightning.evaluation.saes import EvaluatedSAE, check_same_activations, device_of, select_hook
from metasae_lightning.evaluation.settings import Settings
from metasae_lightning.metrics.cofiring import Phi
from metasae_lightning.metrics.dead_latents import DeadLatents
from metasae_lightning.metrics.decoder import DecoderGeometry
from metasae_lightning.metrics.decomposition import Decomposition, spread
from metasae_lightning.metrics.feature_recovery import FeatureRecovery
from metasae_lightning.metrics.loss_recovered import recovered

log = logging.getLogger(__name__)

# Documents are dealt to so many groups where co-firing is resampled.
GROUPS = 64
# log10 of the share of tokens that a latent fires on, a quarter of a decade a bin.
DENSITIES = torch.arange(-7, 0.01, 0.25, dtype=torch.float64)
# Of a decoder row with its nearest.
COSINES = torch.linspace(0, 1, 51, dtype=torch.float64)
# log10 of |phi|.
CORRELATIONS = torch.arange(-5, 0.01, 0.125, dtype=torch.float64)


@dataclass(frozen=True)
class Evaluation:
    """Results of one SAE."""

    seen: CollectedCodes
    """Its codes on the test text."""
    lost: SplicedLosses | None
    """Losses of the language model with it spliced in, if measured."""
    entry: dict[str, Any]
    """Its entry in `evaluation.json`."""


def evaluate(subjects: Sequence[EvaluatedSAE], data: Any, settings: Settings) -> list[Evaluation]:
    """Measure SAEs on the test split of a data module, several of them at matched L0. Cached results are reused."""
    check_same_activations(subjects)
    hook = select_hook(subjects[0], data)
    for subject in subjects:
        subject.sae.to(device_of(data))
    data.setup("test")
    rule = settings.rule or ("rate" if len(subjects) > 1 else "stored")
    if rule != "stored":
        subjects = at_matched_l0(subjects, data, rule, settings.l0, settings.calibration_tokens)
    tokens = settings.tokens or data.test_tokens
    stream = split_stream(data, "test", tokens)
    seen = collect(subjects, stream, tokens)
    lost: Sequence[SplicedLosses | None] = [None] * len(seen)
    model = getattr(data, "language_model", None)
    if settings.splice_tokens and model is not None:
        lost = collect_spliced_losses(seen, stream, min(settings.splice_tokens, tokens), model.complete)
    about = {
        **{"hook": hook, "data": json_values(stream_cache_key(stream)), "split": "test", "seed": settings.seed, "versions": versions()},
        **{"settings": asdict(settings), "together_with": [subject.place for subject in subjects]},
    }
    found = [Evaluation(one, had, {**measure_all(one, had, settings), **about}) for one, had in zip(seen, lost, strict=True)]
    if data.features is not None:
        for one in found:
            one.entry["figures"]["recovery"] = recovery(one.seen, data.features, stream)
    return found


def measure_all(seen: CollectedCodes, lost: SplicedLosses | None, settings: Settings) -> dict[str, Any]:
    """All figures of one SAE, with intervals over documents."""
    subject = seen.subject
    log.info(f"{subject.name}: co-firing, decoder{', critics' if settings.critic_seeds else ''}")
    documents, sums, _ = seen.by_document
    figures: dict[str, Any] = {"reconstruction": floats(seen.reconstruction.compute()), **latents(seen, settings)}
    figures["decoder"] = decoder(subject)
    if settings.critic_seeds:
        figures["critic"] = critic(subject, settings)
    if lost is not None:
        figures["splice"] = lost.figures()
    return {
        **{"sae": subject.place, "architecture": subject.sae.cfg.architecture(), "d_sae": len(subject.W_dec), **subject.decoder_cache_key},
        **{
            "weights": subject.cache_key["sae"],
            "rule": subject.rule or {"rule": "stored"},
            "figures": figures,
            "intervals": intervals(seen, lost, figures["phi"]["excess"], settings),
        },
        **{"tokens": int(sums[:, 0].sum()), "documents": len(documents)},
        **({"spliced_tokens": int(lost.sums[:, 0].sum())} if lost is not None else {}),
    }


def latents(seen: CollectedCodes, settings: Settings) -> dict[str, Any]:
    """Firing rates and co-firing of latents."""
    width = len(seen.subject.W_dec)
    dead, phi = DeadLatents(width), Phi(width, memory_gib=settings.memory_gib)
    for codes, _ in seen.codes():
        dead.update(codes)
        phi.update(codes)
    density = dead.density()
    fired = density[density > 0].log10()
    counts = torch.histogram(fired.clamp(float(DENSITIES[0]), 0), DENSITIES).hist.int().tolist()

    def pairs() -> dict[str, Tensor]:
        log.info(phi.plan())
        counted = phi.count()
        return {**phi.figures(counted), "log10_abs": counted.by_decade(CORRELATIONS)}

    found = seen.subject.result_cache.get_or_compute(
        "phi-pairs", {**seen.cache_key, "all": seen.digests, "edges": CORRELATIONS.tolist()}, pairs
    )
    histogram = {"edges": CORRELATIONS.tolist(), "pairs": found.pop("log10_abs").long().tolist()}
    return {
        "latents": {**floats(dead.compute()), "log10_density": {"edges": DENSITIES.tolist(), "latents": counts}},
        "phi": {**floats(found), "log10_abs": histogram},
    }


def recovery(seen: CollectedCodes, features: Tensor, stream: Any) -> dict[str, float]:
    """How well the decoder recovers known features."""
    metric = FeatureRecovery(features)
    for number, (codes, _) in enumerate(seen.codes()):
        metric.update(seen.subject.W_dec.cpu(), codes, stream.batch(number).features)
    return floats(metric.compute())


def decoder(subject: EvaluatedSAE) -> dict[str, Any]:
    """Cosines between decoder rows."""
    metric = DecoderGeometry()
    metric.update(subject.W_dec.cpu())
    rows = torch.histogram(metric.nearest[0].double().clamp(0, 1), COSINES).hist.int().tolist()
    return {**floats(metric.compute()), "nearest": {"edges": COSINES.tolist(), "rows": rows}}


def critic(subject: EvaluatedSAE, settings: Settings) -> dict[str, float]:
    """Variance that fresh meta SAEs explain of the decoder and of its nulls, one meta SAE at a time."""
    metric = Decomposition(seeds=settings.critic_seeds, steps=settings.critic_steps)
    metric.update(subject.W_dec)

    def explained(name: str, rows: Tensor, seed: int) -> float:
        # Random rows of one shape are the same for every SAE.
        of = {"shape": list(rows.shape)} if name == "random" else subject.decoder_cache_key
        stream_cache_key = {**of, "rows": name, "seed": seed, **metric.settings}
        piece = subject.result_cache.get_or_compute("critic", stream_cache_key, lambda: {"fve": torch.tensor(metric.explained(rows, seed))})
        return piece["fve"].item()

    found: dict[str, list[float]] = {}
    for name, rows in metric.judged().items():
        log.info("%s: %d critics on %s", subject.name, settings.critic_seeds, {"fve": "the decoder"}.get(name, f"{name} rows"))
        found[name] = [explained(name, rows, seed) for seed in range(settings.critic_seeds)]
    return floats(spread(found))


def intervals(seen: CollectedCodes, lost: SplicedLosses | None, excess: float, settings: Settings) -> dict[str, tuple[float, float]]:
    """95 % intervals of figures over resampled documents."""
    found = {name: interval(values) for name, values in resampled_reconstruction(seen, settings).items()}
    if lost is not None:
        found |= {name: interval(values) for name, values in resampled_losses(lost, settings).items()}
    return {**found, "phi_excess": jackknife_interval(excess, excess_without_each(seen))}


def resampled_reconstruction(seen: CollectedCodes, settings: Settings) -> dict[str, Float[Tensor, " resample"]]:
    """Reconstruction figures on resampled documents; the same documents for every SAE with the same seed."""
    _, sums, total = seen.by_document
    weights = document_weights(len(sums), settings)
    tokens, squares, error, active, cosine = (weights @ sums).T
    spread = squares - (weights @ total).square().sum(1) / tokens
    return {"fvu": error / spread, "l0": active / tokens, "cosine": cosine / tokens}


def excess_without_each(seen: CollectedCodes) -> Float[Tensor, " group"]:
    """Excess |phi| without each group of documents."""
    of = {**seen.cache_key, "all": seen.digests, "groups": GROUPS}
    return seen.subject.result_cache.get_or_compute("phi-groups", of, lambda: {"excess": phi_by_group(seen).without_each()})["excess"]


def document_weights(documents: int, settings: Settings) -> Float[Tensor, "resample document"]:
    """Bootstrap weights of documents; NaN for a single document, which has no spread."""
    weights = bootstrap_weights(documents, settings.resamples, settings.seed)
    return weights if documents > 1 else weights * torch.nan


def resampled_losses(lost: SplicedLosses, settings: Settings) -> dict[str, Float[Tensor, " resample"]]:
    """Losses on resampled documents."""
    weights = document_weights(len(lost.sums), settings)
    count, *total = (weights @ lost.sums).T
    found = recovered(torch.stack(total) / count)
    return {**found, "ce_added": found["ce_sae"] - found["ce_clean"]}


def phi_by_group(seen: CollectedCodes) -> PhiByGroup:
    """Co-firing of random pairs of latents by groups of documents."""
    ids, _, _ = seen.by_document
    groups = min(GROUPS, len(ids))
    counts = PhiByGroup(len(seen.subject.W_dec), groups)
    for codes, piece in seen.codes():
        # Document ids are consecutive, so the remainder spreads documents evenly.
        counts.update(codes, piece["owner"][piece["counted"]] % groups)
    return counts


def floats(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """A metric's result as plain numbers."""
    return {name: value.item() for name, value in figures.items()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that measured."""
    packages = ("metasae-lightning", "torch", "lightning", "sae-lens", "transformers", "torchmetrics")
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a bare checkout
            found[name] = "not installed"
    return found
