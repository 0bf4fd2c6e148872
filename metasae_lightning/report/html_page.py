"""The page: one file that needs nothing from elsewhere, whatever text is in it."""

import base64
import gzip
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from metasae_lightning.report import conclusions
from metasae_lightning.report.conclusions import FIGURES, Beside, Verdict
from metasae_lightning.report.figures import svg
from metasae_lightning.report.load_runs import Arm
from metasae_lightning.report.seeds import Estimate, Group, baseline, difference, rule

HERE = Path(__file__).parent
CAPTIONS = {
    "tradeoff": "What less co-firing costs: down is less, left a better reconstruction. A point an arm; bars hold 95 %, over documents.",
    "phi": "How |phi| is spread over pairs of latents (below 1e-5 counted in the first step), and the difference.",
    "decoder": "How near each decoder row's nearest neighbour lies.",
    "critic": "What fresh critics explain of each decoder, of its rows with coordinates shuffled, of random rows. Less is more atomic.",
    "latents": "How often latents fire.",
    "recovery": "How well planted features are found: mean cosine of a one-to-one match, latents with a feature of their own, firings.",
    "training": "On the way. Thin lines are further seeds.",
}
# As HTML has them.
MINUS, NOTHING = "&minus;", "&ndash;"
ORDERS = {
    "density": "commonest first",
    "rare": "rarest first",
    "strong": "strongest first",
    "near": "nearest neighbour first",
    "match": "least like the other arm",
    "number": "by number",
}


def page(
    title: str, groups: Sequence[Group], said: Verdict, table: Sequence[Beside], drawn: Mapping[str, Figure], latents: list[dict[str, Any]]
) -> str:
    """Everything put together."""
    arms = [arm for group in groups for arm in group.arms]
    sections = [
        verdict_box(said),
        missing_box(arms),
        section("Figures side by side", figures_table(groups)),
        section("Beside the paper", paper_table(table)),
        section("Pictures", pictures(drawn)),
        section("Latents", browser(latents), name="browser"),
        section("How it was measured", measured(arms)),
    ]
    return Template((HERE / "page.html").read_text()).substitute(
        title=escape(printable(title)),
        style=(HERE / "page.css").read_text(),
        script=(HERE / "page.js").read_text(),
        sections="\n".join(part for part in sections if part),
        footer="Written by metasae-lightning from saved results; it measures nothing itself and asks no server for anything.",
        data=packed(latents),
    )


def printable(text: str) -> str:
    """Text without what would act on the text around it.

    >>> printable("a\\x00b\\u202ec")
    'a\ufffdb\ufffdc'
    """
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]", "\ufffd", text)


def text(words: str) -> str:
    """Words as HTML has them."""
    return escape(printable(words))


def section(heading: str, body: str, name: str = "") -> str:
    """A part of the page, where there is something in it."""
    return f"<section{f' id={name}' if name else ''}>\n<h2>{heading}</h2>\n{body}\n</section>" if body else ""


def items(lines: Sequence[str]) -> str:
    """A list."""
    return f"<ul>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>" if lines else ""


def verdict_box(said: Verdict) -> str:
    """The answer first."""
    return f'<div class="verdict"><p>{text(said.sentence)}</p>{items(said.beside)}</div>'


def missing_box(arms: Sequence[Arm]) -> str:
    """What there is not."""
    lines = [f"{arm.name}: {what}" for arm in arms for what in arm.missing]
    return f'<section><h2>Missing</h2><div class="verdict missing">{items(lines)}</div></section>' if lines else ""


def number(value: float, digits: str) -> str:
    """A figure with the digits that mean something, and a true minus."""
    return f"{value:{digits}}".replace("-", MINUS) if math.isfinite(value) else NOTHING


def figures_table(groups: Sequence[Group]) -> str:
    """Every figure of every group: the mean over its seeds with their spread, or one with its interval; and its change."""
    measured = [group for group in groups if any(arm.entry for arm in group.arms)]
    if not measured:
        return ""
    base = baseline(measured)
    head = "".join(f"<th>{text(group.name)}{seeds(group)}</th>" for group in measured)
    lines: list[str] = []
    for words, path, name, digits, _ in FIGURES:
        if not any(group.values(path) for group in measured):
            continue
        cells = "".join(cell(group, base, path, name, digits) for group in measured)
        lines.append(f"<tr><td>{text(words)}</td>{cells}</tr>")
    told = "In small print the spread over seeds or, of one, where it lies with 95 % when documents are drawn again; then the change."
    return f'<p class="note">{told}</p><div class="scroll"><table><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'


def seeds(group: Group) -> str:
    """How many there are."""
    return f"<br><small>{len(group.arms)} seeds</small>" if len(group.arms) > 1 else ""


