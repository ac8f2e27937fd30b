"""The plots of a report as SVG: text stays text, and colours are CSS variables with a printable value.

Arms differ in dash and marker besides colour, phases in their number, so nothing is lost in grey. Drawn for a width of
400 px, so that text stays readable on a phone.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from numpy.typing import NDArray

from lightning_estdgm.tools.report.compare import Comparison
from lightning_estdgm.tools.report.runs import Kind, Run
from lightning_estdgm.tools.report.words import Units, number

__all__ = ["COLOURS", "Plot", "draw", "units_of"]

COLOURS = {
    "ink": ("#1c2733", "#e8edf2"),
    "muted": ("#5b6875", "#a3b0bd"),
    "grid": ("#dfe5ea", "#36424e"),
    "paper": ("#fefefe", "#182028"),
    "arm-0": ("#33475b", "#b9c9d9"),
    "arm-1": ("#d9640d", "#f59a4c"),
    "arm-2": ("#0d8f86", "#3cc9bd"),
    "arm-3": ("#7d3fe0", "#b794f6"),
    "arm-4": ("#a8127a", "#f07cc8"),
    "phase-0": ("#fbe8c8", "#4a3a1c"),
    "phase-1": ("#d3e4f5", "#1f3a52"),
    "phase-2": ("#d7eed9", "#21452b"),
    "phase-3": ("#e9dcf6", "#3c2c52"),
}
"""Name of the CSS variable: value in light (and on paper), value in dark."""

_DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (2.5, 2.5)))
_MARKERS = ("o", "s", "^", "D", "v")
_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\")
_WIDTH_IN = 3.55
_MAX_POINTS = 300

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lightning_estdgm",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # measured with this one, the widest; shown with the page's own
    "font.size": 9,
    "hatch.linewidth": 0.8,
}


@dataclass(frozen=True)
class Plot:
    """One plot: what it shows in a title, in a sentence, and in words for who cannot see it."""

    name: str
    title: str
    caption: str
    alt: str
    svg: str


def units_of(comparison: Comparison) -> Units:
    """The units that fit the largest of the runs."""
    runs = [run for arm in comparison.arms for run in arm.runs]
    return Units.of(max(run.joules or 0.0 for run in runs), max(run.seconds for run in runs))


def draw(comparison: Comparison) -> list[Plot]:
    """Metric over joules, watts over time with the phases shaded, joules by phase; each where there is data for it."""
    units = units_of(comparison)
    with mpl.rc_context():
        mpl.rcdefaults()  # a report looks the same whatever the user's own matplotlibrc says
        mpl.rcParams.update(_STYLE)
        plots = [
            _metric_over_joules(comparison, units),
            _watts_over_time(comparison, units),
            _joules_by_phase(comparison, units),
        ]
    return [plot for plot in plots if plot is not None]


def _metric_over_joules(comparison: Comparison, units: Units) -> Plot | None:
    target = comparison.target
    if target is None:
        return None
    figure, axes = _figure(2.75)
    drawn: list[NDArray[np.float64]] = []
    ends = []
    for i, (arm, runs) in enumerate(comparison.members.items()):
        for n, run in enumerate(runs):
            curve = run.metrics[target.metric].finite()
            x = run.joules.along(curve.steps) / units.energy.size
            shown = np.flatnonzero(np.isfinite(x))
            if not len(shown):
                continue
            shown = shown[_thin(len(shown))]
            x, y = x[shown], curve.values[shown]
            drawn.append(y)
            few = len(x) <= 30
            axes.plot(
                x,
                y,
                color=_arm(i),
                ls=_DASHES[i % len(_DASHES)],
                marker=_MARKERS[i % len(_MARKERS)] if few else None,
                ms=3.5,
                lw=1.6 if n == 0 else 1.0,
                alpha=1.0 if n == 0 else 0.55,
                label=_short(arm) if n == 0 else None,
            )
        result = next(each for each in comparison.arms if each.name == arm)
        reached = sum(run.reached is not None for run in result.runs)
        ends.append(f"{arm}: {reached} of {len(result.runs)} runs reached {target}")
    if not drawn:
        return None
    every = np.concatenate(drawn)
    axes.axhline(target.value, color=COLOURS["muted"][0], lw=1, ls=(0, (2, 2)))
    axes.annotate(
        f"target {target.value:.4g}", (0, target.value), (3, 3), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="left", va="bottom", color=COLOURS["muted"][0], fontsize=8.5,
    )  # fmt: skip
    # The first values of a loss are far above the rest, and would flatten what the plot is about.
    if target.mode == "min":
        low, high = min(float(every.min()), target.value), max(float(np.quantile(every, 0.9)), target.value)
    else:
        low, high = min(float(np.quantile(every, 0.1)), target.value), max(float(every.max()), target.value)
    margin = 0.08 * (high - low) or 1e-3
    axes.set_ylim(low - margin, high + margin)
    how = _how(comparison)
    _style(axes, f"energy since the start, {units.energy.name}{how}", target.metric)
    _legend(figure, axes)
    title = f"{target.metric} over energy{how}"
    caption = (
        "Each mark or line joins a logged value to the joules used until that step. "
        "Where an arm has several runs, the first is drawn in full and the others faintly."
    )
    return _plot(figure, "metric", title, caption, ends)


def _watts_over_time(comparison: Comparison, units: Units) -> Plot | None:
    arms = comparison.members
    series = {arm: next((s for run in runs if len((s := _power(run))[0]) > 1), None) for arm, runs in arms.items()}
    shown = {arm: s for arm, s in series.items() if s is not None}
    if not shown:
        return None
    size = units.time.size
    figure = _canvas(0.75 + 1.25 * len(shown))
    panels = figure.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    phases: list[str] = []
    words = []
    how = _how(comparison)
    for axes, (arm, (clock, watts)) in zip(panels, shown.items(), strict=True):
        i = list(arms).index(arm)
        run = next(run for run in arms[arm] if len(_power(run)[0]) > 1)
        for start, end, name in _spans(run):
            if name not in phases:
                phases.append(name)
            n = phases.index(name)
            axes.axvspan(start / size, end / size, color=_phase(n), lw=0)
            axes.annotate(
                str(n + 1), ((start + end) / 2 / size, 1), (0, -2), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="center", va="top", fontsize=8, color=COLOURS["muted"][0],
            )  # fmt: skip
        axes.step(clock / size, watts, where="pre", color=_arm(i), lw=1.3)
        axes.set_title(_short(arm), loc="left", fontsize=9, color=COLOURS["ink"][0], pad=3)
        _style(axes, "", "watts")
        mean_w, long = number(float(np.mean(watts)), 3), number(clock[-1] / size, 3)
        words.append(f"{arm}: {mean_w} W on average over {long} {units.time.name}")
    top = max(float(np.max(watts)) for _, watts in shown.values())
    panels[0].set_ylim(0, 1.25 * top or 1.0)
    panels[-1].set_xlabel(f"time since the start, {units.time.name}{how}", color=COLOURS["ink"][0])
    if phases:
        figure.legend(
            handles=[Patch(color=_phase(n)) for n in range(len(phases))],
            labels=[f"{n + 1} {name}" for n, name in enumerate(phases)],
            loc="outside lower left", ncols=2, frameon=False, handlelength=1.2, fontsize=8.5,
            labelcolor=COLOURS["ink"][0],
        )  # fmt: skip
    title = f"Watts over time{how}"
    caption = "The first run of each arm: mean watts between one log entry and the next"
    caption += ", with the phases shaded and numbered." if phases else "."
    return _plot(figure, "watts", title, caption, words)


def _joules_by_phase(comparison: Comparison, units: Units) -> Plot | None:
    rows = [
        (arm, phase, joules / units.energy.size)
        for arm, runs in comparison.members.items()
        for phase, joules in _mean_phases(runs)
    ]
    if not rows:
        return None
    figure, axes = _figure(0.75 + 0.27 * len(rows) + 0.12 * len(comparison.members))
    places: list[float] = []
    for before, row in zip([None, *rows], rows, strict=False):
        gap = 1.0 if before is None or before[0] == row[0] else 1.5
        places.append(places[-1] + gap if places else 0.0)
    names = list(comparison.members)
    for i, arm in enumerate(names):
        own = [(place, value) for place, (name, _, value) in zip(places, rows, strict=True) if name == arm]
        if own:
            axes.barh(
                [place for place, _ in own],
                [value for _, value in own],
                height=0.72,
                color=_arm(i),
                hatch=_HATCHES[i % len(_HATCHES)],
                edgecolor=COLOURS["paper"][0],
                lw=0,
                label=_short(arm),
            )
    for place, (_, _, value) in zip(places, rows, strict=True):
        axes.annotate(
            number(value, 3), (value, place), (3, 0), textcoords="offset points", va="center", fontsize=8.5,
            color=COLOURS["ink"][0],
        )  # fmt: skip
    axes.set_yticks(places, [phase for _, phase, _ in rows])
    axes.invert_yaxis()
    how = _how(comparison)
    _style(axes, f"energy, {units.energy.name}{how}", "", grid="x")
    axes.set_xlim(0, 1.18 * max(value for _, _, value in rows) or 1.0)
    axes.tick_params(axis="y", length=0)
    _legend(figure, axes)
    title = f"Energy by phase{how}"
    caption = "Mean over the runs of an arm; validation is in the phase in which it ran."
    return _plot(
        figure,
        "phases",
        title,
        caption,
        [f"{arm}, {phase}: {number(v, 3)} {units.energy.name}" for arm, phase, v in rows],
    )


def _mean_phases(runs: Sequence[Run]) -> list[tuple[str, float]]:
    """Joules by phase, mean over the runs that have it."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for phase, joules in run.energy["by_phase"].items():
            if joules is not None:
                found.setdefault(phase, []).append(joules)
    return [(phase, float(np.mean(values))) for phase, values in found.items()]


