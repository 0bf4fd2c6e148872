"""The terminal's table of judged scores."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from metasae_lightning.report import judged_scores
from metasae_lightning.report.html_page import printable
from metasae_lightning.report.judged_scores import PAPER_RESULT, PAPER_SCORE, GroupScore, group_score, label
from metasae_lightning.report.load_runs import Arm
from metasae_lightning.report.number_format import format_number
from metasae_lightning.report.seeds import Group, baseline, headline


def judged(entries: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table of the judged scores of some arms, from their entries "judging" in `evaluation.json`; changes are against the first arm."""
    return judged_groups([Group(name, [Arm(name, Path(name), record={"judging": dict(entry)})]) for name, entry in entries.items()])


def judged_groups(groups: Sequence[Group]) -> Table:
    """A row for each judged score, a column for each group of arms. Changes are against the baseline.

    A cell has the mean with its interval over latents or, of several training seeds, their standard deviation after ±.
    """
    base = baseline(groups)
    shown = judged_scores.judged_groups_of(groups)
    table = Table(title="Is a latent one concept?", title_justify="left", show_edge=False, pad_edge=False)
    table.caption, table.caption_justify = plain("\n".join(judged_scores.judging_notes(groups))), "left"
    table.add_column("")
    table.add_column("chance", justify="right")
    table.add_column("this judge, on\nknown meanings", justify="right")
    for group in shown:
        table.add_column(plain(group.name), justify="right")
    for name in judged_scores.score_names(groups):
        scores = [group_score(group, base, name) for group in shown]
        words = f"{plain(label(name))}\n[dim]{plain(judged_scores.about(groups, name))}[/dim]"
        chance = judged_scores.chance(groups, name)
        table.add_row(words, formatted(chance), reliability(scores), *(cell(score) for score in scores), end_section=True)
    solo, joint, percent = PAPER_RESULT
    of_group = {} if base is None else {base.name: f"{solo:.3f}"}
    if base is not None and (compared := headline(groups, base)) is not None:
        of_group[compared.name] = f"{joint:.3f}\n{percent:+.1f} %"
    table.add_row(
        f"the paper's fuzzing\n[dim]as {label(PAPER_SCORE)}, GPT-2 large[/dim]", "0", "", *(of_group.get(group.name, "") for group in shown)
    )
    return table


def plain(text: str) -> str:
    """Text for a table, with markup and control characters, apart from line feeds, shown as text."""
    return "\n".join(escape(printable(line)) for line in text.split("\n"))


def formatted(value: float, spec: str = ".3f") -> str:
    """A number in a format; empty for NaN."""
    return "" if math.isnan(value) else format_number(value, spec)


def reliability(scores: Sequence[GroupScore | None]) -> str:
    """What the judge scores on planted latents, whose meaning is known; a line for each value if arms differ."""
    known = [score for score in scores if score is not None and not math.isnan(score.reliability)]
    lines = dict.fromkeys(formatted(score.reliability, ".2f") for score in known)
    kinds = known[0].reliability_by_kind if len(lines) == 1 else {}
    return "\n".join([*lines, *(f"[dim]{plain(kind)} {formatted(value, '.2f')}[/dim]" for kind, value in kinds.items())])


def cell(score: GroupScore | None) -> str:
    """Mean and spread, change, controls and failures of one score of one group; empty without the score."""
    if score is None:
        return ""
    lines = [formatted(score.value)]
    if score.interval is not None:
        lines[0] += f" ({formatted(score.interval[0])} to {formatted(score.interval[1])})"
    elif not math.isnan(score.deviation):
        lines[0] += f" ± {formatted(score.deviation)}, {score.arms} seeds"
    if score.change is not None:
        lines.append(change(score))
    if score.controls:
        values = ", ".join(f"{plain(label(name))} {formatted(value, '.2f')}" for name, value in score.controls.items())
        lines.append(f"[dim]{values}[/dim]")
    if score.not_above_controls:
        lines.append(f"[bold]{judged_scores.control_verdict(score)}[/bold]")
    if score.unreadable:
        lines.append(f"{score.unreadable:.1%} of answers unreadable")
    return "\n".join(lines)


def change(score: GroupScore) -> str:
    """The change against the baseline, with its interval and the p value of the sign test if they are known."""
    assert score.change is not None
    text = formatted(score.change.value, "+.3f")
    if not math.isnan(score.change.low):
        text += f" ({formatted(score.change.low, '+.3f')} to {formatted(score.change.high, '+.3f')})"
    return text + (f", p {score.sign_p:.2g}" if not math.isnan(score.sign_p) else "")
