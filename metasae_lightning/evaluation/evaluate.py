"""Evaluate one SAE, or several on the same held-out tokens: all measures, with intervals over documents and floors by chance."""

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
from metasae_lightning.evaluation.collect import (
    CollectedCodes,
    SplicedLosses,
    SplicedReconstruction,
    collect,
    collect_spliced_losses,
    reconstructions,
)
from metasae_lightning.evaluation.head_figures import head_figures, resampled_head_figures
from metasae_lightning.evaluation.held_out_text import json_values, split_stream, stream_cache_key
from metasae_lightning.evaluation.matched_l0 import at_matched_l0
from metasae_lightning.evaluation.result_cache import Entry
from metasae_lightning.evaluation.saes import EvaluatedSAE, check_same_activations, device_of, select_hook
from metasae_lightning.evaluation.settings import Settings
from metasae_lightning.metrics.cofiring import Phi
from metasae_lightning.metrics.dead_latents import DeadLatents
from metasae_lightning.metrics.decoder import DecoderGeometry
from metasae_lightning.metrics.decomposition import Decomposition, means_and_deviations
from metasae_lightning.metrics.feature_recovery import FeatureRecovery
from metasae_lightning.metrics.loss_recovered import with_recovered_shares

log = logging.getLogger(__name__)

# Groups of documents in the jackknife of co-firing.
GROUPS = 64
# Bins of firing rates: log10 of the share of tokens, a quarter of a decade each.
DENSITIES = torch.arange(-7, 0.01, 0.25, dtype=torch.float64)
# Bins of the cosine between a decoder row and its nearest.
COSINES = torch.linspace(0, 1, 51, dtype=torch.float64)
# Number of partners of each latent: the latents with the largest phi.
PARTNERS = 6
# Bins of log10 |phi|.
CORRELATIONS = torch.arange(-5, 0.01, 0.125, dtype=torch.float64)


@dataclass(frozen=True)
class Evaluation:
    """Results of one SAE."""

    collected: CollectedCodes
    """Its codes on the test text."""
    spliced: SplicedLosses | None
    """Losses of the language model with it spliced in, if measured."""
    entry: dict[str, Any]
    """Its entry in `evaluation.json`."""


def evaluate(subjects: Sequence[EvaluatedSAE], data: Any, settings: Settings) -> list[Evaluation]:
    """Measure SAEs on the test split of a data module. Cached results are reused.

    Without `settings.rule`, several SAEs are measured at one L0 (rule `rate`), and a single SAE with its stored thresholds. The SAEs move
    to the device of the data and keep recalibrated thresholds; the data module changes as in `select_hook`.
    """
    check_same_activations(subjects)
    if settings.by_polarity:
        subjects = [subject.divided_by_polarity() for subject in subjects]
    hook = select_hook(subjects[0], data)
    for subject in subjects:
        subject.sae.to(device_of(data))
    data.setup("test")
    rule = settings.rule or ("rate" if len(subjects) > 1 else "stored")
    if rule != "stored":
        subjects = at_matched_l0(subjects, data, rule, settings.l0, settings.calibration_tokens)
    tokens = settings.tokens or data.test_tokens
    stream = split_stream(data, "test", tokens)
    collected = collect(subjects, stream, tokens)
    losses: Sequence[SplicedLosses | None] = [None] * len(spliced := reconstructions(collected))
    model = getattr(data, "language_model", None)
    if settings.splice_tokens and model is not None:
        losses = collect_spliced_losses(spliced, stream, min(settings.splice_tokens, tokens), model.complete)
    provenance = {
        **{"hook": hook, "data": json_values(stream_cache_key(stream)), "split": "test", "seed": settings.seed, "versions": versions()},
        **{"settings": asdict(settings), "together_with": [subject.source for subject in subjects]},
    }
    evaluations = [
        Evaluation(codes, of_sae, {**measure_all(codes, of_sae, settings, losses_with_head(codes, spliced, losses)), **provenance})
        for codes, of_sae in zip(collected, losses, strict=False)
    ]
    if data.features is not None:
        for evaluation in evaluations:
            evaluation.entry["figures"]["recovery"] = recovery(evaluation.collected, data.features, stream)
    return evaluations


