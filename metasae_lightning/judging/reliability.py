"""How reliable a judge is: its scores of planted latents, whose meaning is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from metasae_lightning.judging.arms import context_settings
from metasae_lightning.judging.scoring.measured import LatentScores, Material, table
from metasae_lightning.judging.scoring.measures import Measure
from metasae_lightning.judging.scoring.statistics import Mean, best_threshold, mean_over_latents
from metasae_lightning.judging.settings import JudgingSettings
from metasae_lightning.judging.texts.draw import draw_contexts
from metasae_lightning.judging.texts.flat_text import Collected
from metasae_lightning.judging.texts.planted import PlantSettings, plant


@dataclass(frozen=True)
class Reliability:
    """How well a judge does on planted latents, whose meaning is known."""

    mean: Mean
    """Its mean score, at a threshold set on other planted latents."""
    graded: Mean | None
    """The mean AUC of its probabilities; None if it gives none."""
    threshold: float
    """The smallest probability of yes that counts as yes: the best one on all planted latents."""
    by_kind: Mapping[str, float]
    """Mean score by the kind of planted latent."""


@dataclass(frozen=True)
class Planted:
    """Planted latents with their contexts and true explanations."""

    material: Sequence[Material]
    """What they are scored by, one for each draw of contexts."""
    kinds: Mapping[int, str]
    """The kind of each: `word`, `suffix`, `topic` or `mixture`."""

    @classmethod
    def on(cls, collected: Collected, tokenizer: Any, settings: JudgingSettings) -> "Planted":
        """Latents planted in the text that codes were collected on. Mixtures are left out: no explanation says what they fire on."""
        planted = plant(collected, tokenizer, PlantSettings(mixtures=0, seed=settings.seed))
        kinds = planted.truth.kinds
        material: list[Material] = []
        for draw in range(settings.seeds):
            chosen = context_settings(settings, draw)
            found = draw_contexts(planted, list(kinds), text=planted.text, W_dec=planted.W_dec, settings=chosen).latents if kinds else []
            material.append(Material({contexts.latent: contexts for contexts in found}, planted.truth.explanations))
        return cls(material, kinds)


def reliability_of(measure: Measure, planted: Planted, *, resamples: int, seed: int) -> Reliability | None:
    """A judge's reliability in one score; None if planted latents say nothing about it, or the text has too few.

    The threshold of a question of yes and no is set on every second planted latent, and the others are scored by it, and the other way
    round.
    """
    latents = [latent for latent in planted.kinds if all(latent in material.contexts for material in planted.material)]
    if not measure.can_be_planted or len(latents) < 2:
        return None
    raw = [measure.scores(material, seed + draw, 0.5) for draw, material in enumerate(planted.material)]
    by_seed: list[dict[int, float]] = [dict(of_seed.values) for of_seed in raw]
    if any(of_seed.probabilities for of_seed in raw):
        for half in (0, 1):
            learned, scored = latents[1 - half :: 2], latents[half::2]
            for draw, material in enumerate(planted.material):
                cut = threshold_of(measure.scores(restricted(material, learned), seed + draw, 0.5))
                by_seed[draw] |= measure.scores(restricted(material, scored), seed + draw, cut).values
    values = table(by_seed, latents)
    graded = mean_over_latents(table([of_seed.graded for of_seed in raw], latents), resamples=resamples, seed=seed)
    kinds = [planted.kinds[latent] for latent in latents]
    by_kind = {kind: [column for column, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)}
    return Reliability(
        mean_over_latents(values, resamples=resamples, seed=seed),
        graded if graded.latents else None,
        threshold_of(raw[0]),
        {kind: mean_over_latents(values[:, columns], resamples=1).value for kind, columns in by_kind.items()},
    )


def threshold_of(scores: LatentScores) -> float:
    """The best threshold for the probabilities of yes in some answers; 0.5 without probabilities."""
    if not scores.probabilities:
        return 0.5
    probabilities, truths = zip(*scores.probabilities, strict=True)
    return best_threshold(Tensor(probabilities), Tensor(truths).long())


def restricted(material: Material, latents: Sequence[int]) -> Material:
    """The material of some latents."""
    return replace(material, contexts={latent: material.contexts[latent] for latent in latents})
