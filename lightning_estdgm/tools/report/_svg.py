"""Plots as SVG for a page: text stays text, and colours are CSS variables with a printable value."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from lightning_estdgm.tools._plotting import COLOURS, GRID, INK, MUTED, PAPER, PHASE_COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


PALETTE = {
    "ink": (INK, "#e8edf2"),
    "muted": (MUTED, "#a3b0bd"),
    "grid": (GRID, "#36424e"),
    "paper": (PAPER, "#182028"),
    "arm-0": (COLOURS[0], "#b9c9d9"),
    "arm-1": (COLOURS[1], "#f59a4c"),
    "arm-2": (COLOURS[2], "#3cc9bd"),
    "arm-3": (COLOURS[3], "#b794f6"),
    "arm-4": (COLOURS[4], "#f07cc8"),
    "phase-0": (PHASE_COLOURS[0], "#4a3a1c"),
    "phase-1": (PHASE_COLOURS[1], "#1f3a52"),
    "phase-2": (PHASE_COLOURS[2], "#21452b"),
    "phase-3": (PHASE_COLOURS[3], "#3c2c52"),
}
"""Value in light (and on paper) and value in dark, by the name of the CSS variable."""

SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lightning_estdgm",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # measured with this one, the widest; shown with the page's own
    "font.size": 9,
    "hatch.linewidth": 0.8,
}
"""Settings of matplotlib while plots are drawn."""

_WIDTH_IN = 3.55


@dataclass(frozen=True)
class Plot:
    """One plot with its texts.

    Attributes:
        name: Prefix of the ids in the SVG.
        title: Title.
        caption: Sentence below it.
        alt: Text for those who cannot see it.
        svg: The SVG element.
    """

    name: str
    title: str
    caption: str
    alt: str
    svg: str


def arm_colour(i: int) -> str:
    """Colour of the i-th arm."""
    return PALETTE[f"arm-{i % 5}"][0]


def phase_colour(i: int) -> str:
    """Colour of the i-th phase."""
    return PALETTE[f"phase-{i % 4}"][0]


def new_canvas(height_in: float) -> Figure:
    """A transparent figure as wide as a plot of the page: 400 px, so that text stays readable on a phone."""
    figure = new_figure(_WIDTH_IN, height_in, pad_in=0.04)
    figure.patch.set_visible(False)
    return figure


def legend_above(figure: Figure, axes: Axes) -> None:
    """Add a legend above the axes."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=9, handlelength=2.6,
        labelcolor=INK,
    )  # fmt: skip


def plot_of(figure: Figure, name: str, title: str, caption: str, words: Sequence[str]) -> Plot:
    """Inline SVG: no fixed size, no metadata, ids of its own, colours by variable."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head, rest = text.split(">", 1)
    view = re.search(r'viewBox="[^"]+"', head)
    assert view is not None
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    rest = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", rest)
    for variable, (light, _) in PALETTE.items():
        rest = rest.replace(light, f"var(--{variable}, {light})")
    rest = re.sub(r"'DejaVu Sans'", "var(--sans, 'DejaVu Sans')", rest)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    alt = f"{title}. {'; '.join(words)}."
    svg = f'<svg {spaces} {view[0]} role="img" aria-label="{escape(alt)}">{rest}'.strip()
    return Plot(name, title, caption, alt, svg)