def measure_all(
    collected: CollectedCodes, spliced: SplicedLosses | None, settings: Settings, with_head: SplicedLosses | None = None
) -> dict[str, Any]:
    """The entry of one SAE: all figures except `recovery`, with intervals over documents, and what identifies the SAE."""
    subject = collected.subject
    log.info(f"{subject.name}: co-firing, decoder{', critics' if settings.critic_seeds else ''}")
    documents, sums, _ = collected.by_document
    figures: dict[str, Any] = {"reconstruction": floats(collected.reconstruction.compute()), **latents(collected, settings)}
    figures["decoder"] = decoder(subject)
    if settings.critic_seeds:
        figures["critic"] = critic(subject, settings)
    if spliced is not None:
        figures["splice"] = spliced.figures()
    if subject.head is not None:
        figures["head"] = head_figures(collected, spliced, with_head)
    return {
        **{
            "sae": subject.source,
            "architecture": subject.sae.cfg.architecture(),
            "d_sae": len(subject.decoder_rows),
            **subject.decoder_cache_key,
            **({"by_polarity": True} if subject.by_polarity else {}),
        },
        **{
            "weights": subject.cache_key["sae"],
            "rule": subject.rule or {"rule": "stored"},
            "figures": figures,
            "intervals": intervals(collected, spliced, figures["phi"]["excess"], settings, with_head),
        },
        **{"tokens": int(sums[:, 0].sum()), "documents": len(documents)},
        **({"spliced_tokens": int(spliced.sums[:, 0].sum())} if spliced is not None else {}),
    }


def losses_with_head(
    collected: CollectedCodes, spliced: Sequence[SplicedReconstruction], losses: Sequence[SplicedLosses | None]
) -> SplicedLosses | None:
    """The losses with an SAE's reconstruction together with its head; None where there is no head or no loss was measured."""
    found = (each for (codes, entry), each in zip(spliced, losses, strict=True) if codes is collected and entry != "splice")
    return next(found, None)


def latents(collected: CollectedCodes, settings: Settings) -> dict[str, Any]:
    """Firing rates and co-firing of latents."""
    dead = DeadLatents(len(collected.subject.W_dec)).to(collected.device)
    for codes, _ in collected.codes(collected.device):
        dead.update(codes)
    density = dead.density().cpu()
    fired = density[density > 0].log10()
    counts = torch.histogram(fired.clamp(float(DENSITIES[0]), 0), DENSITIES).hist.int().tolist()
    figures = dict(phi_of_pairs(collected, settings.pairs_gib))
    pairs = figures.pop("log10_abs").long().tolist()
    return {
        "latents": {**floats(dead.compute()), "log10_density": {"edges": DENSITIES.tolist(), "latents": counts}},
        "phi": {
            **{name: value.item() for name, value in figures.items() if not value.ndim},
            "log10_abs": {"edges": CORRELATIONS.tolist(), "pairs": pairs},
        },
    }


def phi_of_pairs(collected: CollectedCodes, memory_gib: float) -> Entry:
    """Cached entry of the co-firing of all pairs: the figures of `Phi`, the histogram `log10_abs`, and each latent's `partners`."""

    def count() -> Entry:
        phi = Phi(len(collected.subject.W_dec), memory_gib=memory_gib)
        for codes, _ in collected.codes(collected.device):
            phi.update(codes)
        log.info(phi.plan())
        counted = phi.count(PARTNERS)
        partners = {"partners": counted.partners, "partner_phi": counted.partner_phi}
        return {**phi.results(counted), "log10_abs": counted.by_decade(CORRELATIONS), **partners}

    key = {**collected.cache_key, "all": collected.text_hashes, "edges": CORRELATIONS.tolist(), "partners": PARTNERS}
    return collected.subject.result_cache.get_or_compute("phi-pairs", key, count)


def recovery(collected: CollectedCodes, features: Tensor, stream: Any) -> dict[str, float]:
    """How well the decoder recovers the directions of known features, and the latents their firings (see `FeatureRecovery`)."""
    metric = FeatureRecovery(features)
    for number, (codes, _) in enumerate(collected.codes()):
        metric.update(collected.subject.W_dec.cpu(), codes, stream.batch(number).features)
    return floats(metric.compute())


def decoder(subject: EvaluatedSAE) -> dict[str, Any]:
    """Cosines of decoder rows with their nearest rows, as mean, maximum and histogram, lengths of rows, and stable ranks of groups."""
    metric = DecoderGeometry(group_size=subject.units.group_size)
    metric.update(subject.decoder_rows)
    rows = torch.histogram(metric.nearest[0].cpu().double().clamp(0, 1), COSINES).hist.int().tolist()
    return {**floats(metric.compute()), "nearest": {"edges": COSINES.tolist(), "rows": rows}}


