"""Conclusions of a report: joint SAE against solo SAE, and both against the paper's table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from metasae_lightning.report.load_runs import Arm
from metasae_lightning.report.number_format import format_number
from metasae_lightning.report.seeds import Estimate, Group, baseline, difference, headline, reasons_not_comparable

SETTING = "GPT-2 large, blocks.20.hook_resid_pre, 20,480 latents, k 64, a meta SAE of 1,800, one seed"


@dataclass(frozen=True)
class PaperResult:
    """The paper's result for one weight and one sigma squared, in percent of its solo SAE."""

    phi: float
    """Change of mean |phi|."""
    error: float
    """Change of the squared error."""
    loss: float | None = None
    """Loss that the reconstruction adds to the language model, in percent of the model's loss; not a change against solo."""


# By weight (the paper's lambda2) and sigma squared.
PAPER_RESULTS: dict[tuple[float, float], PaperResult] = {
    (0.1, 0.3): PaperResult(-1.9, 2.0),
    (0.1, 1.0): PaperResult(-3.8, 3.5, 2.8),
    (0.1, 3.0): PaperResult(-3.5, 1.8, 2.7),
    (0.3, 0.3): PaperResult(-1.5, 5.5),
    (0.3, 1.0): PaperResult(-7.5, 9.3, 3.1),
    (0.3, 3.0): PaperResult(-4.4, 5.7, 2.9),
    (1.0, 0.3): PaperResult(3.8, 13.1),
    (1.0, 1.0): PaperResult(2.8, 19.6, 3.5),
    (1.0, 3.0): PaperResult(2.6, 13.5, 3.2),
}
# Range of the loss that the paper's solo SAE adds, in percent.
SOLO_LOSS = (2.4, 2.5)
# The weight and sigma squared that the paper recommends.
RECOMMENDED = (0.3, 1.0)

# Figures of the page: label, `GROUP/NAME` in `evaluation.json`, name of the bootstrapped difference, format, whether less is better.
FIGURES: tuple[tuple[str, str, str, str, bool | None], ...] = (
    ("excess of mean |phi|", "phi/excess", "phi_excess", ".3e", True),
    ("mean |phi|", "phi/mean_abs", "", ".3e", True),
    ("variance unexplained", "reconstruction/fvu", "fvu", ".4f", True),
    ("  with the head on codes", "head/fvu", "", ".4f", True),
    ("loss of the model with the SAE in it", "splice/ce_sae", "ce_sae", ".4f", True),
    ("  with the SAE and its head", "head/ce_sae", "", ".4f", True),
    ("dead latents", "latents/dead", "", ".2%", True),
    ("nearest decoder row, mean cosine", "decoder/nearest_mean", "", ".4f", True),
    ("stable rank of a group, mean", "decoder/stable_rank_mean", "", ".3f", None),
    ("fresh critic explains", "critic/fve", "", ".4f", True),
    ("features recovered (MCC)", "recovery/mcc", "", ".4f", False),
    ("  unique", "recovery/uniqueness", "", ".4f", False),
    ("  firings, F1", "recovery/f1", "", ".4f", False),
    ("  absorbed by others' latents", "recovery/absorbed", "", ".2%", True),
    ("latents active on a token", "reconstruction/l0", "l0", ".2f", None),
)


@dataclass(frozen=True)
class Verdict:
    """The conclusion at the top of the page."""

    sentence: str
    """The answer: how much less latents fire together, and at what price."""
    beside: list[str]
    """Intervals, costs and caveats, a sentence each; without a comparison, the command that makes one possible."""
    sure: bool
    """Whether co-firing was compared. The comparison may lack an interval, which the sentence then says."""


