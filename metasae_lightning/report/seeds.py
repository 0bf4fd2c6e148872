"""Arms that differ by their seed alone, taken together, and what one such group does otherwise than another."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from metasae_lightning.report.load_runs import Arm

SURE = 0.95
# SAEs whose L0 differ by more than so much do not do the same work.
APART = 1.05


@dataclass(frozen=True)
class Group:
    """Arms of one recipe."""

    name: str
    """What the page calls them."""
    arms: list[Arm]
    """Themselves, one a seed."""

    @property
    def first(self) -> Arm:
        """One of them."""
        return self.arms[0]

    @property
    def plain(self) -> bool:
        """Whether no penalty weighs anything."""
        return not self.first.penalties

    @property
    def decomposability(self) -> tuple[float, float] | None:
        """Weight and sigma squared, where that is the one penalty."""
        own = list(self.first.penalties.values())
        if len(own) != 1 or own[0]["class"] != "Decomposability":
            return None
        return float(own[0].get("weight", 0.3)), float(own[0].get("sigma_sq", 1.0))

    def values(self, path: str) -> list[float]:
        """A figure of each of the arms that have it."""
        return [value for arm in self.arms if (value := arm.figure(path)) is not None]


@dataclass(frozen=True)
class Estimate:
    """A number and where it lies with 95 %."""

    value: float
    """The number, a mean where there are several seeds."""
    low: float
    """No less."""
    high: float
    """No more."""
    seeds: int
    """How many seeds it is of; of one, the interval is of documents drawn again."""
    base: float
    """What the baseline has."""

    @property
    def percent(self) -> tuple[float, float, float]:
        """The same in percent of the baseline."""
        scale = 100 / abs(self.base) if self.base else math.nan
        return self.value * scale, *sorted((self.low * scale, self.high * scale))  # pyright: ignore[reportReturnType]

    @property
    def sign(self) -> int:
        """1 and -1 where all of the interval is on that side of nothing, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def grouped(arms: Sequence[Arm]) -> list[Group]:
    """Arms by recipe, in order; an arm whose recipe is not known is alone."""
    found: dict[str, list[Arm]] = {}
    for arm in arms:
        recipe = {key: value for key, value in arm.recipe.items() if key != "seed"}
        key = json.dumps(recipe, sort_keys=True, default=str) if recipe else arm.name
        alike = found.setdefault(key, [])
        # Twice the same seed is no second seed: two runs of one recipe are told apart.
        if arm.seed in [other.seed for other in alike]:
            alike = found.setdefault(f"{key} {arm.name}", [])
        alike.append(arm)
    return [Group(name_of(arms), arms) for arms in found.values()]


def name_of(arms: Sequence[Arm]) -> str:
    """An arm's name without its seed, where there are several."""
    name = arms[0].name
    return (re.sub(r"[-_.]?seed[-_.=]?\d+", "", name).strip("/") or name) if len(arms) > 1 else name


def baseline(groups: Sequence[Group]) -> Group | None:
    """What others are compared with: the first without critic and penalty, else without penalty, else the first."""
    alone = [group for group in groups if group.first.recipe and group.plain and not group.first.recipe.get("meta")]
    plain = [group for group in groups if group.first.recipe and group.plain]
    return next(iter([*alone, *plain, *groups]), None)


def headline(groups: Sequence[Group], base: Group) -> Group | None:
    """What the first sentence is about: the first with a decomposability penalty, else the first that is not the baseline."""
    others = [group for group in groups if group is not base]
    joint = [group for group in others if group.decomposability]
    return next(iter([*joint, *others]), None)


def difference(group: Group, base: Group, path: str, measured: str = "") -> Estimate | None:
    """A figure of a group less the baseline's, paired by seed where seeds are the same.

    `measured` is its name among the differences that `metasae test` draws from documents: what there is to say of one seed.
    """
    own = {arm.seed: value for arm in group.arms if (value := arm.figure(path)) is not None}
    other = {arm.seed: value for arm in base.arms if (value := arm.figure(path)) is not None}
    both = sorted(own.keys() & other.keys())
    if len(both) > 1:
        mean = sum(other[seed] for seed in both) / len(both)
        return Estimate(*mean_interval([own[seed] - other[seed] for seed in both]), len(both), mean)
    if not own or not other:
        return None
    if not both:  # seeds of their own: nothing to pair
        return unpaired(list(own.values()), list(other.values()))
    (seed,) = both
    value, drawn = own[seed] - other[seed], drawn_again(group, base, seed, measured)
    low, high = drawn or (math.nan, math.nan)
    return Estimate(value, low, high, 1, other[seed])


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and Student's interval.

    >>> [round(x, 3) for x in mean_interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    count, mean = len(values), sum(values) / len(values)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    half = float(stats.t.ppf((1 + SURE) / 2, count - 1)) * error
    return mean, mean - half, mean + half


def unpaired(own: Sequence[float], other: Sequence[float]) -> Estimate:
    """Welch's interval of a difference of means; of one value on a side there is none."""
    mean, base = sum(own) / len(own), sum(other) / len(other)
    low, high = math.nan, math.nan
    if min(len(own), len(other)) > 1:
        interval = stats.ttest_ind(own, other, equal_var=False).confidence_interval(SURE)
        low, high = float(interval.low), float(interval.high)
    return Estimate(mean - base, low, high, min(len(own), len(other)), base)


def drawn_again(group: Group, base: Group, seed: int, name: str) -> tuple[float, float] | None:
    """The interval that documents drawn again gave, where the two arms were measured together."""
    (arm,) = (arm for arm in group.arms if arm.seed == seed)
    (other,) = (arm for arm in base.arms if arm.seed == seed)
    against: dict[str, Any] = (arm.entry or {}).get("against") or {}
    if against.get("weights") != (other.entry or {}).get("weights") or name not in against.get("differences", {}):
        return None
    low, high = against["differences"][name]["interval"]
    return (low, high) if low is not None and high is not None else None


def comparable(arms: Sequence[Arm]) -> list[str]:
    """Why figures of some arms cannot be held against each other, in words."""
    entries = [arm.entry for arm in arms if arm.entry is not None]
    found: list[str] = []
    for words, told in {
        "not on the same text": [json.dumps(entry.get("data"), sort_keys=True) for entry in entries],
        "not on as many tokens": [entry.get("tokens") for entry in entries],
        "by other thresholds": [rule(entry) for entry in entries],
    }.items():
        if len(set(told)) > 1:
            found.append(words)
    l0 = [value for arm in arms if (value := arm.figure("reconstruction/l0"))]
    return found + (["not at the same L0"] if l0 and max(l0) > APART * min(l0) else [])


def rule(entry: Mapping[str, Any]) -> str:
    """How thresholds were set."""
    told = entry.get("rule") or {}
    return f"{told['rule']}, L0 {told['l0']:g}" if "l0" in told else "stored"
