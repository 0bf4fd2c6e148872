"""Arms grouped by recipe, so that a group is one recipe with several seeds, and differences between groups with their intervals."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metasae_lightning.report.load_runs import Arm

CONFIDENCE = 0.95
# SAEs are compared only if the largest L0 is at most this many times the smallest.
L0_TOLERANCE = 1.05


@dataclass(frozen=True)
class Group:
    """The arms of one recipe, one for each seed."""

    name: str
    """Name on the page."""
    arms: list[Arm]
    """The arms."""

    @property
    def first(self) -> Arm:
        """The first arm, whose recipe stands for the group."""
        return self.arms[0]

    @property
    def has_no_penalty(self) -> bool:
        """Whether the recipe has no penalties, or all of them have weight 0."""
        return not self.first.penalties

    @property
    def decomposability(self) -> tuple[float, float] | None:
        """Weight and sigma squared of the decomposability penalty, or None if it is not the only penalty."""
        penalties = list(self.first.penalties.values())
        if len(penalties) != 1 or penalties[0]["class"] != "Decomposability":
            return None
        return float(penalties[0].get("weight", 0.3)), float(penalties[0].get("sigma_sq", 1.0))

    def values(self, path: str) -> list[float]:
        """A figure, `GROUP/NAME`, of each arm that has it."""
        return [value for arm in self.arms if (value := arm.figure(path)) is not None]


@dataclass(frozen=True)
class Estimate:
    """A difference from the baseline with its 95 % interval."""

    value: float
    """The difference; a mean over seeds if there are several."""
    low: float
    """Lower end of the interval; NaN if no interval is known."""
    high: float
    """Upper end of the interval; NaN if no interval is known."""
    seeds: int
    """Number of seeds; for unpaired groups, of the smaller group. With one paired seed, the interval is a bootstrap over documents."""
    base: float
    """The baseline's figure."""

    @property
    def percent(self) -> tuple[float, float, float]:
        """Difference, lower end and upper end in percent of the baseline; NaN if the baseline is 0."""
        scale = 100 / abs(self.base) if self.base else math.nan
        return self.value * scale, *sorted((self.low * scale, self.high * scale))  # pyright: ignore[reportReturnType]

    @property
    def sign(self) -> int:
        """1 if the whole interval is above 0, -1 if it is below, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def group_by_recipe(arms: Sequence[Arm]) -> list[Group]:
    """Arms grouped by recipe, in order of their first arm. An arm without a recipe, or with a seed of its group, is a new group."""
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        recipe = {key: value for key, value in arm.recipe.items() if key != "seed"}
        key = json.dumps(recipe, sort_keys=True, default=str) if recipe else arm.name
        members = groups.setdefault(key, [])
        # Two runs of one recipe with the same seed are not two seeds: the second run is a group of its own.
        if arm.seed in [other.seed for other in members]:
            members = groups.setdefault(f"{key} {arm.name}", [])
        members.append(arm)
    return [Group(group_name(members), members) for members in groups.values()]


def group_name(arms: Sequence[Arm]) -> str:
    """The first arm's name, without its seed if the group has several arms."""
    name = arms[0].name
    return (re.sub(r"[-_.]?seed[-_.=]?\d+", "", name).strip("/") or name) if len(arms) > 1 else name


def baseline(groups: Sequence[Group]) -> Group | None:
    """The group that others are compared with: the first without meta SAE and penalty, else without penalty, else the first."""
    no_penalty = [group for group in groups if group.first.recipe and group.has_no_penalty]
    solo = [group for group in no_penalty if not group.first.recipe.get("meta")]
    return next(iter([*solo, *no_penalty, *groups]), None)


def headline(groups: Sequence[Group], base: Group) -> Group | None:
    """The verdict's group: among those other than the baseline, the first with a decomposability penalty, else the first; or None."""
    others = [group for group in groups if group is not base]
    joint = [group for group in others if group.decomposability]
    return next(iter([*joint, *others]), None)