def verdict(groups: Sequence[Group]) -> Verdict:
    """Whether co-firing is less in the headline group than in the baseline, and at what cost; or why they cannot be compared."""
    base = baseline(groups)
    group = headline(groups, base) if base else None
    if base is None or group is None:
        return Verdict("One SAE alone: there is nothing to compare it with.", [], False)
    arms = [*base.arms, *group.arms]
    if reasons := reasons_not_comparable(arms):
        return Verdict(f"{group.name} and {base.name} cannot be compared: they were measured {'; '.join(reasons)}.", [REMEASURE], False)
    change = difference(group, base, "phi/excess", "phi_excess")
    if change is None:
        lacking = ", ".join(arm.name for arm in arms if arm.figure("phi/excess") is None)
        return Verdict(f"Nothing can be said yet: there is no co-firing measured for {lacking}.", [REMEASURE], False)
    sentence = f"{group.name}'s latents {co_firing(change)} {base.name}'s{price(difference(group, base, 'reconstruction/fvu', 'fvu'))}."
    excess = [f"Excess of mean |phi|: {percent(change)}."]
    if math.isnan(change.low):
        sentence = f"Excess of mean |phi| of {group.name} against {base.name}: {percent(change)}; nothing tells how sure that is."
        excess = []
    return Verdict(sentence, [*excess, *costs(group, base), *caveats(change, group, base)], True)


def co_firing(change: Estimate) -> str:
    """The change of co-firing as the verdict's verb; a direction only if the interval excludes 0.

    >>> co_firing(Estimate(-0.1, -0.2, -0.05, 3, 1.0)), co_firing(Estimate(-0.1, -0.2, 0.1, 3, 1.0))
    ('fire together 10.0 % less than', 'do not fire together measurably less or more than')
    """
    if not change.sign:
        return "do not fire together measurably less or more than"
    amount = f"{abs(change.percent[0]):.1f} % " if change.base else ""
    return f"fire together {amount}{'more' if change.sign > 0 else 'less'} than"


def price(error: Estimate | None) -> str:
    """The change of variance unexplained as a clause for the verdict; a direction only if the interval excludes 0 or there is none.

    >>> price(Estimate(0.1, 0.05, 0.2, 3, 1.0)), price(Estimate(0.1, -0.1, 0.2, 3, 1.0)), price(None)
    (', at 10.0 % more unexplained variance', ', at no measurable change of unexplained variance', '')
    """
    if error is None or not error.base:
        return ""
    if not error.sign and not math.isnan(error.low):
        return ", at no measurable change of unexplained variance"
    return f", at {abs(error.percent[0]):.1f} % {'more' if error.value > 0 else 'less'} unexplained variance"


REMEASURE = "Measure all of them together: metasae test RUN... sets one L0 for all and reads the same text."


def percent(change: Estimate) -> str:
    """A difference in percent of the baseline, with its interval; if the baseline is 0, the difference itself, without interval.

    >>> percent(Estimate(-0.1, -0.2, -0.05, 3, 1.0)), percent(Estimate(1.0, float("nan"), float("nan"), 1, 0.0))
    ('-10.0 % (95 %: -20.0 to -5.0 %)', '+1 from 0')
    """
    value, low, high = change.percent
    if math.isnan(value):
        return f"{change.value:+.3g} from {change.base:.3g}"
    interval = "" if math.isnan(low) else f" (95 %: {format_number(low, '+.1f')} to {format_number(high, '+.1f')} %)"
    return f"{format_number(value, '+.1f')} %{interval}"


def absolute_interval(change: Estimate) -> str:
    """The 95 % interval of a difference, in the difference's unit, as text to put after its number; empty if there is none."""
    return "" if math.isnan(change.low) else f" (95 %: {format_number(change.low, '+.4f')} to {format_number(change.high, '+.4f')})"


def costs(group: Group, base: Group) -> list[str]:
    """Changes of FVU, language-model loss, fresh critics and recovery of planted features: a sentence for each that was measured."""
    sentences: list[str] = []
    if (error := difference(group, base, "reconstruction/fvu", "fvu")) is not None:
        sentences.append(f"Variance unexplained: {percent(error)}.")
    if (loss := difference(group, base, "splice/ce_sae", "ce_sae")) is not None:
        change = f"{format_number(loss.value, '+.4f')}{absolute_interval(loss)}"
        sentences.append(f"Loss of the model with the SAE in it: {change}, {loss.base:.4f} with {base.name}'s.")
    if (fve := difference(group, base, "critic/fve")) is not None:
        mean, base_mean = (mean_of(side.values("critic/fve")) for side in (group, base))
        change = "" if math.isnan(fve.low) else f", a difference of {format_number(fve.value, '+.4f')}{absolute_interval(fve)}"
        sentences.append(
            f"A fresh critic explains {mean:.4f} of {group.name}'s decoder and {base_mean:.4f} of {base.name}'s{change}. "
            "Less is more atomic."
        )
    if (mcc := difference(group, base, "recovery/mcc")) is not None:
        change = f"{format_number(mcc.value, '+.4f')}{absolute_interval(mcc)}"
        sentences.append(f"Planted features recovered (MCC): {change}, {mcc.base:.4f} with {base.name}.")
    return sentences


