"""Figures of a report, each as SVG in the colours of the page and as PNG. A figure that no arm has data for is None."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from metasae_lightning.report.load_runs import Arm
from metasae_lightning.report.seeds import Group

# The palette of Okabe and Ito, legible to the colour-blind on white and on black. The first colour is the baseline's.
COLOURS = ("#7f7f7f", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#a6761d", "#9467bd", "#66a61e")
MARKERS = "osD^vP*X<>"
# Placeholder for the text colour, replaced when a figure is written.
INK = "#010203"
STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor"), INK),
    **{"font.size": 11, "axes.titlesize": 11, "axes.grid": True, "grid.alpha": 0.25, "grid.color": INK, "svg.fonttype": "none"},
    **{"legend.frameon": False, "legend.fontsize": 9.5, "figure.facecolor": "none", "axes.facecolor": "none", "svg.hashsalt": "metasae"},
    **{"font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False},
}
# Characters of a name and entries of a legend at most, so that both fit.
MAX_NAME = 28
MAX_IN_LEGEND = 10


def draw_all(groups: Sequence[Group]) -> dict[str, Figure]:
    """Every figure that has data, by name."""
    with mpl.rc_context(STYLE):
        drawn = {
            **{"tradeoff": tradeoff(groups), "phi": phi(groups), "decoder": decoder(groups), "critic": critic(groups)},
            **{"latents": latents(groups), "recovery": recovery(groups), "training": training(groups)},
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def svg_source(figure: Figure) -> str:
    """A figure as SVG with a placeholder for the text colour: the input of `svg_file` and `svg_element`."""
    text = io.StringIO()
    with mpl.rc_context(STYLE):
        fix_layout(figure)
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return text.getvalue()


def svg_file(source: str) -> str:
    """The SVG as a file of its own, with black text."""
    return source.replace(INK, "black")


def svg_element(source: str) -> str:
    """The SVG as an element of a page, in the page's text colour and without width, height and ids of groups."""
    element = source[source.index("<svg") :].replace(INK, "currentColor")
    for size in ("width", "height"):
        element = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", element, count=1)
    return re.sub(r'<g id="[^"]*"', "<g", element)  # ids must be unique, and a page has several figures


def save_png(figure: Figure, path: Path) -> None:
    """Save a figure as PNG, black on white, for papers and slides."""
    with mpl.rc_context(STYLE):
        fix_layout(figure)
        figure.savefig(path, format="png", dpi=200, facecolor="white")


def fix_layout(figure: Figure) -> None:
    """Compute the layout and remove its engine. Matplotlib would compute it twice for each file, which takes as long as drawing."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)


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
        add_legend(axes)
    return figure
