"""Tables for the terminal, made from saved results."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from metasae_lightning.report.conclusions import FIGURES
from metasae_lightning.report.html_page import printable
from metasae_lightning.report.number_format import format_number
from metasae_lightning.report.seeds import baseline, difference, threshold_rule

if TYPE_CHECKING:
    from metasae_lightning.report.topics import Topics
    from metasae_lightning.report.write import Study

# Rows of the evaluation table: label, `GROUP/NAME` of the figure, its format, and the name of the interval or spread beside it.
ROWS: Sequence[tuple[str, str, str, str]] = (
    ("variance unexplained", "reconstruction/fvu", ".4f", "fvu"),
    ("latents active on a token", "reconstruction/l0", ".2f", "l0"),
    ("unexplained with the head on codes", "head/fvu", ".4f", "head_fvu"),
    ("  change by the head", "head/fvu_change", ".4f", "head_fvu_change"),
    ("cosine", "reconstruction/cosine", ".4f", "cosine"),
    ("length ratio", "reconstruction/l2_ratio", ".4f", ""),
    ("gamma", "reconstruction/gamma", ".4f", ""),
    ("L1", "reconstruction/l1", ".2f", ""),
    ("error, shortest quarter", "reconstruction/error_q1", ".4f", ""),
    ("error, longest quarter", "reconstruction/error_q4", ".4f", ""),
    ("dead latents", "latents/dead", ".2%", ""),
    ("fired on less than 1 in 100,000", "latents/below_1e-05", ".2%", ""),
    ("mean |phi|", "phi/mean_abs", ".3e", ""),
    ("  its floor", "phi/floor", ".3e", ""),
    ("  excess", "phi/excess", ".3e", "phi_excess"),
    ("  pairs above 0.1", "phi/above_0.1", ".4%", ""),
    ("  positive pairs", "phi/positive", ".2%", ""),
    ("nearest decoder row, mean cosine", "decoder/nearest_mean", ".4f", ""),
    ("stable rank of a group, mean", "decoder/stable_rank_mean", ".3f", ""),
    ("  10 % of groups below", "decoder/stable_rank_q10", ".3f", ""),
    ("  median", "decoder/stable_rank_median", ".3f", ""),
    ("  10 % of groups above", "decoder/stable_rank_q90", ".3f", ""),
    ("fresh critic explains", "critic/fve", ".4f", "critic/fve_std"),
    ("  of random rows", "critic/random", ".4f", "critic/random_std"),
    ("  of shuffled rows", "critic/shuffled", ".4f", "critic/shuffled_std"),
    ("features recovered (MCC)", "recovery/mcc", ".4f", ""),
    ("  unique", "recovery/uniqueness", ".4f", ""),
    ("  firings, F1", "recovery/f1", ".4f", ""),
    ("  absorbed", "recovery/absorbed", ".2%", ""),
    ("loss of the model alone", "splice/ce_clean", ".4f", ""),
    ("  with the SAE in it", "splice/ce_sae", ".4f", "ce_sae"),
    ("  recovered against zero", "splice/recovered_zero", ".4f", "recovered_zero"),
    ("  recovered against the mean", "splice/recovered_mean", ".4f", "recovered_mean"),
    ("  KL from the model alone", "splice/kl", ".4f", "kl"),
    ("loss with the SAE and its head in it", "head/ce_sae", ".4f", "head_ce_sae"),
    ("  change by the head", "head/ce_sae_change", ".4f", "head_ce_sae_change"),
    ("  KL from the model alone", "head/kl", ".4f", "head_kl"),
)
# Columns of the overview: `GROUP/NAME` of a figure and a short label.
COLUMNS = {
    **{"phi/excess": "excess |phi|", "reconstruction/fvu": "unexplained", "splice/ce_sae": "loss", "latents/dead": "dead"},
    **{"critic/fve": "fresh critic", "recovery/mcc": "MCC", "recovery/uniqueness": "unique", "recovery/absorbed": "absorbed"},
}
DIFFERENCES = {"fvu": ".4f", "l0": ".2f", "cosine": ".4f", "phi_excess": ".3e", "ce_sae": ".4f", "kl": ".4f"}


def evaluations(entries: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table with a column for each SAE. Intervals are 95 % over documents; after ± comes the standard deviation over critics."""
    first = next(iter(entries.values()))
    title = f"{first['tokens']:,} test tokens of {first['documents']:,} documents"
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("")
    for name in entries:
        table.add_column(escape(name), justify="right")
    table.add_row("thresholds", *(threshold_rule(entry) for entry in entries.values()))
    for words, path, digits, spread in ROWS:
        cells = [cell(entry, path, digits, spread) for entry in entries.values()]
        if any(cells):
            table.add_row(words, *cells)
    return table


