"""The plots of a report.

Arms differ in dash and marker besides colour, phases in their number, so nothing is lost in grey.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_estdgm.tools._plotting import INK, MARKERS, MUTED, PAPER, style_axes
from lightning_estdgm.tools._stats import number
from lightning_estdgm.tools.report._comparison import Comparison
from lightning_estdgm.tools.report._finished_run import FinishedRun, Kind
from lightning_estdgm.tools.report._svg import (
    SETTINGS,
    Plot,
    arm_colour,
    legend_above,
    new_canvas,
    phase_colour,
    plot_of,
)
from lightning_estdgm.tools.report._words import Units

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (2.5, 2.5)))
_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\")
_MAX_POINTS = 300


def draw(comparison: Comparison) -> list[Plot]:
    """Draw metric over joules, watts over time with the phases shaded, joules by phase; each where there is data.

    Watts are drawn of arms that were measured.
    """
    import matplotlib as mpl

    units = comparison.units
    with mpl.rc_context():
        mpl.rcdefaults()  # a report looks the same whatever the user's own matplotlibrc says
        mpl.rcParams.update(SETTINGS)
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
    figure = new_canvas(2.75)
    axes = figure.add_subplot()
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
                color=arm_colour(i),
                ls=_DASHES[i % len(_DASHES)],
                marker=MARKERS[i % 5] if few else None,
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
    axes.axhline(target.value, color=MUTED, lw=1, ls=(0, (2, 2)))
    axes.annotate(
        f"target {target.value:.4g}", (0, target.value), (3, 3), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="left", va="bottom", color=MUTED, fontsize=8.5,
    )  # fmt: skip
    # The first values of a loss are far above the rest, and would flatten what the plot is about.
    if target.mode == "min":
        low, high = min(float(every.min()), target.value), max(float(np.quantile(every, 0.9)), target.value)
    else:
        low, high = min(float(np.quantile(every, 0.1)), target.value), max(float(every.max()), target.value)
    margin = 0.08 * (high - low) or 1e-3
    axes.set_ylim(low - margin, high + margin)
    how = _kind_note(comparison)
    _style_axes(axes, f"energy since the start, {units.energy.name}{how}", target.metric)
    legend_above(figure, axes)
    title = f"{target.metric} over energy{how}"
    caption = (
        "Each mark or line joins a logged value to the joules used until that step. "
        "Where an arm has several runs, the first is drawn in full and the others faintly."
    )
    return plot_of(figure, "metric", title, caption, ends)


def _watts_over_time(comparison: Comparison, units: Units) -> Plot | None:
    from matplotlib.patches import Patch

    # Estimated watts are the number of busy cores times a constant: a line that says nothing.
    measured = {arm.name for arm in comparison.arms if arm.kind == "measured"}
    arms = comparison.members
    series = {
        arm: next((s for run in runs if len((s := _power(run))[0]) > 1), None)
        for arm, runs in arms.items()
        if arm in measured
    }
    shown = {arm: s for arm, s in series.items() if s is not None}
    if not shown:
        return None
    size = units.time.size
    figure = new_canvas(0.75 + 1.25 * len(shown))
    panels = figure.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    phases: list[str] = []
    words = []
    for axes, (arm, (clock, watts)) in zip(panels, shown.items(), strict=True):
        i = list(arms).index(arm)
        run = next(run for run in arms[arm] if len(_power(run)[0]) > 1)
        for start, end, name in _spans(run):
            if name not in phases:
                phases.append(name)
            n = phases.index(name)
            axes.axvspan(start / size, end / size, color=phase_colour(n), lw=0)
            axes.annotate(
                str(n + 1), ((start + end) / 2 / size, 1), (0, -2), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="center", va="top", fontsize=8, color=MUTED,
            )  # fmt: skip
        axes.step(clock / size, watts, where="pre", color=arm_colour(i), lw=1.3)
        axes.set_title(_short(arm), loc="left", fontsize=9, color=INK, pad=3)
        _style_axes(axes, "", "watts")
        mean_w, long = number(float(np.mean(watts)), 3), number(clock[-1] / size, 3)
        words.append(f"{arm}: {mean_w} W on average over {long} {units.time.name}")
    top = max(float(np.max(watts)) for _, watts in shown.values())
    panels[0].set_ylim(0, 1.25 * top or 1.0)
    panels[-1].set_xlabel(f"time since the start, {units.time.name}", color=INK)
    if phases:
        figure.legend(
            handles=[Patch(color=phase_colour(n)) for n in range(len(phases))],
            labels=[f"{n + 1} {name}" for n, name in enumerate(phases)],
            loc="outside lower left", ncols=2, frameon=False, handlelength=1.2, fontsize=8.5,
            labelcolor=INK,
        )  # fmt: skip
    caption = "The first run of each arm: mean watts between one log entry and the next"
    caption += ", with the phases shaded and numbered." if phases else "."
    return plot_of(figure, "watts", "Watts over time", caption, words)


def _joules_by_phase(comparison: Comparison, units: Units) -> Plot | None:
    rows = [
        (arm, phase, joules / units.energy.size)
        for arm, runs in comparison.members.items()
        for phase, joules in _mean_phases(runs)
    ]
    if not rows:
        return None
    figure = new_canvas(0.75 + 0.27 * len(rows) + 0.12 * len(comparison.members))
    axes = figure.add_subplot()
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
                color=arm_colour(i),
                hatch=_HATCHES[i % len(_HATCHES)],
                edgecolor=PAPER,
                lw=0,
                label=_short(arm),
            )
    for place, (_, _, value) in zip(places, rows, strict=True):
        axes.annotate(
            number(value, 3), (value, place), (3, 0), textcoords="offset points", va="center", fontsize=8.5,
            color=INK,
        )  # fmt: skip
    axes.set_yticks(places, [phase for _, phase, _ in rows])
    axes.invert_yaxis()
    how = _kind_note(comparison)
    _style_axes(axes, f"energy, {units.energy.name}{how}", "", grid="x")
    axes.set_xlim(0, 1.18 * max(value for _, _, value in rows) or 1.0)
    axes.tick_params(axis="y", length=0)
    legend_above(figure, axes)
    title = f"Energy by phase{how}"
    caption = "Mean over the runs of an arm; validation is in the phase in which it ran."
    return plot_of(
        figure,
        "phases",
        title,
        caption,
        [f"{arm}, {phase}: {number(v, 3)} {units.energy.name}" for arm, phase, v in rows],
    )


def _mean_phases(runs: Sequence[FinishedRun]) -> list[tuple[str, float]]:
    """Joules by phase, mean over the runs that have it."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for phase, joules in run.energy["by_phase"].items():
            if joules is not None:
                found.setdefault(phase, []).append(joules)
    return [(phase, float(np.mean(values))) for phase, values in found.items()]


