"""The sampled latents of each arm, with their contexts and explanations."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.collect import CollectedCodes
from metasae_lightning.judging.explanations import Explainer, check_latents, read_explanations
from metasae_lightning.judging.scoring.latent_scores import ScoringInputs
from metasae_lightning.judging.settings import EXPLANATION_KINDS, JudgingSettings
from metasae_lightning.judging.texts.contexts import LatentContexts
from metasae_lightning.judging.texts.draw import draw_contexts
from metasae_lightning.judging.texts.flat_text import FlatText, document_counts
from metasae_lightning.judging.texts.sample import SampledLatents, sample_arms
from metasae_lightning.judging.texts.windows import ContextSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampledArm:
    """The sampled latents of one arm, with their contexts and explanations."""

    name: str
    """Name of the arm."""
    collected: CollectedCodes
    """The codes of its SAE on the test text."""
    latents: Sequence[int]
    """The arm's own sample, drawn evenly over firing rates; or the latents that the user's file explains."""
    partners: Mapping[int, int]
    """The partner in this arm of each latent in the first arm's sample; latents without a partner are absent."""
    cosines: Mapping[int, float]
    """Cosine of the decoder rows of each pair, by the first arm's latent."""
    contexts: Sequence[Mapping[int, LatentContexts]]
    """Contexts of the sample and of the partners by latent, one mapping for each draw."""
    explanations: Mapping[int, str] = field(default_factory=dict)
    """Explanations by latent."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of latents that cannot be judged, by reason."""

    @property
    def inputs(self) -> list[ScoringInputs]:
        """The inputs for the scores of its latents, one for each draw of contexts."""
        return [ScoringInputs(drawn, self.explanations, self.collected) for drawn in self.contexts]


def sampled_arms(collected: Mapping[str, CollectedCodes], explainer: Explainer, settings: JudgingSettings) -> list[SampledArm]:
    """The arms with their latents, contexts and explanations. An arm without a latent that can be judged is an `InputError`.

    Latents that fire in too few documents, for explanations or for scores, are not sampled. If the user gives a file of explanations, its
    latents are taken instead of a sample, and no latents are paired.
    """
    text, given = explainer.text, None
    if settings.explanations not in EXPLANATION_KINDS:
        given = read_explanations(Path(settings.explanations))
    densities, live, few = dict[str, torch.Tensor](), dict[str, torch.Tensor](), dict[str, int]()
    fewest = ContextSettings().fewest
    for name, codes in collected.items():
        density, explaining, scoring = document_counts(codes, text, settings.seed)
        enough = (explaining >= min(fewest, settings.explaining)) & (scoring >= min(fewest, settings.scoring))
        densities[name], live[name], few[name] = torch.where(enough, density, 0), density > 0, int(((density > 0) & ~enough).sum())
    if given is None:
        decoders = {name: codes.subject.W_dec.cpu() for name, codes in collected.items()}
        sampled = sample_arms(decoders, densities, settings.latents, seed=settings.seed, threshold=settings.pair_cosine)
    else:
        sampled = {name: SampledLatents(list(explained_latents(given, name, collected, live[name]))) for name in collected}
    arms: list[SampledArm] = []
    for name, codes in collected.items():
        log.info("%s: contexts and explanations of %d latents", name, len(sampled[name].latents))
        arm = draw_arm(name, codes, sampled[name], text, settings)
        if not arm.latents:
            raise InputError(f"{name}: no latent fires in enough documents of the text to be judged; read more with --tokens")
        explanations = explanations_of_drawn(given, name, arm) if given is not None else explainer.explanations(arm.contexts[0])
        too_few = {"fires in too few documents": few[name]} if few[name] and given is None else {}
        arms.append(replace(arm, explanations=explanations, left_out={**arm.left_out, **too_few}))
    return arms


def draw_arm(name: str, codes: CollectedCodes, sampled: SampledLatents, text: FlatText, settings: JudgingSettings) -> SampledArm:
    """An arm with the contexts of its latents. A latent that has too few contexts in some draw is left out."""
    drawn: list[dict[int, LatentContexts]] = []
    left_out: dict[int, str] = {}
    for draw in range(settings.seeds):
        found = draw_contexts(codes, sampled.latents, text=text, W_dec=codes.subject.W_dec.cpu(), settings=context_settings(settings, draw))
        drawn.append({contexts.latent: contexts for contexts in found.latents})
        left_out |= found.left_out
    usable = set.intersection(*(set(contexts) for contexts in drawn))
    contexts = [{latent: contexts[latent] for latent in sampled.latents if latent in usable} for contexts in drawn]
    reasons = list(left_out.values())
    return SampledArm(
        name,
        codes,
        [latent for latent in sampled.own_sample if latent in usable],
        {first: partner for first, partner in sampled.partners.items() if partner in usable},
        sampled.cosines,
        contexts,
        left_out={reason: reasons.count(reason) for reason in dict.fromkeys(reasons)},
    )


def context_settings(settings: JudgingSettings, draw: int) -> ContextSettings:
    """The settings of one draw of contexts. Every draw has the same split of documents into those for explanations and those for scores."""
    return ContextSettings(
        **{"explaining": settings.explaining, "scoring": settings.scoring, "silent": settings.scoring},
        **{"near": max(1, settings.scoring // 2), "seed": settings.seed, "draw": draw},
    )


def explained_latents(given: Mapping[str, Mapping[int, str]], name: str, arms: Mapping[str, Any], live: torch.Tensor) -> list[int]:
    """The live latents of an arm that a user's file explains; a file that names no arm is for a run of one arm."""
    own = explanations_of_arm(given, name, arms)
    check_latents(own, len(live), live.tolist())
    return sorted(latent for latent in own if live[latent])


def explanations_of_arm(given: Mapping[str, Mapping[int, str]], name: str, arms: Mapping[str, Any]) -> Mapping[int, str]:
    """The user's explanations of one arm; an `InputError` if there are none."""
    if name not in given and ("" not in given or len(arms) > 1):
        raise InputError(f"explanations: the file explains no latent of {name}; it names {', '.join(filter(None, given)) or 'no arm'}")
    return given.get(name) or given[""]


def explanations_of_drawn(given: Mapping[str, Mapping[int, str]], name: str, arm: SampledArm) -> dict[int, str]:
    """The user's explanations of those latents of an arm that have contexts."""
    own = given.get(name) or given[""]
    return {latent: own[latent] for latent in arm.contexts[0] if latent in own}
