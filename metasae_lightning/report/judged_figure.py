"""The figure of paired latents: the scores of one arm's latents against those of their partners in another arm."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metasae_lightning.report.figure_files import INK, STYLE
from metasae_lightning.report.figures import COLOURS, short_name
from metasae_lightning.report.judged_scores import ORDER, label, number
from metasae_lightning.report.load_runs import Arm
from metasae_lightning.report.number_format import format_number
from metasae_lightning.report.seeds import Group, difference_over_pairs, is_arm_of

MAX_PANELS = 6
Points = list[tuple[float, float]]


def pair_scores(base: Arm, compared: Arm) -> dict[str, Points]:
    """For each score, the values of each pair of latents in `base` and in `compared`; empty if the arms were not paired."""
    against = (compared.judging or {}).get("against") or {}
    if base.judged is None or compared.judged is None or not is_arm_of(against, base):
        return {}
    points: dict[str, Points] = {}
    latents = base.judged.get("latents") or {}
    for latent in (compared.judged.get("latents") or {}).values():
        partner = latents.get(str((latent.get("pair") or {}).get("latent"))) or {}
        for name, value in (latent.get("scores") or {}).items():
            x, y = number((partner.get("scores") or {}).get(name)), number(value)
            if np.isfinite([x, y]).all():
                points.setdefault(name, []).append((x, y))
    return {name: points[name] for name in [*ORDER, *points] if name in points}


def scatter(arms: Sequence[Arm]) -> Figure | None:
    """A figure with a panel for each of the first six scores: pairs of latents, the first arm across, the second up; None without pairs."""
    points = pair_scores(*arms) if len(arms) == 2 else {}
    if not points:
        return None
    base, compared = arms
    names = list(points)[:MAX_PANELS]
    rows, columns = -(-len(names) // 2), min(len(names), 2)
    with mpl.rc_context({**STYLE, "axes.titlesize": 10}):
        figure = Figure(figsize=(2.9 * columns, 3.1 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, name in zip(panels, names, strict=False):
            draw_pairs(axes, points[name])
            axes.set_title(f"{label(name)}\n{mean_difference(base, compared, name, points[name])}")
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        figure.supxlabel(short_name(base.name), fontsize=11)
        figure.supylabel(short_name(compared.name), fontsize=11)
    return figure


def draw_pairs(axes: Any, points: Points) -> None:
    """Draw a circle for each pair of one score, one larger circle for equal pairs, and the diagonal."""
    counts = Counter(points)
    x, y = zip(*counts, strict=True)
    low, high = min(*x, *y), max(*x, *y)
    margin = 0.08 * (high - low) or 0.1
    ends = [low - margin, high + margin]
    axes.plot(ends, ends, color=INK, linewidth=0.8)
    axes.scatter(x, y, s=[28 * count for count in counts.values()], color=COLOURS[1], alpha=0.55, linewidths=0)
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(4))


def mean_difference(base: Arm, compared: Arm, name: str, points: Points) -> str:
    """The mean difference over pairs with its interval, from `evaluation.json`; from the points, without an interval, if it has none."""
    pairs = difference_over_pairs(Group("", [compared]), Group("", [base]), f"judging/{name}") or {}
    value = number(pairs.get("value")) if pairs else sum(y - x for x, y in points) / len(points)
    ends = [number(pairs.get(end)) for end in ("low", "high")]
    interval = f" ({format_number(ends[0], '+.3f')} to {format_number(ends[1], '+.3f')})" if np.isfinite(ends).all() else ""
    return f"{format_number(value, '+.3f')}{interval}"
