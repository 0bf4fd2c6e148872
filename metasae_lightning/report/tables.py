"""Tables for the terminal, from what was measured; measures nothing itself."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from metasae_lightning.report.conclusions import FIGURES
from metasae_lightning.report.seeds import baseline, difference, rule

# What a table shows of an evaluation: words, the figure, its digits, and which interval or spread stands beside it.
ROWS: Sequence[tuple[str, str, str, str]] = (
    ("variance unexplained", "reconstruction/fvu", ".4f", "fvu"),
    ("latents active on a token", "reconstruction/l0", ".2f", "l0"),
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
)
# What the overview of a study has of a page's figures, in few words.
COLUMNS = {
    **{"phi/excess": "excess |phi|", "reconstruction/fvu": "unexplained", "splice/ce_sae": "loss", "latents/dead": "dead"},
    **{"critic/fve": "fresh critic", "recovery/mcc": "MCC", "recovery/uniqueness": "unique", "recovery/absorbed": "absorbed"},
}
DIFFERENCES = {"fvu": ".4f", "l0": ".2f", "cosine": ".4f", "phi_excess": ".3e", "ce_sae": ".4f", "kl": ".4f"}


def evaluations(entries: Mapping[str, Mapping[str, Any]]) -> Table:
    """SAEs side by side; intervals are 95 % over documents, spreads standard deviations over critics."""
    first = next(iter(entries.values()))
    title = f"{first['tokens']:,} test tokens of {first['documents']:,} documents"
    shown = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    shown.add_column("")
    for name in entries:
        shown.add_column(escape(name), justify="right")
    shown.add_row("thresholds", *(rule(entry) for entry in entries.values()))
    for words, path, digits, beside in ROWS:
        cells = [cell(entry, path, digits, beside) for entry in entries.values()]
        if any(cells):
            shown.add_row(words, *cells)
    return shown


def overview(found: Any) -> Table:
    """Groups of arms: means over their seeds, and changes against the baseline in percent with where they lie; a line each."""
    base = baseline(found.groups)
    shown = Table(title=escape(found.title), title_justify="left", show_edge=False, pad_edge=False)
    shown.add_column("")
    columns = [one for one in FIGURES if one[1] in COLUMNS and any(group.values(one[1]) for group in found.groups)]
    for _, path, *_ in columns:
        shown.add_column(COLUMNS[path], justify="right")
    for group in found.groups:
        cells: list[str] = []
        for _, path, name, digits, _ in columns:
            values = group.values(path)
            lines = [f"{sum(values) / len(values):{digits}}"] if values else []
            change = None if base is None or group is base else difference(group, base, path, name)
            if change is not None and change.base and not digits.endswith("%"):
                value, low, high = change.percent
                lines += [f"{value:+.1f} %"] + ([] if math.isnan(low) else [f"{low:+.1f} to {high:+.1f}"])
            cells.append("\n".join(lines))
        shown.add_row(escape(group.name) + (f"\n{len(group.arms)} seeds" if len(group.arms) > 1 else ""), *cells)
    return shown


def cell(entry: Mapping[str, Any], path: str, digits: str, beside: str) -> str:
    """A figure with what tells how sure it is."""
    group, name = path.split("/")
    value = entry["figures"].get(group, {}).get(name)
    if value is None:
        return ""
    if beside in entry["intervals"]:
        low, high = entry["intervals"][beside]
        return f"{value:{digits}} ({low:{digits}} to {high:{digits}})"
    if beside:
        return f"{value:{digits}} ± {entry['figures'][group][beside.split('/')[1]]:{digits}}"
    return f"{value:{digits}}"


def differences(found: Mapping[str, Any], names: tuple[str, str]) -> Table:
    """What the second does otherwise than the first."""
    title = f"{names[1]} less {names[0]}, intervals over {found['documents']['count']:,} documents"
    shown = Table(title=escape(title), title_justify="left", show_edge=False, pad_edge=False)
    for column, justify in (
        ("", "left"),
        (names[0], "right"),
        (names[1], "right"),
        ("difference", "right"),
        ("95 %", "right"),
        ("p", "right"),
    ):
        shown.add_column(escape(column), justify=justify)  # pyright: ignore[reportArgumentType]
    for name, digits in DIFFERENCES.items():
        if name in found:
            one = found[name]
            low, high = one["interval"]
            numbers = (one["a"], one["b"], one["difference"])
            p = f"{one['p']:.3g}" if "p" in one else ""
            shown.add_row(name, *(f"{number:{digits}}" for number in numbers), f"{low:{digits}} to {high:{digits}}", p)
    return shown


def cross(found: Mapping[str, Mapping[str, float]], names: tuple[str, str]) -> Table:
    """How well each SAE's latents are found in the other."""
    shown = Table(title="best match by phi", title_justify="left", show_edge=False, pad_edge=False)
    for column in ("", "median", "10 %", "90 %", "above 0.3", "above 0.5", "above 0.7"):
        shown.add_column(column, justify="left" if not column else "right")
    words = {"a_in_b": f"{names[0]} in {names[1]}", "b_in_a": f"{names[1]} in {names[0]}", "a_in_b_by_chance": "by chance"}
    for key, label in words.items():
        of = found[key]
        shares = (f"{of.get(f'above_{x:g}', 0):.1%}" for x in (0.3, 0.5, 0.7))
        shown.add_row(escape(label), *(f"{of.get(name, float('nan')):.3f}" for name in ("median", "q10", "q90")), *shares)
    return shown


def shared(splits: Sequence[Mapping[str, Any]], contexts: Mapping[str, Mapping[str, Any]], title: str, most: int = 5) -> Iterable[Table]:
    """Latents that two of the other SAE's share: phi with each, what that forces between them, what is, and where they fire."""
    for split in splits[:most]:
        (left, right), phi = split["into"], split["phi"]
        between = f"at least {split['bound']:.2f} between them, measured {split['phi_between']:.2f}"
        heading = f"{title} {split['latent']} -> {left}, {right}; phi {phi[0]:.2f} and {phi[1]:.2f}: {between}"
        shown = Table(title=escape(heading), title_justify="left", show_edge=False, show_header=False)
        for side, latent in (("from", split["latent"]), ("into", left), ("into", right)):
            for hit in contexts[side].get(str(latent), []):
                shown.add_row(str(latent), escape(hit["text"]))
        yield shown