def _power(run: Run) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Seconds and mean watts until then, at most `_MAX_POINTS` of them."""
    clock = run.seconds.along(run.watts.steps)
    points = np.stack([clock, run.watts.values], axis=1)[np.isfinite(clock)]
    groups = np.array_split(points, min(len(points), _MAX_POINTS)) if len(points) else []
    return np.array([g[-1, 0] for g in groups]), np.array([g[:, 1].mean() for g in groups])


def _spans(run: Run) -> list[tuple[float, float, str]]:
    """Start and end in seconds, and name, of each stretch of one phase, as far as was logged."""
    index = run.curves.get("dgm/phase")
    names = list((run.method or {}).get("phases") or ())
    if index is None or not names:
        return []
    clock = run.seconds.along(index.steps)
    points = [
        (time, int(number))
        for time, number in zip(clock.tolist(), index.values.tolist(), strict=True)
        if math.isfinite(time) and 0 <= number < len(names)
    ]
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(points)) if a[1] != b[1])]
    end = float(run.seconds.values[-1]) if len(run.seconds.values) else 0.0
    bounds = [0.0, *(points[i][0] for i in starts[1:]), end]
    return [(bounds[n], bounds[n + 1], names[points[i][1]]) for n, i in enumerate(starts)] if points else []


def _thin(count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, min(count, _MAX_POINTS)).round().astype(np.int64))


def _short(arm: str) -> str:
    """An arm's name as far as there is room for it."""
    return arm if len(arm) <= 18 else f"{arm[:17]}…"


