"""How reliable a judge is: its scores of planted latents, whose meaning is known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from metasae_lightning.judging.arms import context_settings
from metasae_lightning.judging.scoring.latent_scores import LatentScores, ScoringInputs, score_table
from metasae_lightning.judging.scoring.measures import Measure
from metasae_lightning.judging.scoring.statistics import Mean, best_threshold, mean_over_latents
from metasae_lightning.judging.settings import JudgingSettings
from metasae_lightning.judging.texts.draw import draw_contexts
from metasae_lightning.judging.texts.flat_text import Collected
from metasae_lightning.judging.texts.planted import PlantSettings, plant


@dataclass(frozen=True)
class Reliability:
    """A judge's results in one score on planted latents, whose meaning is known."""

    mean: Mean
    """The mean score. The threshold for yes is set on other planted latents than those that are scored."""
    graded: Mean | None
    """The mean AUC of the judge's probabilities; None if it gives none."""
    threshold: float
    """The smallest probability of yes that counts as yes: the best on all planted latents, in the first draw of contexts."""
    by_kind: Mapping[str, float]
    """Mean score of the planted latents of each kind."""


@dataclass(frozen=True)
class PlantedContexts:
    """Planted latents with their contexts and true explanations."""

    inputs: Sequence[ScoringInputs]
    """The inputs for their scores, one for each draw of contexts."""
    kinds: Mapping[int, str]
    """The kind of each latent: `word`, `suffix` or `topic`."""

    @classmethod
    def on(cls, collected: Collected, tokenizer: Any, settings: JudgingSettings) -> "PlantedContexts":
        """Latents planted in the text that codes were collected on. No mixtures: no explanation says what they fire on."""
        planted = plant(collected, tokenizer, PlantSettings(mixtures=0, seed=settings.seed))
        kinds = planted.truth.kinds
        inputs: list[ScoringInputs] = []
        for draw in range(settings.seeds):
            chosen = context_settings(settings, draw)
            found = draw_contexts(planted, list(kinds), text=planted.text, W_dec=planted.W_dec, settings=chosen).latents if kinds else []
            inputs.append(ScoringInputs({contexts.latent: contexts for contexts in found}, planted.truth.explanations))
        return cls(inputs, kinds)


def reliability_of(measure: Measure, planted: PlantedContexts, *, resamples: int, seed: int) -> Reliability | None:
    """A judge's reliability in one score; None if planted latents cannot have the score, or if fewer than two have contexts.

    The threshold of yes-or-no questions is set on one half of the planted latents, every second one, and the other half is scored with it.
    Then the halves change places.
    """
    latents = [latent for latent in planted.kinds if all(latent in inputs.contexts for inputs in planted.inputs)]
    if not measure.works_on_planted or len(latents) < 2:
        return None
    raw = [measure.scores(inputs, seed + draw, 0.5) for draw, inputs in enumerate(planted.inputs)]
    by_seed: list[dict[int, float]] = [dict(of_seed.values) for of_seed in raw]
    if any(of_seed.probabilities for of_seed in raw):
        for half in (0, 1):
            learned, scored = latents[1 - half :: 2], latents[half::2]
            for draw, inputs in enumerate(planted.inputs):
                cut = threshold_of(measure.scores(restricted(inputs, learned), seed + draw, 0.5))
                by_seed[draw] |= measure.scores(restricted(inputs, scored), seed + draw, cut).values
    values = score_table(by_seed, latents)
    graded = mean_over_latents(score_table([of_seed.graded for of_seed in raw], latents), resamples=resamples, seed=seed)
    kinds = [planted.kinds[latent] for latent in latents]
    by_kind = {kind: [column for column, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)}
    return Reliability(
        mean_over_latents(values, resamples=resamples, seed=seed),
        graded if graded.latents else None,
        threshold_of(raw[0]),
        {kind: mean_over_latents(values[:, columns], resamples=1).value for kind, columns in by_kind.items()},
    )


def threshold_of(scores: LatentScores) -> float:
    """The best threshold for the probabilities of yes in the answers; 0.5 without probabilities."""
    if not scores.probabilities:
        return 0.5
    probabilities, truths = zip(*scores.probabilities, strict=True)
    return best_threshold(Tensor(probabilities), Tensor(truths).long())


def restricted(inputs: ScoringInputs, latents: Sequence[int]) -> ScoringInputs:
    """The scoring inputs of some of the latents."""
    return replace(inputs, contexts={latent: inputs.contexts[latent] for latent in latents})
