"""Figures of a report. A figure that no arm has data for is None."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from metasae_lightning.report.figure_files import INK, STYLE
from metasae_lightning.report.load_runs import Arm
from metasae_lightning.report.seeds import Estimate, Group, baseline, difference, reasons_not_comparable

# The palette of Okabe and Ito, legible to the colour-blind on white and on black. The first colour is the baseline's.
COLOURS = ("#7f7f7f", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#a6761d", "#9467bd", "#66a61e")
MARKERS = "osD^vP*X<>"
# Characters of a name and entries of a legend at most, so that both fit.
MAX_NAME = 28
MAX_IN_LEGEND = 10


def draw_all(groups: Sequence[Group]) -> dict[str, Figure]:
    """Every figure that has data, by name."""
    with mpl.rc_context(STYLE):
        drawn = {
            **{
                "gain": gain(groups),
                "tradeoff": tradeoff(groups),
                "phi": phi(groups),
                "decoder": decoder(groups),
                "critic": critic(groups),
            },
            **{"latents": latents(groups), "recovery": recovery(groups), "training": training(groups)},
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def new_figure(columns: int = 1, rows: int = 1, height: float = 3.6) -> tuple[Figure, Any]:
    """A figure and the flat array of its axes, without pyplot, which would keep the figure in memory."""
    figure = Figure(figsize=(5.2 * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def group_style(index: int) -> dict[str, Any]:
    """Colour and marker of a group."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def short_name(name: str) -> str:
    """A name, shortened to fit into a legend."""
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def set_log_scale(*axes: Any) -> None:
    """Logarithmic axes with plain numbers: math text is off, since names may contain a dollar sign."""
    for axis in axes:
        getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def add_legend(axes: Any) -> None:
    """Add a legend if it has from 2 to `MAX_IN_LEGEND` entries."""
    handles, labels = axes.get_legend_handles_labels()
    if 1 < len(labels) <= MAX_IN_LEGEND:
        axes.legend(handles, labels)


def gain(groups: Sequence[Group]) -> Figure | None:
    """Less co-firing against the variance unexplained that it costs, both in percent of the baseline: a point for each other group."""
    base = baseline(groups)
    changes = {} if base is None else {group.name: change for group in groups if (change := gain_and_cost(group, base)) is not None}
    if base is None or not changes:
        return None
    figure, (axes,) = new_figure(height=3.9)
    index_of = {group.name: index for index, group in enumerate(groups)}
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.plot(0, 0, markersize=9, linestyle="none", **group_style(index_of[base.name]))
    points = {base.name: (0.0, 0.0)}
    for name, (less, cost) in changes.items():
        (x, *x_ends), (y, *y_ends) = cost.percent, less.percent
        bars = {
            "xerr": np.abs(np.nan_to_num([[end - x] for end in x_ends])),
            "yerr": np.abs(np.nan_to_num([[end - y] for end in y_ends[::-1]])),
        }
        axes.errorbar(x, -y, elinewidth=1.2, markersize=9, linestyle="none", **bars, **group_style(index_of[name]))
        points[name] = x, -y
    axes.margins(0.12)
    label_points(axes, points)
    axes.text(0, 1.01, "↖ better", transform=axes.transAxes, alpha=0.8)
    of_base = f"than {short_name(base.name)}"
    axes.set(xlabel=f"cost: % more variance unexplained {of_base}", ylabel=f"gain: fires together % less {of_base}")
    return figure


