"""The page's section on judged latents: a table of scores and the figure of paired latents."""

import math
from collections.abc import Sequence

from metasae_lightning.report import judged_scores
from metasae_lightning.report.html_page import DASH, bullet_list, html_number, html_text, percent_change, section, seed_count
from metasae_lightning.report.judged_scores import PAPER_NOTE, PAPER_RESULT, PAPER_SCORE, GroupScore, group_score, label
from metasae_lightning.report.seeds import Group, baseline, headline

CAPTION = (
    "Scores of paired latents. A circle is a pair; a larger circle is several pairs with equal scores. Above the line the second "
    "arm's latent has the higher score. The title of a panel has the mean difference with its 95 % interval over pairs."
)
READING = (
    "A score says how well a judge can tell where a latent fires. Chance is the score of a guess. The third column is this judge's"
    " score on planted latents, whose meaning is known: a word, a suffix or a topic. Below a mean are its 95 % interval over "
    "latents, or the spread over training seeds; the change against the baseline with its interval, bold if that excludes 0; and "
    "the controls: the same score with another latent's explanation, with contexts of other latents, or with another latent's "
    "decoder row. A mean is over the arm's own sample of latents, and a change with one seed over pairs: it is not the difference "
    "of the means."
)


def judged_section(groups: Sequence[Group], figure: str = "") -> str:
    """The section "Is a latent one concept?"; empty if no arm was judged. `figure` is an SVG element."""
    shown = judged_scores.judged_groups_of(groups)
    if not shown:
        return ""
    base = baseline(groups)
    head = "".join(f"<th>{html_text(group.name)}{seed_count(group)}</th>" for group in shown)
    rows = [score_row(groups, shown, base, name) for name in judged_scores.score_names(groups)]
    rows.append(paper_row(groups, shown, base))
    table = f"<tr><th></th><th>chance</th><th>this judge, on<br>known meanings</th>{head}</tr>{''.join(rows)}"
    picture = figure and f'<figure class="pairs">{figure}<figcaption>{html_text(CAPTION)}</figcaption></figure>'
    return section(
        "Is a latent one concept?",
        f'<p class="note">{html_text(READING)}</p><div class="scroll"><table class="judged">{table}</table></div>'
        f"{bullet_list([*judged_scores.judging_notes(groups), PAPER_NOTE])}{picture}",
        name="concepts",
    )


def score_row(groups: Sequence[Group], shown: Sequence[Group], base: Group | None, name: str) -> str:
    """The table row of one score."""
    scores = [group_score(group, base, name) for group in shown]
    known = [score for score in scores if score is not None and not math.isnan(score.reliability)]
    values = list(dict.fromkeys(html_number(score.reliability, ".2f") for score in known)) or [DASH]
    kinds = known[0].reliability_by_kind if len(values) == 1 and known else {}
    small = "".join(f"<small>{html_text(label(kind))} {html_number(value, '.2f')}</small>" for kind, value in kinds.items())
    about = judged_scores.description(groups, name)
    words = f"<b>{html_text(label(name))}</b>" + (f"<small>{html_text(about)}</small>" if about else "")
    cells = "".join(score_cell(score, in_percent=name == PAPER_SCORE) for score in scores)
    chance = html_number(judged_scores.chance(groups, name), ".2f")
    return f"<tr><td>{words}</td><td>{chance}</td><td>{', '.join(values)}{small}</td>{cells}</tr>"


def score_cell(score: GroupScore | None, *, in_percent: bool) -> str:
    """The table cell of one score of one group; a dash without the score. `in_percent` adds the change in percent."""
    if score is None:
        return f"<td>{DASH}</td>"
    parts: list[str] = []
    if score.interval is not None:
        parts.append(" to ".join(html_number(end, ".3f") for end in score.interval))
    elif not math.isnan(score.deviation):
        parts.append(f"± {html_number(score.deviation, '.3f')}")
    if not math.isnan(score.graded):
        parts.append(f"graded {html_number(score.graded, '.3f')}")
    # Bold means that the interval excludes 0.
    is_sure = score.change is not None and score.change.sign != 0
    parts += [f"<b>{part}</b>" if is_sure else part for part in change_parts(score)]
    if in_percent and score.change is not None and score.change.base:
        parts += percent_change(score.change)[:1]
    parts += [f"{html_text(label(name))} {html_number(value, '.3f')}" for name, value in score.controls.items()]
    small = "".join(f"<small>{part}</small>" for part in parts)
    if score.not_above_controls:
        small += f'<small class="fails">{judged_scores.control_verdict(score)}</small>'
    if score.unreadable:
        small += f'<small class="fails">{score.unreadable:.1%} of answers unreadable</small>'
    return f"<td>{html_number(score.value, '.3f')}{small}</td>"


def change_parts(score: GroupScore) -> list[str]:
    """The change against the baseline with its interval, and the p value of the sign test; empty without a change."""
    if score.change is None:
        return []
    text = html_number(score.change.value, "+.3f")
    if not math.isnan(score.change.low):
        text += f" ({html_number(score.change.low, '+.3f')} to {html_number(score.change.high, '+.3f')})"
    return [text] + ([f"sign test, p {score.sign_p:.2g}"] if not math.isnan(score.sign_p) else [])


def paper_row(groups: Sequence[Group], shown: Sequence[Group], base: Group | None) -> str:
    """The table row of the paper's result, in the columns of the baseline and of the group in the page's first sentence."""
    solo, joint, percent = PAPER_RESULT
    compared = None if base is None else headline(groups, base)
    cells = {id(base): f"{solo:.3f}", id(compared): f"{joint:.3f}<small>{percent:+.1f} %</small>"}
    values = "".join(f"<td>{cells.get(id(group), DASH)}</td>" for group in shown)
    words = f"<b>the paper: fuzzing</b><small>{label(PAPER_SCORE)} in its code, on GPT-2 large</small>"
    return f"<tr><td>{words}</td><td>{0:.2f}</td><td>{DASH}</td>{values}</tr>"