def difference(group: Group, base: Group, path: str, comparison: str = "") -> Estimate | None:
    """A figure of a group minus the baseline's, over the seeds that both have; None if one of them lacks the figure.

    Over several seeds the interval is Student's, of paired differences. With one common seed it is that of the bootstrapped difference
    `comparison` in `evaluation.json`; that of a score, `judging/NAME`, is over pairs of latents. Without a common seed the difference is
    that of the two means, with Welch's interval.
    """
    by_seed = {arm.seed: value for arm in group.arms if (value := arm.figure(path)) is not None}
    base_by_seed = {arm.seed: value for arm in base.arms if (value := arm.figure(path)) is not None}
    shared_seeds = sorted(by_seed.keys() & base_by_seed.keys())
    if len(shared_seeds) > 1:
        mean = sum(base_by_seed[seed] for seed in shared_seeds) / len(shared_seeds)
        return Estimate(*mean_interval([by_seed[seed] - base_by_seed[seed] for seed in shared_seeds]), len(shared_seeds), mean)
    if not by_seed or not base_by_seed:
        return None
    if not shared_seeds:
        return unpaired_difference(list(by_seed.values()), list(base_by_seed.values()))
    (seed,) = shared_seeds
    if (pairs := difference_over_pairs(group, base, path)) is not None:
        low, high = (math.nan if pairs.get(end) is None else float(pairs[end]) for end in ("low", "high"))
        return Estimate(pairs["value"], low, high, 1, base_by_seed[seed])
    low, high = bootstrapped_interval(group, base, seed, comparison) or (math.nan, math.nan)
    return Estimate(by_seed[seed] - base_by_seed[seed], low, high, 1, base_by_seed[seed])


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval.

    >>> [round(x, 3) for x in mean_interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    mean = sum(values) / len(values)
    half = student_quantile(len(values) - 1) * math.sqrt(squared_error_of_mean(values))
    return mean, mean - half, mean + half


def unpaired_difference(values: Sequence[float], base_values: Sequence[float]) -> Estimate:
    """Difference of two means with Welch's interval; without an interval if one side has a single value.

    >>> welch = unpaired_difference([2.0, 4.0], [1.0, 1.0])
    >>> welch.value, round(welch.low, 3), round(welch.high, 3)
    (2.0, -10.706, 14.706)
    """
    mean, base = sum(values) / len(values), sum(base_values) / len(base_values)
    low, high, count = math.nan, math.nan, min(len(values), len(base_values))
    if count > 1:
        error, base_error = squared_error_of_mean(values), squared_error_of_mean(base_values)
        spread = error**2 / (len(values) - 1) + base_error**2 / (len(base_values) - 1)
        half = student_quantile((error + base_error) ** 2 / spread) * math.sqrt(error + base_error) if spread else 0.0
        low, high = mean - base - half, mean - base + half
    return Estimate(mean - base, low, high, count, base)


def squared_error_of_mean(values: Sequence[float]) -> float:
    """Squared standard error of the mean."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)


def student_quantile(degrees: float) -> float:
    """Half width of Student's 95 % interval, in standard errors, with `degrees` degrees of freedom."""
    from scipy.special import stdtrit  # scipy.stats would take half a second to import

    return float(stdtrit(degrees, (1 + CONFIDENCE) / 2))


def bootstrapped_interval(group: Group, base: Group, seed: int, name: str) -> tuple[float, float] | None:
    """The interval, over resampled documents, of the difference `name` of two arms of one seed; None if they were not compared."""
    (arm,) = (arm for arm in group.arms if arm.seed == seed)
    (base_arm,) = (arm for arm in base.arms if arm.seed == seed)
    against: dict[str, Any] = (arm.entry or {}).get("against") or {}
    if against.get("weights") != (base_arm.entry or {}).get("weights") or name not in against.get("differences", {}):
        return None
    low, high = against["differences"][name]["interval"]
    return (low, high) if low is not None and high is not None else None


def difference_over_pairs(group: Group, base: Group, path: str) -> dict[str, Any] | None:
    """The difference of a score, `judging/NAME`, over pairs of latents of two arms with the same seed, as `evaluation.json` has it.

    It is None for other figures, without pairs, and if the arm was compared with another arm than the baseline's.
    """
    kind, name = path.split("/")
    for arm, base_arm in ((arm, base_arm) for arm in group.arms for base_arm in base.arms if arm.seed == base_arm.seed):
        against = (arm.judging or {}).get("against") or {}
        pairs = ((against.get("scores") or {}).get(name) or {}).get("paired") or {}
        if kind == "judging" and pairs.get("value") is not None and is_arm_of(against, base_arm):
            return pairs
    return None


def is_arm_of(against: Mapping[str, Any], arm: Arm) -> bool:
    """Whether the arm is the one that another was compared with, by its weights or, if they were not recorded, by its name."""
    if "weights" in against:
        return against["weights"] == (arm.judging or {}).get("weights")
    return against.get("arm") in (arm.name, arm.folder.name)


def reasons_not_comparable(arms: Sequence[Arm]) -> list[str]:
    """Reasons why the figures of some arms cannot be compared; empty if they can."""
    entries = [arm.entry for arm in arms if arm.entry is not None]
    conditions = {
        "not on the same text": [json.dumps(entry.get("data"), sort_keys=True) for entry in entries],
        "not on as many tokens": [entry.get("tokens") for entry in entries],
        "by other thresholds": [threshold_rule(entry) for entry in entries],
    }
    reasons = [reason for reason, values in conditions.items() if len(set(values)) > 1]
    l0 = [value for arm in arms if (value := arm.figure("reconstruction/l0"))]
    return reasons + (["not at the same L0"] if l0 and max(l0) > L0_TOLERANCE * min(l0) else [])


def threshold_rule(entry: Mapping[str, Any]) -> str:
    """The rule that set an SAE's thresholds, and its target L0; `stored` if the SAE's own thresholds were used."""
    rule = entry.get("rule") or {}
    return f"{rule['rule']}, L0 {rule['l0']:g}" if "l0" in rule else "stored"