def label_points(axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Write the names of points beside them; points in one place share a label."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    names: dict[tuple[int, int], list[str]] = {}
    for name, (x, y) in points.items():
        names.setdefault((round(50 * (x - left) / (right - left)), round(50 * (y - bottom) / (top - bottom))), []).append(name)
    for (column, _), members in names.items():
        is_left = column < 30
        text = ", ".join(map(short_name, members[:3])) + (f" and {len(members) - 3} more" if len(members) > 3 else "")
        offset, side = (9 if is_left else -9, 7), "left" if is_left else "right"
        axes.annotate(text, points[members[0]], offset, textcoords="offset points", horizontalalignment=side)


def gain_and_cost(group: Group, base: Group) -> tuple[Estimate, Estimate] | None:
    """Changes of co-firing and of variance unexplained of a group; None for the baseline and without a comparison in percent."""
    if group is base or reasons_not_comparable([*base.arms, *group.arms]):
        return None
    less, cost = difference(group, base, "phi/excess", "phi_excess"), difference(group, base, "reconstruction/fvu", "fvu")
    return (less, cost) if less is not None and cost is not None and less.base and cost.base else None


def tradeoff(groups: Sequence[Group]) -> Figure | None:
    """Co-firing against reconstruction error and loss: a point for each arm, with its intervals over documents."""
    if not any(group.values("phi/excess") and group.values("reconstruction/fvu") for group in groups):
        return None
    costs = {"reconstruction/fvu": ("variance unexplained", "fvu")}
    if any(group.values("splice/ce_added") or group.values("splice/ce_sae") for group in groups):
        costs["splice/ce_sae"] = ("loss of the model with the SAE in it", "ce_sae")
    figure, panels = new_figure(columns=1, rows=len(costs))
    for axes, (path, (words, interval)) in zip(panels, costs.items(), strict=True):
        for index, group in enumerate(groups):
            arms = [arm for arm in group.arms if arm.figure(path) is not None and arm.figure("phi/excess") is not None]
            if not arms:
                continue
            x, y = [arm.figure(path) for arm in arms], [arm.figure("phi/excess") for arm in arms]
            x_errors = np.array([error_bar(arm, interval, path) for arm in arms]).T
            y_errors = np.array([error_bar(arm, "phi_excess", "phi/excess") for arm in arms]).T
            bars = {"xerr": x_errors, "yerr": y_errors, "elinewidth": 0.6, "alpha": 0.9, "linestyle": "none"}
            axes.errorbar(x, y, label=short_name(group.name), markersize=6, **bars, **group_style(index))
        axes.set(xlabel=words, ylabel="excess of mean |phi|")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        add_legend(axes)
    return figure


def error_bar(arm: Arm, name: str, path: str) -> tuple[float, float]:
    """Distances from a measured value to the lower and the upper end of its interval; 0 and 0 if there is no interval."""
    value, interval = arm.figure(path), ((arm.entry or {}).get("intervals") or {}).get(name)
    if value is None or not interval or None in interval:
        return 0.0, 0.0
    return max(value - interval[0], 0.0), max(interval[1] - value, 0.0)


def phi(groups: Sequence[Group]) -> Figure | None:
    """Distribution of |phi| over pairs, and its difference from that of the first group that has one."""
    spreads = {group.name: share for group in groups if (share := shares(group, "phi/log10_abs", "pairs")) is not None}
    if not spreads:
        return None
    figure, panels = new_figure(rows=2 if len(spreads) > 1 else 1)
    index_of = {group.name: index for index, group in enumerate(groups)}
    (edges, first), *others = spreads.values()
    for name, (_, share) in spreads.items():
        panels[0].stairs(
            100 * share, 10.0 ** np.array(edges), label=short_name(name), color=group_style(index_of[name])["color"], linewidth=1.4
        )
    panels[0].set(xlabel="|phi|", ylabel="% of pairs")
    set_log_scale(panels[0].xaxis, panels[0].yaxis)
    add_legend(panels[0])
    if others:
        for name, (_, share) in list(spreads.items())[1:]:
            colour = group_style(index_of[name])["color"]
            panels[1].stairs(100 * (share - first), 10.0 ** np.array(edges), label=short_name(name), color=colour, linewidth=1.4)
        panels[1].axhline(0, color=INK, linewidth=0.8)
        panels[1].set(xlabel="|phi|", ylabel=f"% of pairs, less {short_name(next(iter(spreads)))}")
        set_log_scale(panels[1].xaxis)
        add_legend(panels[1])
    return figure


def shares(group: Group, path: str, counts: str) -> tuple[list[float], Any] | None:
    """Edges of a histogram and the share of each bin, a mean over a group's arms; None if no arm has counts."""
    histograms = [pair for arm in group.arms if (pair := arm.histogram(path, counts)) is not None and sum(pair[1])]
    if not histograms:
        return None
    return histograms[0][0], np.mean([np.array(heights) / sum(heights) for _, heights in histograms], axis=0)


def decoder(groups: Sequence[Group]) -> Figure | None:
    """Distribution of the cosine of each decoder row with its nearest neighbour."""
    spreads = {group.name: share for group in groups if (share := shares(group, "decoder/nearest", "rows")) is not None}
    if not spreads:
        return None
    figure, (axes,) = new_figure()
    for index, group in enumerate(groups):
        if group.name in spreads:
            edges, share = spreads[group.name]
            axes.stairs(100 * share, edges, label=short_name(group.name), color=group_style(index)["color"], linewidth=1.4)
    axes.set(xlabel="cosine with the nearest other decoder row", ylabel="% of latents")
    add_legend(axes)
    return figure


def critic(groups: Sequence[Group]) -> Figure | None:
    """Variance that fresh critics explain of each decoder, of shuffled rows and of random rows."""
    measured = [(index, group) for index, group in enumerate(groups) if group.values("critic/fve")]
    if not measured:
        return None
    figure, (axes,) = new_figure(height=1.6 + 0.35 * len(measured))
    kinds = {"fve": ("the decoder", "o", 1.0), "shuffled": ("shuffled rows", "|", 0.7), "random": ("random rows", "x", 0.7)}
    for line, (index, group) in enumerate(measured):
        for name, (words, marker, alpha) in kinds.items():
            means, spread = group.values(f"critic/{name}"), group.values(f"critic/{name}_std")
            bars = {"xerr": spread if len(spread) == len(means) else None, "elinewidth": 1.0, "linestyle": "none", "alpha": alpha}
            label = words if not line else None
            axes.errorbar(means, [line] * len(means), marker=marker, markersize=7, color=group_style(index)["color"], label=label, **bars)
    axes.set_yticks(range(len(measured)), [short_name(group.name) for _, group in measured])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set(xlabel="share of the rows' variance that a fresh critic explains", ylim=(len(measured) - 0.5, -0.5))
    add_legend(axes)
    return figure


def latents(groups: Sequence[Group]) -> Figure | None:
    """Distribution of firing rates of live latents; the legend has the share of dead ones."""
    path = "latents/log10_density"
    spreads = [(index, group, share) for index, group in enumerate(groups) if (share := shares(group, path, "latents")) is not None]
    if not spreads:
        return None
    figure, (axes,) = new_figure()
    for index, group, (edges, share) in spreads:
        dead = group.values("latents/dead")
        label = f"{short_name(group.name)}: {sum(dead) / len(dead):.1%} dead" if dead else short_name(group.name)
        axes.stairs(100 * share, 10.0 ** np.array(edges), label=label, color=group_style(index)["color"], linewidth=1.4)
    axes.set(xlabel="share of tokens that a latent fires on", ylabel="% of live latents")
    set_log_scale(axes.xaxis)
    add_legend(axes)
    return figure


def recovery(groups: Sequence[Group]) -> Figure | None:
    """Recovery of planted features: MCC, uniqueness and F1."""
    paths = {"recovery/mcc": "MCC", "recovery/uniqueness": "unique", "recovery/f1": "F1"}
    measured = [(index, group) for index, group in enumerate(groups) if group.values("recovery/mcc")]
    if not measured:
        return None
    figure, (axes,) = new_figure()
    for step, (index, group) in enumerate(measured):
        for line, path in enumerate(paths):
            values = group.values(path)
            x = [line + 0.6 * (step + 0.5) / len(measured) - 0.3] * len(values)
            axes.plot(
                x,
                values,
                linestyle="none",
                label=short_name(group.name) if not line else None,
                markersize=6,
                alpha=0.8,
                **group_style(index),
            )
    axes.set_xticks(range(len(paths)), list(paths.values()))
    axes.set(ylabel="1 is perfect")
    add_legend(axes)
    return figure


def training(groups: Sequence[Group]) -> Figure | None:
    """Curves of FVU, dead latents and penalties against tokens, as logged in training."""
    curves = {
        "train/fvu": "variance unexplained",
        "val/fvu": "the same, held out",
        "train/dead": "share of latents dead",
    }
    penalties = sorted({name for group in groups for arm in group.arms for name in arm.curves if name.startswith("penalty/")})
    curves |= {name: f"penalty {short_name(name.removeprefix('penalty/'))}" for name in penalties}
    # A line needs two points.
    curve_names = [name for name in curves if any(len(arm.curves.get(name, ())) > 1 for group in groups for arm in group.arms)]
    if not curve_names:
        return None
    figure, panels = new_figure(rows=len(curve_names), height=2.7)
    for axes, name in zip(panels, curve_names, strict=True):
        for index, group in enumerate(groups):
            for number, arm in enumerate(arm for arm in group.arms if name in arm.curves):
                x, y = zip(*arm.curves[name], strict=True)
                label = short_name(group.name) if not number else None
                axes.plot(x, y, label=label, color=group_style(index)["color"], linewidth=1.3, alpha=1.0 if not number else 0.5)
        axes.set(xlabel="tokens", ylabel=curves[name])
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
        if name == "train/dead":  # the axis of a constant 0 would go below it
            axes.set_ylim(bottom=0)
        add_legend(axes)
    return figure
