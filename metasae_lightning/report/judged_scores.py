"""Scores of judged latents, by group of arms: means, controls, and changes against the baseline."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metasae_lightning.report.load_runs import Arm
from metasae_lightning.report.seeds import Estimate, Group, difference, difference_over_pairs

# The order of scores on the page. Scores that are not named here come last.
ORDER = (
    *("detection", "detection_near", "fuzzing", "fuzzing_near", "replacement_2afc", "intruder", "strength_spearman", "simulation"),
    *("topical_coherence", "explanation_nearness", "output"),
)
# The score that the paper's code computes under the name "fuzzing", with the paper's results: solo, joint and change in percent.
PAPER_SCORE = "strength_spearman"
PAPER_RESULT = (0.230, 0.248, 7.6)
PAPER_NOTE = (
    'The paper reports "fuzzing" of 0.230 for solo and 0.248 for joint on GPT-2 large, one seed each, and +8.6 % on Gemma 2 9B. '
    "Its text defines fuzzing by replaced tokens (replacement 2afc). Its code computes the rank correlation of predicted and true "
    "strengths in firing contexts alone (strength spearman), so that is the row to compare. The paper's judge has 72 billion parameters."
)


@dataclass(frozen=True)
class GroupScore:
    """One score of one group of arms. Scores and shares are means over the judged arms of the group."""

    value: float
    """The mean score."""
    interval: tuple[float, float] | None
    """The 95 % interval over latents; None for several arms, or if the record has none."""
    deviation: float
    """Standard deviation over training seeds; NaN for a single arm."""
    arms: int
    """Number of arms that have the score."""
    not_above_controls: int
    """Number of arms whose score does not beat its controls."""
    controls: dict[str, float]
    """The mean of each control."""
    graded: float
    """The AUC of the judge's probabilities, which needs no threshold; NaN if there is none."""
    unreadable: float
    """Share of unreadable answers."""
    reliability: float
    """The score on planted latents, whose meaning is known; NaN if it was not measured."""
    reliability_by_kind: dict[str, float]
    """The score on each kind of planted latent."""
    change: Estimate | None
    """The difference from the baseline; None for the baseline, and for arms that cannot be compared."""
    sign_p: float
    """p value of the sign test over pairs of latents; NaN for several training seeds, or without pairs."""


def judged_groups_of(groups: Sequence[Group]) -> list[Group]:
    """The groups that have a judged arm."""
    return [group for group in groups if any(arm.judging for arm in group.arms)]


def score_names(groups: Sequence[Group]) -> list[str]:
    """Names of the scores that some arm has, in the order of the page."""
    found = {name: None for arm in judged_arms(groups) for name in scores_of(arm)}
    return [*(name for name in ORDER if name in found), *(name for name in found if name not in ORDER)]


def judged_arms(groups: Sequence[Group]) -> list[Arm]:
    """The judged arms of some groups."""
    return [arm for group in groups for arm in group.arms if arm.judging]


def scores_of(arm: Arm) -> dict[str, Any]:
    """The entry of each score of an arm; empty if it was not judged."""
    return (arm.judging or {}).get("scores") or {}


def chance(groups: Sequence[Group], name: str) -> float:
    """The value of a score by chance; NaN if the records have none."""
    return next((number(scores_of(arm)[name].get("chance")) for arm in judged_arms(groups) if name in scores_of(arm)), math.nan)


def description(groups: Sequence[Group], name: str) -> str:
    """The description of a score in one line; empty if the records have none."""
    return next((str(scores_of(arm)[name].get("about") or "") for arm in judged_arms(groups) if name in scores_of(arm)), "")


def label(name: str) -> str:
    """The name of a score as words.

    >>> label("strength_spearman")
    'strength spearman'
    """
    return name.replace("_", " ")


def group_score(group: Group, base: Group | None, name: str) -> GroupScore | None:
    """A score of a group, with its change against `base`; None if no arm of the group has it."""
    entries = [scores_of(arm)[name] for arm in group.arms if arm.figure(f"judging/{name}") is not None]
    if not entries:
        return None
    values = group.values(f"judging/{name}")
    value = mean(values)
    ends = [number(entries[0]["mean"].get(end)) for end in ("low", "high")]
    change = pairs = None
    if base is not None and group is not base and not reasons_not_comparable([*base.arms, *group.arms]):
        change, pairs = difference(group, base, f"judging/{name}"), difference_over_pairs(group, base, f"judging/{name}")
    reliabilities = [entry["reliability"] for entry in entries if entry.get("reliability")]
    return GroupScore(
        value,
        interval=(ends[0], ends[1]) if len(values) == 1 and not any(map(math.isnan, ends)) else None,
        deviation=math.sqrt(sum((x - value) ** 2 for x in values) / (len(values) - 1)) if len(values) > 1 else math.nan,
        arms=len(values),
        not_above_controls=sum(entry.get("beats_controls") is False for entry in entries),
        controls=means_by_name(
            [{name: number_at(control, "mean", "value") for name, control in (e.get("controls") or {}).items()} for e in entries]
        ),
        graded=mean([number_at(entry, "graded", "value") for entry in entries]),
        unreadable=mean([number(entry.get("unreadable") or 0.0) for entry in entries]),
        reliability=mean([number_at(entry, "mean", "value") for entry in reliabilities]),
        reliability_by_kind=means_by_name([entry.get("by_kind") or {} for entry in reliabilities]),
        change=change,
        sign_p=number(pairs.get("sign_p")) if pairs and change and change.seeds == 1 else math.nan,
    )


# Settings of the server and of the page that no score depends on.
NOT_OF_SCORES = {"url", "key_variable", "concurrency", "max_requests", "max_tokens", "timeout", "retries", "splits"}


