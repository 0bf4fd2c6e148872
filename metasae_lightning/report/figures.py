"""Figures of a study, each as SVG in the page's own colours and as PNG."""

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

# Of Okabe and Ito, legible to the colour-blind, on white and on black; the first is the baseline's.
COLOURS = ("#7f7f7f", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#a6761d", "#9467bd", "#66a61e")
MARKERS = "osD^vP*X<>"
# Stands for the text's colour until the figure is written.
INK = "#010203"
STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor"), INK),
    **{"font.size": 11, "axes.titlesize": 11, "axes.grid": True, "grid.alpha": 0.25, "grid.color": INK, "svg.fonttype": "none"},
    **{"legend.frameon": False, "legend.fontsize": 9.5, "figure.facecolor": "none", "axes.facecolor": "none", "svg.hashsalt": "metasae"},
    **{"font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False},
}
# What names may hold no legend could.
LONGEST = 28
MOST_IN_LEGEND = 10


def drawn(groups: Sequence[Group]) -> dict[str, Figure]:
    """Every figure that there is something to draw in."""
    with mpl.rc_context(STYLE):
        found = {
            **{"tradeoff": tradeoff(groups), "phi": phi(groups), "decoder": decoder(groups), "critic": critic(groups)},
            **{"latents": latents(groups), "recovery": recovery(groups), "training": training(groups)},
        }
    return {name: figure for name, figure in found.items() if figure is not None}


def svg(figure: Figure, *, alone: bool = False) -> str:
    """A figure as SVG: for a page, in the page's text colour and without a size; or `alone`, as a file."""
    source = svg_source(figure)
    if alone:
        return source.replace(INK, "black")
    element = source[source.index("<svg") :].replace(INK, "currentColor")
    for size in ("width", "height"):
        element = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", element, count=1)
    return re.sub(r'<g id="[^"]*"', "<g", element)  # several of them are in one page


def svg_source(figure: Figure) -> str:
    """The SVG that matplotlib writes. It is stored on the figure, since a report needs it for the page and for a file."""
    source = getattr(figure, "metasae_svg", None)
    if source is None:
        text = io.StringIO()
        with mpl.rc_context(STYLE):
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        source = text.getvalue()
        setattr(figure, "metasae_svg", source)  # noqa: B010
    return source


def save(figure: Figure, path: Path) -> None:
    """A figure as PNG, black on white, for papers and slides."""
    with mpl.rc_context(STYLE):
        figure.savefig(path, format="png", dpi=200, facecolor="white")


def plot(columns: int = 1, rows: int = 1, height: float = 3.6) -> tuple[Figure, Any]:
    """A figure of its own, unknown to pyplot, and its axes."""
    figure = Figure(figsize=(5.2 * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def look(place: int) -> dict[str, Any]:
    """Colour and marker of a group."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def short(name: str) -> str:
    """A name that fits beside a line."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def logarithmic(*of: Any) -> None:
    """Axes in powers, with numbers that need no mathematics to be set: names may hold a dollar."""
    for axis in of:
        getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def explain(axes: Any) -> None:
    """A legend, where it can be read."""
    handles, labels = axes.get_legend_handles_labels()
    if 1 < len(labels) <= MOST_IN_LEGEND:
        axes.legend(handles, labels)


def tradeoff(groups: Sequence[Group]) -> Figure | None:
    """What less co-firing costs: a point an arm, with its interval over documents."""
    if not any(group.values("phi/excess") and group.values("reconstruction/fvu") for group in groups):
        return None
    costs = {"reconstruction/fvu": ("variance unexplained", "fvu")}
    if any(group.values("splice/ce_added") or group.values("splice/ce_sae") for group in groups):
        costs["splice/ce_sae"] = ("loss of the model with the SAE in it", "ce_sae")
    figure, panels = plot(columns=1, rows=len(costs))
    for axes, (path, (words, interval)) in zip(panels, costs.items(), strict=True):
        for place, group in enumerate(groups):
            arms = [arm for arm in group.arms if arm.figure(path) is not None and arm.figure("phi/excess") is not None]
            if not arms:
                continue
            x, y = ([arm.figure(of) for arm in arms] for of in (path, "phi/excess"))
            across, up = ([around(arm, name, of) for arm in arms] for name, of in ((interval, path), ("phi_excess", "phi/excess")))
            bars = {"xerr": np.array(across).T, "yerr": np.array(up).T, "elinewidth": 0.6, "alpha": 0.9, "linestyle": "none"}
            axes.errorbar(x, y, label=short(group.name), markersize=6, **bars, **look(place))
        axes.set(xlabel=words, ylabel="excess of mean |phi|")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        explain(axes)
    return figure


def around(arm: Arm, name: str, path: str) -> tuple[float, float]:
    """How far down and up the interval of a figure goes."""
    value, interval = arm.figure(path), ((arm.entry or {}).get("intervals") or {}).get(name)
    if value is None or not interval or None in interval:
        return 0.0, 0.0
    return max(value - interval[0], 0.0), max(interval[1] - value, 0.0)


def phi(groups: Sequence[Group]) -> Figure | None:
    """How |phi| is spread over pairs, and what each group has more or less of than the first."""
    spreads = {group.name: share for group in groups if (share := shares(group, "phi/log10_abs", "pairs")) is not None}
    if not spreads:
        return None
    figure, panels = plot(rows=2 if len(spreads) > 1 else 1)
    places = {group.name: place for place, group in enumerate(groups)}
    (edges, first), *others = spreads.values()
    for name, (_, share) in spreads.items():
        panels[0].stairs(100 * share, 10.0 ** np.array(edges), label=short(name), color=look(places[name])["color"], linewidth=1.4)
    panels[0].set(xlabel="|phi|", ylabel="% of pairs")
    logarithmic(panels[0].xaxis, panels[0].yaxis)
    explain(panels[0])
    if others:
        for name, (_, share) in list(spreads.items())[1:]:
            colour = look(places[name])["color"]
            panels[1].stairs(100 * (share - first), 10.0 ** np.array(edges), label=short(name), color=colour, linewidth=1.4)
        panels[1].axhline(0, color=INK, linewidth=0.8)
        panels[1].set(xlabel="|phi|", ylabel=f"% of pairs, less {short(next(iter(spreads)))}")
        logarithmic(panels[1].xaxis)
        explain(panels[1])
    return figure


def shares(group: Group, path: str, counts: str) -> tuple[list[float], Any] | None:
    """A histogram as shares, the mean over a group's arms."""
    found = [one for arm in group.arms if (one := arm.histogram(path, counts)) is not None and sum(one[1])]
    if not found:
        return None
    return found[0][0], np.mean([np.array(counts) / sum(counts) for _, counts in found], axis=0)


def decoder(groups: Sequence[Group]) -> Figure | None:
    """How near each decoder row's nearest neighbour is."""
    found = {group.name: share for group in groups if (share := shares(group, "decoder/nearest", "rows")) is not None}
    if not found:
        return None
    figure, (axes,) = plot()
    for place, group in enumerate(groups):
        if group.name in found:
            edges, share = found[group.name]
            axes.stairs(100 * share, edges, label=short(group.name), color=look(place)["color"], linewidth=1.4)
    axes.set(xlabel="cosine with the nearest other decoder row", ylabel="% of latents")
    explain(axes)
    return figure


def critic(groups: Sequence[Group]) -> Figure | None:
    """What fresh critics explain of each decoder, beside both nulls."""
    shown = [(place, group) for place, group in enumerate(groups) if group.values("critic/fve")]
    if not shown:
        return None
    figure, (axes,) = plot(height=1.6 + 0.35 * len(shown))
    kinds = {"fve": ("the decoder", "o", 1.0), "shuffled": ("shuffled rows", "|", 0.7), "random": ("random rows", "x", 0.7)}
    for line, (place, group) in enumerate(shown):
        for name, (words, marker, alpha) in kinds.items():
            means, spread = group.values(f"critic/{name}"), group.values(f"critic/{name}_std")
            bars = {"xerr": spread if len(spread) == len(means) else None, "elinewidth": 1.0, "linestyle": "none", "alpha": alpha}
            label = words if not line else None
            axes.errorbar(means, [line] * len(means), marker=marker, markersize=7, color=look(place)["color"], label=label, **bars)
    axes.set_yticks(range(len(shown)), [short(group.name) for _, group in shown])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set(xlabel="share of the rows' variance that a fresh critic explains", ylim=(len(shown) - 0.5, -0.5))
    explain(axes)
    return figure


def latents(groups: Sequence[Group]) -> Figure | None:
    """How often latents fire; what never fired is in the legend."""
    path = "latents/log10_density"
    found = [(place, group, share) for place, group in enumerate(groups) if (share := shares(group, path, "latents")) is not None]
    if not found:
        return None
    figure, (axes,) = plot()
    for place, group, (edges, share) in found:
        dead = group.values("latents/dead")
        label = f"{short(group.name)}: {sum(dead) / len(dead):.1%} dead" if dead else short(group.name)
        axes.stairs(100 * share, 10.0 ** np.array(edges), label=label, color=look(place)["color"], linewidth=1.4)
    axes.set(xlabel="share of tokens that a latent fires on", ylabel="% of live latents")
    logarithmic(axes.xaxis)
    explain(axes)
    return figure


def recovery(groups: Sequence[Group]) -> Figure | None:
    """How well planted features are found."""
    paths = {"recovery/mcc": "MCC", "recovery/uniqueness": "unique", "recovery/f1": "F1"}
    shown = [(place, group) for place, group in enumerate(groups) if group.values("recovery/mcc")]
    if not shown:
        return None
    figure, (axes,) = plot()
    for step, (place, group) in enumerate(shown):
        for line, path in enumerate(paths):
            values = group.values(path)
            at = [line + 0.6 * (step + 0.5) / len(shown) - 0.3] * len(values)
            axes.plot(at, values, linestyle="none", label=short(group.name) if not line else None, markersize=6, alpha=0.8, **look(place))
    axes.set_xticks(range(len(paths)), list(paths.values()))
    axes.set(ylabel="1 is perfect")
    explain(axes)
    return figure


def training(groups: Sequence[Group]) -> Figure | None:
    """What was logged on the way."""
    curves = {
        "train/fvu": "variance unexplained",
        "val/fvu": "the same, held out",
        "train/dead": "share of latents dead",
    }
    penalties = sorted({name for group in groups for arm in group.arms for name in arm.curves if name.startswith("penalty/")})
    curves |= {name: f"penalty {short(name.removeprefix('penalty/'))}" for name in penalties}
    # A line needs two points.
    shown = [name for name in curves if any(len(arm.curves.get(name, ())) > 1 for group in groups for arm in group.arms)]
    if not shown:
        return None
    figure, panels = plot(rows=len(shown), height=2.7)
    for axes, name in zip(panels, shown, strict=True):
        for place, group in enumerate(groups):
            for number, arm in enumerate(arm for arm in group.arms if name in arm.curves):
                x, y = zip(*arm.curves[name], strict=True)
                label = short(group.name) if not number else None
                axes.plot(x, y, label=label, color=look(place)["color"], linewidth=1.3, alpha=1.0 if not number else 0.5)
        axes.set(xlabel="tokens", ylabel=curves[name])
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
        explain(axes)
    return figure