def caveats(change: Estimate, group: Group, base: Group) -> list[str]:
    """Limits of the comparison: number of seeds, unequal L0, many dead latents."""
    sentences: list[str] = []
    if change.seeds == 1:
        sentences.append("One seed: the interval is of documents drawn again, and says nothing of other seeds.")
    else:
        sentences.append(f"The interval is Student's, over {change.seeds} seeds.")
    l0 = [mean_of(values) for side in (group, base) if (values := side.values("reconstruction/l0"))]
    if len(l0) == 2 and abs(l0[0] / l0[1] - 1) > 0.02:
        sentences.append(f"L0 differs: {l0[0]:.2f} and {l0[1]:.2f} latents active on a token.")
    dead = [mean_of(values) for side in (group, base) if (values := side.values("latents/dead"))]
    if dead and max(dead) > 0.1:
        sentences.append(f"Dead latents: {' and '.join(f'{share:.1%}' for share in dead)}; figures are of the live ones.")
    return sentences


def mean_of(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


@dataclass(frozen=True)
class PaperComparison:
    """One row of the paper's table with our results."""

    weight: float
    """The paper's lambda2."""
    sigma_sq: float
    """Sigma squared."""
    phi: float
    """The paper's change of mean |phi|, in percent."""
    error: float
    """The paper's change of the squared error, in percent."""
    loss: float | None
    """The paper's loss added by the SAE, in percent of the model's loss."""
    ours: Group | None
    """Our arms with this weight and sigma squared; None if there are none, or they cannot be compared with the baseline."""
    our_phi: Estimate | None
    """Our change of mean |phi|."""
    our_excess: Estimate | None
    """Our change of the excess of mean |phi| over its floor, which the paper does not report."""
    our_error: Estimate | None
    """Our change of FVU; in percent, on the same text, it equals the change of the squared error."""
    our_loss: float | None
    """Our loss added by the SAE, in percent of the model's loss."""


def compare_with_paper(groups: Sequence[Group]) -> list[PaperComparison]:
    """The paper's table with our results; empty if none of our arms has a weight and sigma squared of the table and can be compared."""
    base = baseline(groups)
    by_setting: dict[tuple[float, float], Group] = {}
    for group in groups:
        if group.decomposability is not None:
            by_setting.setdefault(group.decomposability, group)
    if base is None or not by_setting.keys() & PAPER_RESULTS.keys():
        return []
    comparisons: list[PaperComparison] = []
    for (weight, sigma_sq), paper in PAPER_RESULTS.items():
        group = by_setting.get((weight, sigma_sq))
        if group is base or (group is not None and reasons_not_comparable([*group.arms, *base.arms])):
            group = None
        phi = None if group is None else difference(group, base, "phi/mean_abs")
        excess = None if group is None else difference(group, base, "phi/excess", "phi_excess")
        error = None if group is None else difference(group, base, "reconstruction/fvu", "fvu")
        loss = None if group is None else added_loss(group.arms)
        comparisons.append(PaperComparison(weight, sigma_sq, paper.phi, paper.error, paper.loss, group, phi, excess, error, loss))
    return comparisons if any(comparison.ours is not None for comparison in comparisons) else []


def added_loss(arms: Sequence[Arm]) -> float | None:
    """Loss that SAEs add to the language model, in percent of the model's loss: the mean over arms; None if no arm measured it."""
    pairs = [(arm.figure("splice/ce_sae"), arm.figure("splice/ce_clean")) for arm in arms]
    added = [100 * (with_sae / clean - 1) for with_sae, clean in pairs if with_sae is not None and clean]
    return mean_of(added) if added else None
