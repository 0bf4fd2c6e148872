"""The judged scores for the terminal."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group as Renderables
from rich.markup import escape
from rich.table import Table

from metasae_lightning.report import judged_scores
from metasae_lightning.report.html_page import printable
from metasae_lightning.report.judged_scores import PAPER_RESULT, PAPER_SCORE, GroupScore, group_score, label
from metasae_lightning.report.load_runs import Arm
from metasae_lightning.report.number_format import format_number
from metasae_lightning.report.seeds import Group, baseline, headline

READING = (
    "Controls: the same score with another latent's explanation or decoder row (other), and with contexts of other latents (shuffled). "
    "Means are over each arm's own sample of latents; changes are over pairs of latents or, with several seeds, over seeds."
)


def judged(entries: Mapping[str, Mapping[str, Any]]) -> Renderables:
    """The judged scores of some arms, from their entries "judging" in `evaluation.json`; changes are against the first arm."""
    return judged_groups([Group(name, [Arm(name, Path(name), record={"judging": dict(entry)})]) for name, entry in entries.items()])


def judged_groups(groups: Sequence[Group]) -> Renderables:
    """A small table for each judged score, with a row for each group of arms. Changes are against the baseline."""
    base = baseline(groups)
    shown = judged_scores.judged_groups_of(groups)
    tables: list[Table] = []
    width = max((len(group.name) for group in shown), default=0)
    for name in judged_scores.score_names(groups):
        scores = {group.name: score for group in shown if (score := group_score(group, base, name)) is not None}
        heading = f"[bold]{plain(label(name))}[/bold]: {measured_against(judged_scores.chance(groups, name), list(scores.values()))}"
        tables.append(score_table(heading, width))
        for arm, score in scores.items():
            tables[-1].add_row(plain(arm), mean(score), change(score), controls(score))
    solo, joint, percent = PAPER_RESULT
    if base is not None and (compared := headline(groups, base)) is not None:
        tables.append(score_table(f"[bold]the paper's fuzzing[/bold]: as {label(PAPER_SCORE)}, on GPT-2 large", width))
        tables[-1].add_row(plain(base.name), f"{solo:.3f}", "", "")
        tables[-1].add_row(plain(compared.name), f"{joint:.3f}", f"{percent:+.1f} %", "")
    notes = [plain(line) for line in (READING, *judged_scores.judging_notes(groups))]
    return Renderables("[bold]Is a latent one concept?[/bold]", *tables, *notes)


def score_table(heading: str, width: int) -> Table:
    """An empty table of one score: arm, mean, change, controls."""
    table = Table(title=heading, title_justify="left", title_style="", show_header=False, show_edge=False, pad_edge=False, box=None)
    for least in (width, 22, 25, 0):
        table.add_column(min_width=least)
    return table


def plain(text: str) -> str:
    """Text for a table: markup and control characters are shown as text, and line feeds are kept."""
    return "\n".join(escape(printable(line)) for line in text.split("\n"))


def formatted(value: float, spec: str = ".3f") -> str:
    """A number in a format; empty for NaN."""
    return "" if math.isnan(value) else format_number(value, spec)


def measured_against(chance: float, scores: Sequence[GroupScore]) -> str:
    """A score's value by chance, and what the judge scores on planted latents, whose meaning is known."""
    known = [score for score in scores if not math.isnan(score.reliability)]
    values = list(dict.fromkeys(formatted(score.reliability, ".2f") for score in known))
    kinds = known[0].reliability_by_kind if len(values) == 1 else {}
    details = ", ".join(f"{plain(kind)} {formatted(value, '.2f')}" for kind, value in kinds.items())
    parts = [f"chance {formatted(chance, '.2f')}"] if not math.isnan(chance) else []
    parts += [f"this judge on known meanings {', '.join(values)}" + (f" ({details})" if details else "")] if values else []
    return "; ".join(parts)


def mean(score: GroupScore) -> str:
    """The mean score, with its interval over latents or, of several training seeds, their standard deviation after ±."""
    text = formatted(score.value)
    if score.interval is not None:
        return f"{text} ({formatted(score.interval[0])} to {formatted(score.interval[1])})"
    return text if math.isnan(score.deviation) else f"{text} ± {formatted(score.deviation)}, {score.arms} seeds"


def controls(score: GroupScore) -> str:
    """The controls, and what is wrong with the score: it does not beat them, or answers could not be read."""
    values = ", ".join(f"{plain(label(name)).split()[0]} {formatted(value, '.2f')}" for name, value in score.controls.items())
    problems = [judged_scores.control_verdict(score)] if score.not_above_controls else []
    problems += [f"{score.unreadable:.1%} of answers unreadable"] if score.unreadable else []
    return values + "".join(f"; [bold]{problem}[/bold]" for problem in problems)


def change(score: GroupScore) -> str:
    """The change against the baseline, with its interval and the p value of the sign test if they are known; empty for the baseline."""
    if score.change is None:
        return ""
    text = formatted(score.change.value, "+.3f")
    if not math.isnan(score.change.low):
        text += f" ({formatted(score.change.low, '+.3f')} to {formatted(score.change.high, '+.3f')})"
    return text + (f", p {score.sign_p:.2g}" if not math.isnan(score.sign_p) else "")
