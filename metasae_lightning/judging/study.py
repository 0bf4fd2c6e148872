"""A judging run: explain a sample of latents of each arm, score them and their controls, and compare the arms."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from metasae_lightning.evaluation.collect import CollectedCodes
from metasae_lightning.evaluation.evaluate import versions
from metasae_lightning.judging.arms import SampledArm, sampled_arms
from metasae_lightning.judging.entries import ArmScore, differences_of, latents_entry, score_arm, score_entry
from metasae_lightning.judging.explanations import Explainer
from metasae_lightning.judging.judges.chat_server import public_url
from metasae_lightning.judging.judges.judge import Judge
from metasae_lightning.judging.judges.questions import Cost
from metasae_lightning.judging.reliability import PlantedContexts, Reliability, reliability_of
from metasae_lightning.judging.scoring.embedding_scores import Embed
from metasae_lightning.judging.scoring.measures import Measure, measures_for
from metasae_lightning.judging.settings import EXPLANATION_KINDS, JudgingSettings
from metasae_lightning.judging.split_contexts import split_records
from metasae_lightning.judging.texts.flat_text import FlatText

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JudgedArm:
    """The results of one arm."""

    name: str
    """Name of the arm."""
    collected: CollectedCodes
    """The codes of its SAE on the test text."""
    entry: dict[str, Any]
    """Its entry `judging` in `evaluation.json`."""
    record: dict[str, Any]
    """Its latents, and the first arm's latents that it splits, for the page."""


@dataclass(frozen=True)
class JudgingResults:
    """The results of a judging run."""

    arms: Sequence[JudgedArm]
    """Each arm's results."""
    cost: Cost
    """Requests, tokens and time of the answers."""
    embedder_cost: Cost | None = None
    """Passes, tokens and time of the sentence embedder beside the judge; None without one, or if it is the judge."""

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """Each arm's entry, by its name."""
        return {arm.name: arm.entry for arm in self.arms}


def judge_arms(
    collected: Mapping[str, CollectedCodes],
    model: Any,
    judge: Judge,
    embed: Embed | None,
    settings: JudgingSettings,
    *,
    embedder_cost: Cost | None = None,
) -> JudgingResults:
    """Explain and score latents of each arm, and compare each other arm with the first. `model` is the loaded language model.

    The judge's reliability and its threshold for yes are measured first, on latents planted in the same text. Without `embed` there are no
    scores by sentence embeddings. `embedder_cost` is what `embed` adds its passes, tokens and time to, unless it is the judge's own cost.
    """
    first = next(iter(collected.values()))
    text = FlatText.of(first, model.tokenizer)
    # A user's file does not explain the latents of splits, so they are explained by keywords.
    explainer = Explainer(settings.explanations if settings.explanations in EXPLANATION_KINDS else "keywords", judge, text)
    measures = measures_for(settings.scores, judge, embed, model, explained=settings.explanations != "none")
    planted = PlantedContexts.on(first, model.tokenizer, settings)
    numbers = {"resamples": settings.resamples, "seed": settings.seed}
    reliability: dict[str, Reliability | None] = {}
    for measure in measures:
        reliability[measure.name] = found = reliability_of(measure, planted, **numbers)
        if found is not None:
            log.info("%s: %.3f on planted latents, by chance %g", measure.name, found.mean.value, measure.chance)
    arms = sampled_arms(collected, explainer, settings)
    scores = [score_all(measures, arm, reliability, settings.seed) for arm in arms]
    about = {
        **{
            "judge": judge.identity,
            "explanations": settings.explanations if settings.explanations in EXPLANATION_KINDS else "file",
            "settings": public_settings(settings),
            "versions": versions(),
        },
        "tokens": int(text.counted.sum()),
    }
    results: list[JudgedArm] = []
    for arm, of_arm in zip(arms, scores, strict=True):
        entries = {
            measure.name: score_entry(measure, arm, of_arm[measure.name], reliability[measure.name], **numbers) for measure in measures
        }
        entry = {**about, **weights_of(arm.collected), "sampled": len(arm.latents), "left_out": dict(arm.left_out)}
        entry["scores"] = entries
        record = {**weights_of(arm.collected), "latents": latents_entry(arm, of_arm), "splits": list[Any]()}
        if arm is not arms[0]:
            against = {name: differences_of((arms[0], scores[0][name]), (arm, of_arm[name]), **numbers) for name in of_arm}
            entry["against"] = {"arm": arms[0].name, "weights": results[0].entry["weights"], "scores": against}
            record["splits"] = split_records(arms[0], arm, explainer, count=settings.splits, seed=settings.seed)
        results.append(JudgedArm(arm.name, arm.collected, entry, record))
    for result in results:  # explanations of splits cost too
        result.entry.update(cost=asdict(judge.cost), embedder_cost=None if embedder_cost is None else asdict(embedder_cost))
    return JudgingResults(results, judge.cost, embedder_cost)


def public_settings(settings: JudgingSettings) -> dict[str, Any]:
    """The settings as records hold them: the server's address without login and query, which may be secret."""
    return {**asdict(settings), "url": None if settings.url is None else public_url(settings.url)}


def weights_of(collected: CollectedCodes) -> dict[str, str]:
    """Hashes that identify an arm's SAE: of all weights, and of the decoder, which no other thresholds change."""
    return {"weights": collected.subject.cache_key["sae"], **collected.subject.decoder_cache_key}


def score_all(
    measures: Sequence[Measure], arm: SampledArm, reliability: Mapping[str, Reliability | None], seed: int
) -> dict[str, ArmScore]:
    """Every score of one arm, with its controls."""
    scores: dict[str, ArmScore] = {}
    for measure in measures:
        log.info("%s: %s of %d latents", arm.name, measure.name, len(arm.contexts[0]))
        found = reliability[measure.name]
        scores[measure.name] = score_arm(measure, arm, 0.5 if found is None else found.threshold, seed=seed)
    return scores
