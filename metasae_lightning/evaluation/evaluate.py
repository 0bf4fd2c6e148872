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

from metasae_lightning.evaluation.bootstrap import PhiByGroup, draws, interval, jackknifed
from metasae_lightning.evaluation.collect import Observation, Spliced, observe, spliced
from metasae_lightning.evaluation.held_out_text import as_record, held_out, identity
from metasae_lightning.evaluation.matched_l0 import at_matched_l0
from metasae_lightning.evaluation.saes import Subject, check_same_activations, device_of, only_hook
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
    """What was found out about one SAE."""

    seen: Observation
    """What it did."""
    lost: Spliced | None
    """What predictions lost by it."""
    entry: dict[str, Any]
    """Its part of `evaluation.json`."""


def evaluate(subjects: Sequence[Subject], data: Any, settings: Settings) -> list[Evaluation]:
    """Measure SAEs on a data module's test split, at matched L0 where there are several; what was measured before is not measured again."""
    check_same_activations(subjects)
    hook = only_hook(subjects[0], data)
    for subject in subjects:
        subject.sae.to(device_of(data))
    data.setup("test")
    rule = settings.rule or ("rate" if len(subjects) > 1 else "stored")
    if rule != "stored":
        subjects = at_matched_l0(subjects, data, rule, settings.l0, settings.calibration_tokens)
    tokens = settings.tokens or data.test_tokens
    stream = held_out(data, "test", tokens)
    seen = observe(subjects, stream, tokens)
    lost: Sequence[Spliced | None] = [None] * len(seen)
    model = getattr(data, "language_model", None)
    if settings.splice_tokens and model is not None:
        lost = spliced(seen, stream, min(settings.splice_tokens, tokens), model.complete)
    about = {
        **{"hook": hook, "data": as_record(identity(stream)), "split": "test", "seed": settings.seed, "versions": versions()},
        **{"settings": asdict(settings), "together_with": [subject.place for subject in subjects]},
    }
    found = [Evaluation(one, had, {**measured(one, had, settings), **about}) for one, had in zip(seen, lost, strict=True)]
    if data.features is not None:
        for one in found:
            one.entry["figures"]["recovery"] = recovery(one.seen, data.features, stream)
    return found


def measured(seen: Observation, lost: Spliced | None, settings: Settings) -> dict[str, Any]:
    """Every figure of one SAE, and intervals of those that documents move."""
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
        **{"sae": subject.place, "architecture": subject.sae.cfg.architecture(), "d_sae": len(subject.W_dec), **subject.decoder_identity},
        **{
            "weights": subject.identity["sae"],
            "rule": subject.rule or {"rule": "stored"},
            "figures": figures,
            "intervals": intervals(seen, lost, figures["phi"]["excess"], settings),
        },
        **{"tokens": int(sums[:, 0].sum()), "documents": len(documents)},
        **({"spliced_tokens": int(lost.sums[:, 0].sum())} if lost is not None else {}),
    }


def latents(seen: Observation, settings: Settings) -> dict[str, Any]:
    """How often latents fire, and how they fire together."""
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

    found = seen.subject.ledger.piece("phi-pairs", {**seen.identity, "all": seen.digests, "edges": CORRELATIONS.tolist()}, pairs)
    histogram = {"edges": CORRELATIONS.tolist(), "pairs": found.pop("log10_abs").long().tolist()}
    return {
        "latents": {**floats(dead.compute()), "log10_density": {"edges": DENSITIES.tolist(), "latents": counts}},
        "phi": {**floats(found), "log10_abs": histogram},
    }


def recovery(seen: Observation, features: Tensor, stream: Any) -> dict[str, float]:
    """How well planted features are found."""
    metric = FeatureRecovery(features)
    for number, (codes, _) in enumerate(seen.codes()):
        metric.update(seen.subject.W_dec.cpu(), codes, stream.batch(number).features)
    return floats(metric.compute())


