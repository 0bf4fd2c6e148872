"""The HTML page: one self-contained file. All text from runs is escaped."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from metasae_lightning.report import conclusions
from metasae_lightning.report.conclusions import FIGURES, PaperComparison, Verdict
from metasae_lightning.report.load_runs import Arm
from metasae_lightning.report.number_format import format_number
from metasae_lightning.report.seeds import Estimate, Group, baseline, difference, threshold_rule

HERE = Path(__file__).parent
CAPTIONS = {
    "gain": "Change against the baseline: higher is less co-firing, further left a better reconstruction. Bars are 95 % intervals.",
    "tradeoff": "Co-firing against variance unexplained on test documents, a point for each arm: lower is less co-firing, further left a "
    "better reconstruction. Bars are 95 % intervals over documents.",
    "phi": "Distribution of |phi| over pairs of latents (values below 1e-5 are in the first step), and its difference from the baseline's.",
    "decoder": "Cosine of each decoder row with its nearest other row.",
    "critic": "Variance that fresh critics explain of each decoder, of its rows with shuffled coordinates, and of random rows. "
    "Less is more atomic.",
    "latents": "How often latents fire on test documents.",
    "recovery": "Recovery of planted features: mean cosine of a one-to-one match, latents with a feature of their own, and firings.",
    "training": "Measured on training batches. Thin lines are further seeds.",
}
# Figures that have a section of their own.
IN_OTHER_SECTIONS = {"gain", "judged"}
# HTML entities.
MINUS, DASH = "&minus;", "&ndash;"
# Scores that the list of latents is sorted by, and the direction that comes first.
ORDERS = {
    "density": "firing rate",
    "strong": "largest activation",
    "partner": "phi with a partner",
    "near": "cosine with a neighbour",
    "match": "cosine with the other arm",
    "number": "number",
}


def page(
    title: str,
    groups: Sequence[Group],
    verdict: Verdict,
    comparisons: Sequence[PaperComparison],
    figure_elements: Mapping[str, str],
    latent_data: str = "",
    *,
    judged: str = "",
    reads_files: bool = False,
) -> str:
    """The whole page. `latent_data` is the compressed result of `page_data`, `judged` the sections on judged latents.

    `reads_files` allows the page to load scripts beside it.
    """
    arms = [arm for group in groups for arm in group.arms]
    sections = [
        verdict_box(verdict, figure_elements.get("gain", "")),
        missing_box(arms),
        section("Figures side by side", figures_table(groups)),
        section("Beside the paper", paper_table(comparisons)),
        judged,
        section("Pictures", figure_gallery(figure_elements)),
        section("Latents", latent_controls() if latent_data else "", name="browser"),
        section("How it was measured", measurement_notes(arms)),
    ]
    return Template((HERE / "page.html").read_text()).substitute(
        title=escape(printable(title)),
        style=(HERE / "page.css").read_text(),
        script=(HERE / "page.js").read_text(),
        sections="\n".join(part for part in sections if part),
        footer="Written by metasae-lightning from saved results; it measures nothing itself and asks no server for anything.",
        data=f'<script type="text/plain" id="latents">{latent_data}</script>' if latent_data else "",
        # `'self'` matches no file in some browsers.
        script_sources="'unsafe-inline' 'self' file:" if reads_files else "'unsafe-inline'",
    )


def printable(text: str) -> str:
    """Text with every control and direction character replaced.

    >>> printable("a\\x00b\\u202ec")
    'a\ufffdb\ufffdc'
    """
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]", "\ufffd", text)


def html_text(text: str) -> str:
    """Text for HTML: control and direction characters replaced, markup escaped."""
    return escape(printable(text))


def section(heading: str, body: str, name: str = "") -> str:
    """A section with a heading and, as its id, `name`; empty if its body is empty. Heading and body are HTML already."""
    return f"<section{f' id={name}' if name else ''}>\n<h2>{heading}</h2>\n{body}\n</section>" if body else ""


def bullet_list(lines: Sequence[str]) -> str:
    """A bulleted list; empty without lines."""
    return f"<ul>{''.join(f'<li>{html_text(line)}</li>' for line in lines)}</ul>" if lines else ""


def verdict_box(verdict: Verdict, figure: str) -> str:
    """The box with the conclusion and, beside it, the figure of gain and cost (empty without one)."""
    picture = figure and f"<figure>{figure}<figcaption>{html_text(CAPTIONS['gain'])}</figcaption></figure>"
    return f'<div class="verdict"><div><p>{html_text(verdict.sentence)}</p>{bullet_list(verdict.beside)}</div>{picture}</div>'


def missing_box(arms: Sequence[Arm]) -> str:
    """The box that lists missing results; empty if nothing is missing."""
    lines = [f"{arm.name}: {phrase}" for arm in arms for phrase in arm.missing]
    return f'<section><h2>Missing</h2><div class="verdict missing">{bullet_list(lines)}</div></section>' if lines else ""


def html_number(value: float, spec: str) -> str:
    """A number in a format, with a typographic minus; a dash if it is not finite."""
    return format_number(value, spec).replace("-", MINUS) if math.isfinite(value) else DASH


def figures_table(groups: Sequence[Group]) -> str:
    """A table of every measured value of every group: spread over seeds or interval, and change. Empty if nothing was measured."""
    measured = [group for group in groups if any(arm.entry for arm in group.arms)]
    if not measured:
        return ""
    base = baseline(measured)
    head = "".join(f"<th>{html_text(group.name)}{seed_count(group)}</th>" for group in measured)
    lines: list[str] = []
    for words, path, name, digits, _ in FIGURES:
        if not any(group.values(path) for group in measured):
            continue
        cells = "".join(cell(group, base, path, name, digits) for group in measured)
        lines.append(f"<tr><td>{html_text(words)}</td>{cells}</tr>")
    note = "In small print the spread over seeds or, of one, where it lies with 95 % when documents are drawn again; then the change."
    return f'<p class="note">{note}</p><div class="scroll"><table><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'


def seed_count(group: Group) -> str:
    """The number of seeds; empty for one."""
    return f"<br><small>{len(group.arms)} seeds</small>" if len(group.arms) > 1 else ""


def cell(group: Group, base: Group | None, path: str, name: str, digits: str) -> str:
    """The table cell of one measured value of one group; a dash if the group lacks it.

    It has the mean over seeds, its spread or interval, and its change against the baseline unless the value is itself a percentage.
    `name` is that of the interval and of the bootstrapped difference, `digits` a number format.
    """
    values = group.values(path)
    if not values:
        return f"<td>{DASH}</td>"
    mean = sum(values) / len(values)
    spread = ""
    if len(values) > 1:
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
        spread = f"± {html_number(deviation, digits)}"
    elif (interval := ((group.first.entry or {}).get("intervals") or {}).get(name)) and None not in interval:
        spread = f"{html_number(interval[0], digits)} to {html_number(interval[1], digits)}"
    # A change in percent of a percentage would confuse.
    change = [] if base is None or group is base or digits.endswith("%") else percent_change(difference(group, base, path, name))
    small = "".join(f"<small>{part}</small>" for part in (spread, *change) if part)
    return f"<td>{html_number(mean, digits)}{small}</td>"


def percent_change(change: Estimate | None) -> list[str]:
    """A change in percent and, if known, its interval; empty if there is no change or the baseline is 0."""
    if change is None or not change.base:
        return []
    value, low, high = change.percent
    return [f"{html_number(value, '+.1f')} %"] + ([] if math.isnan(low) else [f"{html_number(low, '+.1f')} to {html_number(high, '+.1f')}"])


def paper_table(comparisons: Sequence[PaperComparison]) -> str:
    """The paper's results with ours beside them; empty without comparisons."""
    if not comparisons:
        return ""
    lines: list[str] = []
    for row in comparisons:
        kind = ' class="chosen"' if (row.weight, row.sigma_sq) == conclusions.RECOMMENDED else ""
        cells = [
            f"{html_number(row.phi, '+.1f')} %",
            our_change(row.our_phi),
            our_change(row.our_excess),
            f"{html_number(row.error, '+.1f')} %",
            our_change(row.our_error),
        ]
        cells += [DASH if value is None else f"{html_number(value, '.1f')} %" for value in (row.loss, row.our_loss)]
        row_html = "".join(f"<td{kind}>{value}</td>" for value in cells)
        lines.append(f"<tr><td{kind}>{row.weight:g}, {row.sigma_sq:g}</td>{row_html}</tr>")
    heads = ("weight, sigma²", "mean |phi|, paper", "here", "its excess, here", "error, paper", "here", "loss added, paper", "here")
    head = "".join(f"<th>{words}</th>" for words in heads)
    low, high = conclusions.SOLO_LOSS
    note = (
        f"Changes against solo. The paper's are of {conclusions.SETTING}; its solo SAE adds {low} to {high} % to the loss. "
        "Mean |phi| has a floor that depends on the number of tokens, so its changes are of different things; the excess has none."
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div><p>{html_text(note)}</p>'


def our_change(change: Estimate | None) -> str:
    """A cell with our change, or a dash."""
    value, *interval = percent_change(change) or [DASH]
    return value + "".join(f"<small>{part}</small>" for part in interval)


def figure_gallery(figure_elements: Mapping[str, str]) -> str:
    """The figures with their captions."""
    captioned = [
        f"<figure>{svg}<figcaption>{html_text(CAPTIONS[name])}</figcaption></figure>"
        for name, svg in figure_elements.items()
        if name not in IN_OTHER_SECTIONS
    ]
    return f'<div class="figures">{"".join(captioned)}</div>' if captioned else ""


def latent_controls() -> str:
    """Controls and the empty list and card that `page.js` fills."""
    options = "".join(f'<option value="{key}">{words}</option>' for key, words in ORDERS.items())
    return (
        '<div class="controls"><label>SAE<select id="arm"></select></label>'
        '<label class="wide">Search<input id="search" type="search" placeholder="a token, a text, an explanation, or a number" '
        'autocomplete="off"></label>'
        f'<label>Sort by<select id="sort">{options}</select></label>'
        '<button id="direction" type="button" aria-label="Reverse the order">↓</button></div>'
        '<p id="count" class="note" aria-live="polite">The list needs JavaScript.</p>'
        '<div class="explorer"><div id="list" role="listbox" tabindex="0" aria-label="Latents"></div><article id="latent"></article></div>'
        '<p class="note keys"><kbd>j</kbd> <kbd>k</kbd> next and previous latent, <kbd>/</kbd> search, <kbd>m</kbd> match in the other '
        "arm, <kbd>r</kbd> reverse the order</p>"
    )


def measurement_notes(arms: Sequence[Arm]) -> str:
    """Thresholds and training tokens of all arms; test text, settings and versions of the first. Empty if no arm was evaluated."""
    entries = {arm.name: arm.entry for arm in arms if arm.entry is not None}
    if not entries:
        return ""
    first = next(iter(entries.values()))
    lines = [
        f"{first.get('tokens', 0):,} test tokens of {first.get('documents', 0):,} held-out documents, at {first.get('hook')}.",
        "Thresholds: " + "; ".join(dict.fromkeys(threshold_rule(entry) for entry in entries.values())) + ".",
        f"Settings: {json.dumps(first.get('settings'))}.",
        f"Text: {json.dumps(first.get('data'))}.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in (first.get('versions') or {}).items())}.",
    ]
    trained = [f"{arm.name} on {arm.record['validation']['tokens']:,}" for arm in arms if "tokens" in arm.record.get("validation", {})]
    lines += [f"Tokens trained on: {', '.join(trained)}."] if trained else []
    return bullet_list(lines)
