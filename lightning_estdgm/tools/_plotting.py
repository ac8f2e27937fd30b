"""One style for all figures: colours, figure, axes, legend, saving.

Matplotlib is imported by the functions that draw, so that a module may name a colour without its second of start-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLOURS = ("#33475b", "#d9640d", "#0d8f86", "#7d3fe0", "#a8127a", "#8a6d00", "#2f7d32")
"""Colours of what is compared, the baseline first."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""Markers that tell apart what is compared where colour does not, as in print."""

PHASE_COLOURS = ("#fbe8c8", "#d3e4f5", "#d7eed9", "#e9dcf6")
"""Background of each phase of a schedule."""

INK, MUTED, GRID, PAPER = "#1c2733", "#5b6875", "#dfe5ea", "#fefefe"
"""Colours of text, of axes and notes, of grid lines, of the page."""


def new_figure(width_in: float, height_in: float, pad_in: float = 0.08) -> Figure:
    """A white figure of this size in inches, whose parts make room for each other at least ``pad_in`` apart."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=pad_in, h_pad=pad_in)
    figure = Figure(figsize=(width_in, height_in), dpi=120, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def style_axes(
    axes: Axes, x: str, y: str, title: str = "", grid: Literal["both", "x", "y"] = "both", tick_size: float = 9
) -> None:
    """Label axes, with a grid behind the data and no frame above and to the right of them."""
    if title:
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(labelsize=tick_size, colors=MUTED, labelcolor=INK, length=3)
    axes.grid(axis=grid, color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)


def shade_phases(axes: Axes, spans: Sequence[tuple[float, float, str]]) -> list[str]:
    """Shade (start, end, phase) in the colour of each phase; return the phases in order of first appearance."""
    phases = list(dict.fromkeys(phase for _, _, phase in spans))
    for start, end, phase in spans:
        axes.axvspan(start, end, color=PHASE_COLOURS[phases.index(phase) % len(PHASE_COLOURS)], lw=0)
    return phases


def legend(axes: Axes, where: Literal["best", "center right"] = "best") -> None:
    """Add a legend inside the axes that lets lines below it shine through."""
    axes.legend(loc=where, fontsize=9, frameon=True, framealpha=0.9, edgecolor=GRID, labelcolor=INK)


def save(figure: Figure, path: Path) -> None:
    """Write the PNG, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
