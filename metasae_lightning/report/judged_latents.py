"""The explanation, the scores and the judge's words of each latent, for the page's list."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metasae_lightning.report.judged_scores import ORDER, chance, label, number
from metasae_lightning.report.load_runs import Arm
from metasae_lightning.report.seeds import Group, is_arm_of

# Characters of an explanation and of an answer, and answers of a score, at most: a judge's texts may be long and many.
MAX_EXPLANATION, MAX_ANSWER, MAX_ANSWERS = 600, 300, 4


@dataclass(frozen=True)
class JudgedLatent:
    """The explanation, the scores and the judge's words of one latent."""

    explanation: str
    """Its explanation; empty if it has none."""
    scores: list[float | None]
    """Its scores, in the order of `names_of_scores`; None for a score that it lacks."""
    pair: list[float]
    """Its partner in the first judged arm and the cosine of the decoder rows; empty without a partner."""
    words: list[list[str]]
    """What the judge wrote, for each score."""

    @property
    def index_columns(self) -> list[Any]:
        """Its columns in the page's list of latents."""
        return [self.explanation, self.scores, self.pair]


def names_of_scores(arm: Arm) -> list[str]:
    """Names of the scores that some latent of the arm has, in the order of the page."""
    latents = ((arm.judged or {}).get("latents") or {}).values()
    found = {name: None for latent in latents for name, value in (latent.get("scores") or {}).items() if value is not None}
    return [*(name for name in ORDER if name in found), *(name for name in found if name not in ORDER)]


def judged_latents(arm: Arm) -> dict[int, JudgedLatent]:
    """The judged latents of an arm, by number."""
    names = names_of_scores(arm)
    return {int(number): judged_latent(latent, names) for number, latent in ((arm.judged or {}).get("latents") or {}).items()}


def judged_latent(latent: Mapping[str, Any], names: Sequence[str]) -> JudgedLatent:
    """One latent of `judged.json.gz`, with long texts cut."""
    scores, words, pair = latent.get("scores") or {}, latent.get("words") or {}, latent.get("pair")
    values = [number(scores.get(name)) for name in names]
    return JudgedLatent(
        cut(str(latent.get("explanation") or ""), MAX_EXPLANATION),
        [round(value, 3) if math.isfinite(value) else None for value in values],
        [pair["latent"], round(number(pair.get("cosine")), 3)] if pair else [],
        [[cut(str(answer), MAX_ANSWER) for answer in (words.get(name) or [])[:MAX_ANSWERS] if answer] for name in names],
    )


def cut(text: str, length: int) -> str:
    """A text of at most `length` characters.

    >>> cut("abcdef", 4), cut("abcd", 4)
    ('abc…', 'abcd')
    """
    return text if len(text) <= length else f"{text[: length - 1]}…"


def judged_entry(arm: Arm, arms: Sequence[Arm]) -> dict[str, Any]:
    """The arm's judged scores for `page.js`: name and chance of each, and the index in `arms` of the arm with the partners; or empty."""
    if not (names := names_of_scores(arm)) and not (arm.judged or {}).get("latents"):
        return {}
    chances = [chance([Group(arm.name, [arm])], name) for name in names]
    scores = [[label(name), value if math.isfinite(value) else None] for name, value in zip(names, chances, strict=True)]
    against = (arm.judging or {}).get("against") or {}
    first = next((index for index, other in enumerate(arms) if other is not arm and is_arm_of(against, other)), None) if against else None
    return {"judged": {"scores": scores, "first": first}}