def _how(comparison: Comparison) -> str:
    """What a title or an axis adds where not all of it was measured."""
    kinds: set[Kind] = {arm.kind for arm in comparison.arms} & {"estimated", "partly estimated"}
    if not kinds:
        return ""
    return (
        " (estimated)"
        if kinds == {"estimated"} and len({a.kind for a in comparison.arms}) == 1
        else (" (partly estimated)")
    )


# Looks ------------------------------------------------------------------------------------------------------


def _arm(i: int) -> str:
    return COLOURS[f"arm-{i % 5}"][0]


def _phase(i: int) -> str:
    return COLOURS[f"phase-{i % 4}"][0]


def _canvas(height_in: float) -> Figure:
    figure = Figure(figsize=(_WIDTH_IN, height_in), layout=ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04))
    figure.patch.set_visible(False)
    FigureCanvasSVG(figure)
    return figure


def _figure(height_in: float) -> tuple[Figure, Axes]:
    figure = _canvas(height_in)
    return figure, figure.add_subplot()


def _style(axes: Axes, x: str, y: str, grid: Any = "both") -> None:
    axes.patch.set_visible(False)
    axes.set_xlabel(x, color=COLOURS["ink"][0], fontsize=9)
    axes.set_ylabel(y, color=COLOURS["ink"][0], fontsize=9)
    axes.tick_params(labelsize=8.5, colors=COLOURS["muted"][0], labelcolor=COLOURS["ink"][0], length=3)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis=grid, color=COLOURS["grid"][0], lw=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(COLOURS["muted"][0])


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=9, handlelength=2.6,
        labelcolor=COLOURS["ink"][0],
    )  # fmt: skip


def _plot(figure: Figure, name: str, title: str, caption: str, words: Sequence[str]) -> Plot:
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
    for variable, (light, _) in COLOURS.items():
        rest = rest.replace(light, f"var(--{variable}, {light})")
    rest = re.sub(r"'DejaVu Sans'", "var(--sans, 'DejaVu Sans')", rest)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    alt = f"{title}. {'; '.join(words)}."
    svg = f'<svg {spaces} {view[0]} role="img" aria-label="{escape(alt)}">{rest}'.strip()
    return Plot(name, title, caption, alt, svg)