def overview(study: "Study") -> Table:
    """A row for each group of arms: means over seeds, and changes against the baseline in percent with their intervals."""
    base = baseline(study.groups)
    table = Table(title=escape(study.title), title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("")
    columns = [figure for figure in FIGURES if figure[1] in COLUMNS and any(group.values(figure[1]) for group in study.groups)]
    for _, path, *_ in columns:
        table.add_column(COLUMNS[path], justify="right")
    for group in study.groups:
        cells: list[str] = []
        for _, path, name, digits, _ in columns:
            values = group.values(path)
            lines = [f"{sum(values) / len(values):{digits}}"] if values else []
            change = None if base is None or group is base else difference(group, base, path, name)
            if change is not None and change.base and not digits.endswith("%"):
                value, low, high = change.percent
                lines += [f"{format_number(value, '+.1f')} %"]
                lines += [] if math.isnan(low) else [f"{format_number(low, '+.1f')} to {format_number(high, '+.1f')}"]
            cells.append("\n".join(lines))
        table.add_row(escape(group.name) + (f"\n{len(group.arms)} seeds" if len(group.arms) > 1 else ""), *cells)
    return table


def cell(entry: Mapping[str, Any], path: str, digits: str, spread: str) -> str:
    """A figure with its interval or standard deviation, which has the name `spread`; empty if the figure was not measured."""
    group, name = path.split("/")
    value = entry["figures"].get(group, {}).get(name)
    if value is None:
        return ""
    if spread in entry["intervals"]:
        low, high = entry["intervals"][spread]
        return f"{value:{digits}} ({low:{digits}} to {high:{digits}})"
    if spread:
        return f"{value:{digits}} ± {entry['figures'][group][spread.split('/')[1]]:{digits}}"
    return f"{value:{digits}}"


def differences(comparison: Mapping[str, Any], names: tuple[str, str]) -> Table:
    """Differences of the second SAE from the first, with intervals and p values."""
    title = f"{names[1]} less {names[0]}, intervals over {comparison['documents']['count']:,} documents"
    table = Table(title=escape(title), title_justify="left", show_edge=False, pad_edge=False)
    for column, justify in (
        ("", "left"),
        (names[0], "right"),
        (names[1], "right"),
        ("difference", "right"),
        ("95 %", "right"),
        ("p", "right"),
    ):
        table.add_column(escape(column), justify=justify)  # pyright: ignore[reportArgumentType]
    for name, digits in DIFFERENCES.items():
        if name in comparison:
            entry = comparison[name]
            low, high = entry["interval"]
            numbers = (entry["a"], entry["b"], entry["difference"])
            p = f"{entry['p']:.3g}" if "p" in entry else ""
            table.add_row(name, *(f"{number:{digits}}" for number in numbers), f"{low:{digits}} to {high:{digits}}", p)
    return table


def cross(best_matches: Mapping[str, Mapping[str, float]], names: tuple[str, str]) -> Table:
    """Distribution over latents of the phi with the best match in the other SAE, beside that by chance."""
    table = Table(title="best match by phi", title_justify="left", show_edge=False, pad_edge=False)
    for column in ("", "median", "10 %", "90 %", "above 0.3", "above 0.5", "above 0.7"):
        table.add_column(column, justify="left" if not column else "right")
    labels = {"a_in_b": f"{names[0]} in {names[1]}", "b_in_a": f"{names[1]} in {names[0]}", "a_in_b_by_chance": "by chance"}
    for key, label in labels.items():
        figures = best_matches[key]
        shares = (f"{figures.get(f'above_{x:g}', 0):.1%}" for x in (0.3, 0.5, 0.7))
        table.add_row(escape(label), *(f"{figures.get(name, float('nan')):.3f}" for name in ("median", "q10", "q90")), *shares)
    return table


def shared(splits: Sequence[Mapping[str, Any]], contexts: Mapping[str, Mapping[str, Any]], title: str, most: int = 5) -> Iterable[Table]:
    """A table for each of the first `most` latents that are split into two of the other SAE: phi of each pair, and top contexts."""
    for split in splits[:most]:
        (left, right), phi = split["into"], split["phi"]
        between = f"at least {split['bound']:.2f} between them, measured {split['phi_between']:.2f}"
        heading = f"{title} {split['latent']} -> {left}, {right}; phi {phi[0]:.2f} and {phi[1]:.2f}: {between}"
        table = Table(title=escape(heading), title_justify="left", show_edge=False, show_header=False)
        for side, latent in (("from", split["latent"]), ("into", left), ("into", right)):
            for hit in contexts[side].get(str(latent), []):
                table.add_row(str(latent), escape(hit["text"]))
        yield table


def merged_topics(name: str, merged: "Topics") -> Table:
    """The topics of one arm: their latents, coherence with its level of chance, and words."""
    title = f"{name}: {len(merged.topics)} topics. Coherence {merged.coherence:.3f}, of words of like frequency {merged.chance:.3f}; "
    title += f"diversity {merged.diversity:.1%}"
    table = Table(title=escape(title), title_justify="left", show_edge=False, pad_edge=False)
    for column in ("latents", "coherence", "chance", "words"):
        table.add_column(column, justify="left" if column == "words" else "right")
    for topic in merged.topics:
        numbers = (format_number(value, ".2f") for value in (topic.coherence, topic.chance))
        table.add_row(f"{len(topic.latents):,}", *numbers, escape(printable(" ".join(topic.words))))
    return table