def cell(group: Group, base: Group | None, path: str, name: str, digits: str) -> str:
    """A figure of a group."""
    values = group.values(path)
    if not values:
        return f"<td>{NOTHING}</td>"
    mean = sum(values) / len(values)
    beside = ""
    if len(values) > 1:
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
        beside = f"± {number(spread, digits)}"
    elif (interval := ((group.first.entry or {}).get("intervals") or {}).get(name)) and None not in interval:
        beside = f"{number(interval[0], digits)} to {number(interval[1], digits)}"
    # What is a percentage itself has no change in percent.
    change = [] if base is None or group is base or digits.endswith("%") else against(difference(group, base, path, name))
    small = "".join(f"<small>{part}</small>" for part in (beside, *change) if part)
    return f"<td>{number(mean, digits)}{small}</td>"


def against(found: Estimate | None) -> list[str]:
    """A change in percent, and where it lies."""
    if found is None or not found.base:
        return []
    value, low, high = found.percent
    return [f"{number(value, '+.1f')} %"] + ([] if math.isnan(low) else [f"{number(low, '+.1f')} to {number(high, '+.1f')}"])


def paper_table(table: Sequence[Beside]) -> str:
    """The paper's configurations with our numbers beside its own."""
    if not table:
        return ""
    lines: list[str] = []
    for row in table:
        kind = ' class="chosen"' if (row.weight, row.sigma_sq) == conclusions.CHOSEN else ""
        cells = [
            f"{number(row.phi, '+.1f')} %",
            ours(row.own_phi),
            ours(row.own_excess),
            f"{number(row.error, '+.1f')} %",
            ours(row.own_error),
        ]
        cells += [NOTHING if value is None else f"{number(value, '.1f')} %" for value in (row.loss, row.own_loss)]
        told = "".join(f"<td{kind}>{value}</td>" for value in cells)
        lines.append(f"<tr><td{kind}>{row.weight:g}, {row.sigma_sq:g}</td>{told}</tr>")
    heads = ("weight, sigma²", "mean |phi|, paper", "here", "its excess, here", "error, paper", "here", "loss added, paper", "here")
    head = "".join(f"<th>{words}</th>" for words in heads)
    low, high = conclusions.SOLO_LOSS
    told = (
        f"Changes against solo. The paper's are of {conclusions.SETTING}; its solo SAE adds {low} to {high} % to the loss. "
        "Mean |phi| has a floor that depends on the number of tokens, so its changes are of different things; the excess has none."
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div><p>{text(told)}</p>'


def ours(found: Estimate | None) -> str:
    """Our change, if there is one."""
    value, *interval = against(found) or [NOTHING]
    return value + "".join(f"<small>{part}</small>" for part in interval)


def pictures(drawn: Mapping[str, Figure]) -> str:
    """The figures."""
    made = "".join(f"<figure>{svg(figure)}<figcaption>{text(CAPTIONS[name])}</figcaption></figure>" for name, figure in drawn.items())
    return f'<div class="figures">{made}</div>' if made else ""


def browser(latents: list[dict[str, Any]]) -> str:
    """Where the script puts latents."""
    if not latents:
        return ""
    options = "".join(f'<option value="{key}">{words}</option>' for key, words in ORDERS.items())
    return (
        '<div class="controls"><label>SAE<select id="arm"></select></label>'
        '<label class="wide">Search<input id="search" type="search" placeholder="text, or a latent\'s number" autocomplete="off"></label>'
        f'<label>Order<select id="sort">{options}</select></label></div>'
        '<p id="count" aria-live="polite">The list needs JavaScript.</p><div id="list"></div>'
        '<button id="more" type="button" hidden>More</button>'
    )


def packed(latents: list[dict[str, Any]]) -> str:
    """What the script reads: letters that mean nothing to HTML."""
    if not latents:
        return ""
    data = gzip.compress(json.dumps(latents, separators=(",", ":")).encode(), mtime=0)
    return f'<script type="text/plain" id="latents">{base64.b64encode(data).decode()}</script>'


def measured(arms: Sequence[Arm]) -> str:
    """On what, by which thresholds, with which versions."""
    entries = {arm.name: arm.entry for arm in arms if arm.entry is not None}
    if not entries:
        return ""
    first = next(iter(entries.values()))
    lines = [
        f"{first.get('tokens', 0):,} test tokens of {first.get('documents', 0):,} held-out documents, at {first.get('hook')}.",
        "Thresholds: " + "; ".join(dict.fromkeys(rule(entry) for entry in entries.values())) + ".",
        f"Settings: {json.dumps(first.get('settings'))}.",
        f"Text: {json.dumps(first.get('data'))}.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in (first.get('versions') or {}).items())}.",
    ]
    trained = [f"{arm.name} on {arm.record['validation']['tokens']:,}" for arm in arms if "tokens" in arm.record.get("validation", {})]
    lines += [f"Tokens trained on: {', '.join(trained)}."] if trained else []
    return items(lines)
