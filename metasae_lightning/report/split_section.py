"""The page's section on splits: the texts of a latent, and beside them the texts of the latents that it is split into."""

import math
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from metasae_lightning.report.html_page import html_text, section
from metasae_lightning.report.judged_latents import MAX_EXPLANATION, cut
from metasae_lightning.report.judged_scores import number
from metasae_lightning.report.load_runs import Arm
from metasae_lightning.report.number_format import format_number

# Splits, texts of a latent, tokens before and after the strongest, and characters of a token, at most, to limit the page's size.
MAX_SPLITS, MAX_TEXTS, AROUND, MAX_TOKEN = 12, 5, 20, 40
READING = (
    "On the left a latent of {base}, on the right the latents of {arm} that it is split into. The latent fires on the marked tokens. "
    "Phi is the correlation of firings. Two parts with a large phi with the latent have a phi with each other that is not below a bound."
)


def split_section(base: Arm | None, arms: Sequence[Arm]) -> str:
    """The section on splits, of the first of `arms` that has any; empty if none has."""
    arm = next((arm for arm in arms if (arm.judged or {}).get("splits")), None)
    if arm is None or arm.judged is None:
        return ""
    base_name = base.name if base is not None else "the first arm"
    splits = arm.judged["splits"]
    articles = "".join(split_article(split, base_name, arm.name) for split in splits[:MAX_SPLITS])
    more = f" Shown are {MAX_SPLITS} of {len(splits):,}." if len(splits) > MAX_SPLITS else ""
    reading = READING.format(base=base_name, arm=arm.name) + more
    return section("Splits", f'<p class="note">{html_text(reading)}</p>{articles}', name="splits")


def split_article(split: Mapping[str, Any], base: str, arm: str) -> str:
    """One split: the latent on the left, its parts on the right, and phi below."""
    explanations, contexts = split.get("explanations") or {}, split.get("contexts") or {}
    parts = list(enumerate(split["into"]))
    whole = side(base, split["latent"], explanations.get("latent"), contexts.get("latent"))
    sides = "".join(side(arm, latent, nth(explanations.get("into"), i), nth(contexts.get("into"), i)) for i, latent in parts)
    columns = f'<div class="sides"><div>{whole}</div><div>{sides}</div></div>'
    return f'<article class="split">{columns}<p>{html_text(phi_sentence(split))}</p></article>'


def nth(values: Sequence[Any] | None, index: int) -> Any:
    """The value at an index; None if there is none."""
    return values[index] if values and index < len(values) else None


def side(arm: str, latent: int, explanation: str | None, contexts: Sequence[Mapping[str, Any]] | None) -> str:
    """One latent: its number, explanation and texts."""
    address = f"#latent/{quote(arm, safe='')}/{latent}"
    words = f'<p class="explanation"><bdi>{html_text(cut(explanation, MAX_EXPLANATION))}</bdi></p>' if explanation else ""
    texts = "".join(context_line(context) for context in (contexts or [])[:MAX_TEXTS])
    head = f'<h3><a href="{html_text(address)}">#{latent}</a> <small>{html_text(arm)}</small></h3>'
    return f'<div class="side">{head}{words}<div class="lines">{texts or "no texts"}</div></div>'


def context_line(context: Mapping[str, Any]) -> str:
    """A text with marks on the tokens that the latent fires on, darker for larger activations."""
    tokens, values, middle = context["tokens"], [number(value) for value in context.get("values") or []], int(context.get("at") or 0)
    begin = max(0, middle - AROUND)
    largest = max((value for value in values if math.isfinite(value)), default=0.0)
    shown: list[str] = []
    for index, token in enumerate(tokens[begin : middle + AROUND + 1], begin):
        text = html_text(cut(token.replace("\n", "⏎").replace("\t", "⇥"), MAX_TOKEN))
        value = values[index] if index < len(values) else 0.0
        if value > 0 and largest > 0:
            strength = f"{0.12 + 0.6 * value / largest:.2f}"
            text = f'<mark style="background-color:rgb(var(--hot) / {strength})" title="{value:.2g}">{text}</mark>'
        shown.append(text)
    return f"<p><bdi>{''.join(shown)}</bdi></p>"


def phi_sentence(split: Mapping[str, Any]) -> str:
    """A split's phi in words: of each part with the latent, the bound for the two parts, and the measured phi of the two parts."""
    names = [f"#{latent}" for latent in split["into"]]
    phi = [number(value) for value in split.get("phi") or []]
    of_sides = " and ".join(f"{value:.2f} ({name})" for name, value in zip(names, phi, strict=False))
    bound, between = number(split.get("bound")), number(split.get("phi_between"))
    measured = "" if math.isnan(between) else f" Measured: {format_number(between, '.2f')}."
    return f"Phi with #{split['latent']}: {of_sides}. {bound_phrase(bound)}{measured}"


def bound_phrase(bound: float) -> str:
    """The smallest possible phi of two parts in words. It is rounded down, so that it stays a lower bound.

    >>> bound_phrase(0.1456)
    'The two must fire together with phi of at least 0.14, so they are not disjoint senses.'
    >>> bound_phrase(-0.2)
    'The two can have any phi from -0.20 up, so they may be disjoint senses.'
    """
    if math.isnan(bound):
        return ""
    rounded = math.floor(100 * bound + 1e-9) / 100
    if bound > 0:
        least = f"of at least {rounded:.2f}" if rounded > 0 else "above 0"
        return f"The two must fire together with phi {least}, so they are not disjoint senses."
    return f"The two can have any phi from {rounded:.2f} up, so they may be disjoint senses."