def reasons_not_comparable(arms: Sequence[Arm]) -> list[str]:
    """Reasons why the scores of these arms cannot be compared; empty if they can."""
    entries = [{**arm.judging, "settings": settings_of_scores(arm.judging)} for arm in arms if arm.judging]
    conditions = {
        "not by the same judge": "judge",
        "not with the same explanations": "explanations",
        "not with the same settings": "settings",
    }
    return [
        reason
        for reason, key in conditions.items()
        if len({json.dumps(entry.get(key), sort_keys=True, default=str) for entry in entries}) > 1
    ]


def settings_of_scores(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that scores depend on."""
    return {name: value for name, value in (entry.get("settings") or {}).items() if name not in NOT_OF_SCORES}


def judging_notes(groups: Sequence[Group]) -> list[str]:
    """Sentences on how latents were judged: judge, explanations, number of latents, those left out, cost."""
    arms = judged_arms(groups)
    sentences = list(dict.fromkeys(judge_sentence(arm.judging or {}) for arm in arms))
    if reasons := reasons_not_comparable(arms):
        sentences.append(f"Some arms cannot be compared: they were judged {' and '.join(reasons)}.")
    left_out = totals([(arm.judging or {}).get("left_out") or {} for arm in arms])
    if left_out:
        sentences.append(f"Latents left out of all arms: {', '.join(f'{count:,.0f} ({reason})' for reason, count in left_out.items())}.")
    if phrase := cost_phrase(total_cost(arms, "cost")):
        sentences.append(f"Cost: {phrase}.")
    if phrase := cost_phrase(total_cost(arms, "embedder_cost")):
        sentences.append(f"Cost of the sentence embedder beside the judge: {phrase}.")
    return sentences


def total_cost(arms: Sequence[Arm], name: str) -> dict[str, float]:
    """The sum of an entry of costs over arms. The arms that were judged together have a common one, which counts once."""
    costs = {json.dumps(cost, sort_keys=True): cost for arm in arms if (cost := (arm.judging or {}).get(name))}
    return totals(list(costs.values()))


def totals(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The sum of each named number over entries, without those that are 0."""
    names = dict.fromkeys(name for entry in entries for name in entry)
    sums = {name: sum(value for entry in entries if math.isfinite(value := number(entry.get(name)))) for name in names}
    return {name: value for name, value in sums.items() if value}


def judge_sentence(entry: Mapping[str, Any]) -> str:
    """A sentence that names an arm's judge, explanations, number of latents and number of tokens."""
    judge = entry.get("judge") or {}
    ways = {"none": "without explanations", "keywords": "with keywords as explanations", "judge": "with explanations of its own"}
    explanations = ways.get(str(entry.get("explanations")), "with explanations from a file")
    model = f" {judge['model']}" if judge.get("model") else ""
    return (
        f"The judge: {judge.get('judge', 'unknown')}{model}, {explanations}; "
        f"{entry.get('sampled', 0):,} latents of an arm, contexts from {entry.get('tokens', 0):,} held-out tokens."
    )


def cost_phrase(cost: Mapping[str, float]) -> str:
    """Cost in words.

    >>> cost_phrase({"requests": 1200, "tokens": 90000, "seconds": 61.2, "reused": 0})
    '1,200 requests or passes, 90,000 tokens, 61 seconds'
    """
    words = {"requests": "requests or passes", "tokens": "tokens", "seconds": "seconds", "reused": "answers reused"}
    return ", ".join(f"{cost[name]:,.0f} {unit}" for name, unit in words.items() if cost.get(name))


def number(value: Any) -> float:
    """A value of a record as a number; NaN if it is no number."""
    return float(value) if isinstance(value, int | float) else math.nan


def number_at(entry: Mapping[str, Any], *path: str) -> float:
    """The number at a path of keys; NaN if there is none."""
    for key in path[:-1]:
        entry = entry.get(key) or {}
    return number(entry.get(path[-1]))


def mean(values: Sequence[float]) -> float:
    """The mean of the finite values; NaN without any."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def means_by_name(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each named number over entries."""
    names = dict.fromkeys(name for entry in entries for name in entry)
    return {name: mean([number(entry.get(name)) for entry in entries]) for name in names}


def score_rows(arm: Arm) -> dict[str, float | bool]:
    """The arm's scores as columns of `table.csv`: the mean in `judging/NAME`, its interval, controls and others in `judging/NAME/...`."""
    row: dict[str, float | bool] = {}
    for name, entry in scores_of(arm).items():
        paths = {"": ("mean", "value"), "/low": ("mean", "low"), "/high": ("mean", "high"), "/latents": ("mean", "latents")}
        paths |= {"/seed_deviation": ("mean", "seed_deviation"), "/graded": ("graded", "value"), "/chance": ("chance",)}
        paths |= {"/unreadable": ("unreadable",), "/reliability": ("reliability", "mean", "value")}
        paths |= {f"/{control}": ("controls", control, "mean", "value") for control in entry.get("controls") or {}}
        row |= {f"judging/{name}{end}": value for end, path in paths.items() if math.isfinite(value := number_at(entry, *path))}
        if isinstance(entry.get("beats_controls"), bool):
            row[f"judging/{name}/beats_controls"] = entry["beats_controls"]
    return row


def control_verdict(score: GroupScore) -> str:
    """The words "does not beat its controls", if that is so; empty if the score does, or was not compared."""
    if not score.not_above_controls:
        return ""
    return "does not beat its controls" + (f" in {score.not_above_controls} of {score.arms} seeds" if score.arms > 1 else "")