def critic(subject: EvaluatedSAE, settings: Settings) -> dict[str, float]:
    """Fractions of the variance of the decoder and of its nulls that fresh meta SAEs explain. Each meta SAE has a cache entry."""
    metric = Decomposition(seeds=settings.critic_seeds, steps=settings.critic_steps, cuda_graph=settings.cuda_graph)
    metric.update(subject.decoder_rows)

    def explained(name: str, rows: Tensor, seed: int) -> float:
        # Random rows of one shape are the same for every SAE.
        rows_key = {"shape": list(rows.shape)} if name == "random" else subject.decoder_cache_key
        key = {**rows_key, "rows": name, "seed": seed, **metric.settings}
        entry = subject.result_cache.get_or_compute("critic", key, lambda: {"fve": torch.tensor(metric.variance_explained(rows, seed))})
        return entry["fve"].item()

    explained_by_rows: dict[str, list[float]] = {}
    for name, rows in metric.decoder_and_nulls().items():
        log.info("%s: %d critics on %s", subject.name, settings.critic_seeds, {"fve": "the decoder"}.get(name, f"{name} rows"))
        explained_by_rows[name] = [explained(name, rows, seed) for seed in range(settings.critic_seeds)]
    return floats(means_and_deviations(explained_by_rows))


def intervals(
    collected: CollectedCodes, spliced: SplicedLosses | None, excess: float, settings: Settings, with_head: SplicedLosses | None = None
) -> dict[str, tuple[float, float]]:
    """95 % intervals of an SAE's figures.

    Reconstruction and splice figures: from resampled documents. `phi_excess`: a jackknife over groups of documents around `excess`, the
    figure itself.
    """
    resamples = resampled_reconstruction(collected, settings)
    if spliced is not None:
        resamples |= resampled_losses(spliced, settings)
    if collected.subject.head is not None:
        weights = document_weights(len(collected.by_document[0]), settings)
        losses = None if with_head is None else resampled_losses(with_head, settings)
        resamples |= resampled_head_figures(collected, weights, resamples, losses)
    by_figure = {name: interval(values) for name, values in resamples.items()}
    return {**by_figure, "phi_excess": jackknife_interval(excess, excess_without_each(collected))}


def resampled_reconstruction(collected: CollectedCodes, settings: Settings) -> dict[str, Float[Tensor, " resample"]]:
    """FVU, L0 and cosine on resampled documents; every SAE with the same seed gets the same documents."""
    _, sums, total = collected.by_document
    weights = document_weights(len(sums), settings)
    tokens, squares, error, active, cosine = (weights @ sums).T
    spread = squares - (weights @ total).square().sum(1) / tokens
    return {"fvu": error / spread, "l0": active / tokens, "cosine": cosine / tokens}


def excess_without_each(collected: CollectedCodes) -> Float[Tensor, " group"]:
    """Excess |phi| (the mean |phi| less its floor by chance) with each group of documents left out in turn, for the jackknife."""
    key = {**collected.cache_key, "all": collected.text_hashes, "groups": GROUPS}
    cache = collected.subject.result_cache
    return cache.get_or_compute("phi-groups", key, lambda: {"excess": phi_by_group(collected).without_each()})["excess"]


def document_weights(documents: int, settings: Settings) -> Float[Tensor, "resample document"]:
    """Bootstrap weights of documents; all NaN if there is a single document, because it gives no interval."""
    weights = bootstrap_weights(documents, settings.resamples, settings.seed)
    return weights if documents > 1 else weights * torch.nan


def resampled_losses(spliced: SplicedLosses, settings: Settings) -> dict[str, Float[Tensor, " resample"]]:
    """Mean losses and shares recovered on resampled documents, and `ce_added`: the loss that the SAE adds, `ce_sae - ce_clean`."""
    weights = document_weights(len(spliced.sums), settings)
    count, *total = (weights @ spliced.sums).T
    losses = with_recovered_shares(torch.stack(total) / count)
    return {**losses, "ce_added": losses["ce_sae"] - losses["ce_clean"]}


def phi_by_group(collected: CollectedCodes) -> PhiByGroup:
    """Co-firing of random pairs of latents by groups of documents."""
    ids, _, _ = collected.by_document
    groups = min(GROUPS, len(ids))
    counts = PhiByGroup(len(collected.subject.W_dec), groups, device=collected.device)
    for codes, entry in collected.codes(collected.device):
        # Document ids are consecutive, so the remainder spreads documents evenly.
        counts.update(codes, (entry["owner"][entry["counted"]] % groups).to(collected.device, non_blocking=True))
    return counts


def floats(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """A metric's result as plain numbers."""
    return {name: value.item() for name, value in figures.items()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute the figures; `not installed` for a package without a version."""
    packages = ("metasae-lightning", "torch", "lightning", "sae-lens", "transformers", "torchmetrics")
    by_package = {"python": platform.python_version()}
    for name in packages:
        try:
            by_package[name] = version(name)
        except PackageNotFoundError:  # a bare checkout
            by_package[name] = "not installed"
    return by_package