def _power(run: FinishedRun) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Seconds, and mean watts up to each, at most `_MAX_POINTS` of them."""
    clock = run.seconds.along(run.watts.steps)
    points = np.stack([clock, run.watts.values], axis=1)[np.isfinite(clock)]
    groups = np.array_split(points, min(len(points), _MAX_POINTS)) if len(points) else []
    return np.array([g[-1, 0] for g in groups]), np.array([g[:, 1].mean() for g in groups])


def _spans(run: FinishedRun) -> list[tuple[float, float, str]]:
    """Start and end in seconds and name of each stretch of one phase, as far as was logged."""
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


def _kind_note(comparison: Comparison) -> str:
    """Addition to a title or an axis where not all of it was measured."""
    kinds: set[Kind] = {arm.kind for arm in comparison.arms} & {"estimated", "partly estimated"}
    if not kinds:
        return ""
    return (
        " (estimated)"
        if kinds == {"estimated"} and len({a.kind for a in comparison.arms}) == 1
        else (" (partly estimated)")
    )


def _style_axes(axes: Axes, x: str, y: str, grid: Literal["both", "x"] = "both") -> None:
    axes.patch.set_visible(False)
    style_axes(axes, x, y, grid=grid, tick_size=8.5)
    axes.locator_params(axis="x", nbins=5)
