"""What the pictures of the benchmarks share: colours, paper, saving."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

__all__ = ["COLOURS", "new_figure", "save"]

COLOURS = ("#33475b", "#d9640d", "#0d8f86", "#7d3fe0", "#a8127a", "#8a6d00", "#2f7d32")


def new_figure(width_in: float, height_in: float) -> Figure:
    """A white figure of this size in inches, whose parts make room for each other."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(width_in, height_in), dpi=120, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write the PNG, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