def decoder(subject: Subject) -> dict[str, Any]:
    """How decoder rows lie to each other."""
    metric = DecoderGeometry()
    metric.update(subject.W_dec.cpu())
    rows = torch.histogram(metric.nearest[0].double().clamp(0, 1), COSINES).hist.int().tolist()
    return {**floats(metric.compute()), "nearest": {"edges": COSINES.tolist(), "rows": rows}}


def critic(subject: Subject, settings: Settings) -> dict[str, float]:
    """What fresh critics explain of the decoder and of its nulls, a critic at a time."""
    metric = Decomposition(seeds=settings.critic_seeds, steps=settings.critic_steps)
    metric.update(subject.W_dec)

    def explained(name: str, rows: Tensor, seed: int) -> float:
        # Random rows of a shape are the same for every SAE.
        of = {"shape": list(rows.shape)} if name == "random" else subject.decoder_identity
        identity = {**of, "rows": name, "seed": seed, **metric.settings}
        piece = subject.ledger.piece("critic", identity, lambda: {"fve": torch.tensor(metric.explained(rows, seed))})
        return piece["fve"].item()

    found: dict[str, list[float]] = {}
    for name, rows in metric.judged().items():
        log.info("%s: %d critics on %s", subject.name, settings.critic_seeds, {"fve": "the decoder"}.get(name, f"{name} rows"))
        found[name] = [explained(name, rows, seed) for seed in range(settings.critic_seeds)]
    return floats(spread(found))


def intervals(seen: Observation, lost: Spliced | None, excess: float, settings: Settings) -> dict[str, tuple[float, float]]:
    """95 % of what figures are when documents are drawn again."""
    found = {name: interval(values) for name, values in resampled(seen, settings).items()}
    if lost is not None:
        found |= {name: interval(values) for name, values in resampled_losses(lost, settings).items()}
    return {**found, "phi_excess": jackknifed(excess, excess_without_each(seen))}


def resampled(seen: Observation, settings: Settings) -> dict[str, Float[Tensor, " resample"]]:
    """Figures of reconstruction with documents drawn again; with the same seed, the same documents for every SAE."""
    _, sums, total = seen.by_document
    weights = drawn(len(sums), settings)
    tokens, squares, error, active, cosine = (weights @ sums).T
    spread = squares - (weights @ total).square().sum(1) / tokens
    return {"fvu": error / spread, "l0": active / tokens, "cosine": cosine / tokens}


def excess_without_each(seen: Observation) -> Float[Tensor, " group"]:
    """What the excess of |phi| is without each group of documents."""
    of = {**seen.identity, "all": seen.digests, "groups": GROUPS}
    return seen.subject.ledger.piece("phi-groups", of, lambda: {"excess": phi_by_group(seen).without_each()})["excess"]


def drawn(documents: int, settings: Settings) -> Float[Tensor, "resample document"]:
    """Documents drawn again; of one alone nothing can be said."""
    weights = draws(documents, settings.resamples, settings.seed)
    return weights if documents > 1 else weights * torch.nan


def resampled_losses(lost: Spliced, settings: Settings) -> dict[str, Float[Tensor, " resample"]]:
    """Losses with documents drawn again."""
    weights = drawn(len(lost.sums), settings)
    count, *total = (weights @ lost.sums).T
    found = recovered(torch.stack(total) / count)
    return {**found, "ce_added": found["ce_sae"] - found["ce_clean"]}


def phi_by_group(seen: Observation) -> PhiByGroup:
    """Co-firing of random pairs in groups of documents."""
    ids, _, _ = seen.by_document
    groups = min(GROUPS, len(ids))
    counts = PhiByGroup(len(seen.subject.W_dec), groups)
    for codes, piece in seen.codes():
        # Documents follow on each other: in turn is as good as at random.
        counts.update(codes, piece["owner"][piece["counted"]] % groups)
    return counts


def floats(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """A metric's answer as plain numbers."""
    return {name: value.item() for name, value in figures.items()}


def versions() -> dict[str, str]:
    """What it was measured with."""
    packages = ("metasae-lightning", "torch", "lightning", "sae-lens", "transformers", "torchmetrics")
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a bare checkout
            found[name] = "not installed"
    return found
