"""The report's conclusions: directions only where an interval shows one, groups, the paper's table, and the figure of gain and cost."""

import re
from pathlib import Path
from typing import Any

import pytest

from metasae_lightning import report
from metasae_lightning.report.conclusions import PAPER_RESULTS
from metasae_lightning.report.figures import gain
from metasae_lightning.report.html_page import figures_table
from metasae_lightning.report.load_runs import Arm
from metasae_lightning.report.seeds import baseline, group_by_recipe, headline
from tests.report.test_report import model


def entry(excess: float, fvu: float = 0.2, l0: float = 8.0, **changes: Any) -> dict[str, Any]:
    figures = {"phi": {"excess": excess, "mean_abs": excess + 1e-4}, "reconstruction": {"fvu": fvu, "l0": l0}}
    return {"evaluation": {"figures": figures, "tokens": 9, "data": {}, "rule": {"rule": "rate", "l0": 8}, "intervals": {}, **changes}}


def arm(name: str, weight: float | None, seed: int, record: dict[str, Any]) -> Arm:
    return Arm(name, Path(name), model(weight, seed)["init_args"], record)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ((-3e-5, -3.1e-5, -2.9e-5), "joint's latents fire together 29.7 % less than solo's, at 5.0 % more unexplained variance."),
        ((3e-5, 3.1e-5, 2.9e-5), "fire together 29.7 % more than solo's, at 5.0 % more unexplained variance."),
        ((-3e-5, 4e-5, 1e-6), "do not fire together measurably less or more than solo's, at 5.0 % more"),
    ],
)
def test_the_verdict_states_a_direction_only_if_the_interval_excludes_zero(changes: tuple[float, ...], sentence: str):
    arms = [arm(f"solo-seed{seed}", None, seed, entry(1e-4 + seed * 1e-6)) for seed in range(3)]
    arms += [arm(f"joint-seed{seed}", 0.3, seed, entry(1e-4 + seed * 1e-6 + change, 0.21)) for seed, change in enumerate(changes)]
    verdict = report.verdict(group_by_recipe(arms))
    assert sentence in verdict.sentence and verdict.sure
    assert any(line.startswith("Variance unexplained: +5.0 %") for line in verdict.beside)
    assert any("over 3 seeds" in line for line in verdict.beside)


def test_no_figure_that_is_rounded_to_zero_has_a_sign():
    arms = [arm(f"solo-seed{seed}", None, seed, entry(1e-4)) for seed in range(3)]
    arms += [arm(f"joint-seed{seed}", 0.3, seed, entry(1e-4 - 1e-9 * (1 + seed), 0.2 - 1e-6 * (1 + seed))) for seed in range(3)]
    groups = group_by_recipe(arms)
    result = report.verdict(groups)
    assert "0.0 %" in result.beside[0]
    text = " ".join([result.sentence, *result.beside, figures_table(groups)]).replace("&minus;", "-")
    assert not re.search(r"[-+]0\.0+(?![0-9e])", text)


def test_the_figure_of_gain_and_cost_has_a_point_for_each_comparable_group():
    def labels(*arms: Arm) -> list[str] | None:
        figure = gain(group_by_recipe(arms))
        return None if figure is None else [text.get_text() for text in figure.axes[0].texts]

    solo = arm("solo", None, 0, entry(1e-4, 0.2))
    joint, control = arm("joint", 0.3, 0, entry(0.9e-4, 0.22)), arm("control", 0.0, 0, entry(1e-4, 0.2))
    elsewhere = arm("elsewhere", 1.0, 0, entry(1e-5, 0.22, tokens=10))
    assert labels(solo, joint, control, elsewhere) == ["solo, control", "joint", "↖ better"]
    figure = gain(group_by_recipe([solo, joint]))
    assert figure is not None
    x, y = figure.axes[0].containers[0].lines[0].get_data()  # type: ignore[attr-defined]
    assert (x[0], y[0]) == pytest.approx((10, 10))  # 10 % more error, 10 % less co-firing
    assert labels(solo) is None and labels(solo, elsewhere) is None


def test_the_verdict_names_no_price_that_its_interval_does_not_show():
    arms = [arm(f"solo-seed{seed}", None, seed, entry(1e-4, 0.2)) for seed in range(3)]
    arms += [arm(f"joint-seed{seed}", 0.3, seed, entry(1e-4 - 3e-5, 0.2 + change)) for seed, change in enumerate((-0.01, 0.03, 0.01))]
    sentence = report.verdict(group_by_recipe(arms)).sentence
    assert "at no measurable change of unexplained variance" in sentence and "% more unexplained" not in sentence


def test_arms_evaluated_on_other_tokens_text_thresholds_or_l0_are_not_compared():
    solo = arm("solo", None, 0, entry(1e-4))
    for other, reason in (
        (entry(5e-5, tokens=10), "not on as many tokens"),
        (entry(5e-5, data={"corpus": "another"}), "not on the same text"),
        (entry(5e-5, rule={"rule": "rate", "l0": 9}), "by other thresholds"),
        (entry(5e-5, l0=8.6), "not at the same L0"),
    ):
        verdict = report.verdict(group_by_recipe([solo, arm("joint", 0.3, 0, other)]))
        assert not verdict.sure and reason in verdict.sentence and "metasae test" in verdict.beside[0]
    assert report.verdict(group_by_recipe([solo])).sentence.startswith("One SAE alone")
    assert "nothing tells how sure" in report.verdict(group_by_recipe([solo, arm("joint", 0.3, 0, entry(5e-5))])).sentence


def test_arms_of_one_recipe_are_one_group_and_solo_is_the_baseline():
    arms = [arm("joint", 0.3, 0, {}), arm("control", 0.0, 0, {}), arm("solo", None, 0, {}), arm("heavier", 1.0, 0, {})]
    groups = group_by_recipe(arms)
    baseline_group = baseline(groups)
    assert baseline_group is not None and baseline_group.name == "solo"
    assert headline(groups, baseline_group) is groups[0]
    assert [group.decomposability for group in groups] == [(0.3, 1.0), None, None, (1.0, 1.0)]
    # Two runs of one recipe and seed do not count as two seeds.
    assert [len(group.arms) for group in group_by_recipe([arm("a", 0.3, 0, {}), arm("b", 0.3, 0, {}), arm("c", 0.3, 1, {})])] == [2, 1]


def test_the_papers_table_has_our_results_in_the_row_of_the_same_penalty():
    arms = [arm("solo", None, 0, entry(1e-4)), arm("joint", 0.3, 0, entry(0.9e-4, 0.22)), arm("other", 0.7, 0, entry(1e-4))]
    rows = report.compare_with_paper(group_by_recipe(arms))
    assert {(row.weight, row.sigma_sq) for row in rows} == set(PAPER_RESULTS)
    (matched_row,) = [row for row in rows if row.ours is not None]
    assert (matched_row.weight, matched_row.sigma_sq, matched_row.phi, matched_row.error, matched_row.loss) == (0.3, 1.0, -7.5, 9.3, 3.1)
    assert matched_row.our_excess is not None and matched_row.our_excess.percent[0] == pytest.approx(-10)
    assert matched_row.our_error is not None and matched_row.our_error.percent[0] == pytest.approx(10)
    # No arm of the paper's weight, and such an arm alone: a table of dashes would tell nothing.
    assert report.compare_with_paper(group_by_recipe([arm("solo", None, 0, entry(1e-4)), arm("other", 0.7, 0, entry(1e-4))])) == []
    assert report.compare_with_paper(group_by_recipe([arm("joint", 0.3, 0, entry(1e-4))])) == []
