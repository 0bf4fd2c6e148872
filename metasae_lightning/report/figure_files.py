"""A figure as an element of the page, in the page's colours, as an SVG file, and as a PNG file."""

import io
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

# Placeholder for the text colour, replaced when a figure is written.
INK = "#010203"
STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor"), INK),
    **{"font.size": 11, "axes.titlesize": 11, "axes.grid": True, "grid.alpha": 0.25, "grid.color": INK, "svg.fonttype": "none"},
    **{"legend.frameon": False, "legend.fontsize": 9.5, "figure.facecolor": "none", "axes.facecolor": "none", "svg.hashsalt": "metasae"},
    **{"font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False},
}


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
