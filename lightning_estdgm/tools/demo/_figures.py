"""The figure of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from lightning_estdgm.tools._plotting import COLOURS, GRID, INK, PHASE_COLOURS, legend, new_figure, save, style_axes
from lightning_estdgm.tools.demo._measures import watts
from lightning_estdgm.tools.demo._records import DENSE, DGM, SMALL, TITLES, MaskMoment, RunRecord
from lightning_estdgm.tools.report._finished_run import energy_label, kind_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_COLOURS = {DENSE: COLOURS[0], DGM: COLOURS[1], SMALL: COLOURS[2]}


def draw_demo(runs: Sequence[RunRecord], path: Path) -> None:
    """Write a PNG: loss over joules and over weights to serve, density over time, masks; watts if measured.

    Joules that were estimated from CPU time have nothing to say about watts: as many as cores were busy.
    """
    is_measured = all(kind_of(run.energy) == "measured" for run in runs)
    figure = new_figure(13, 8.6, pad_in=0.12)
    grid = figure.add_gridspec(2, 2)
    lower = grid[1, :].subgridspec(1, 3 if is_measured else 2, width_ratios=(1, 1, 1) if is_measured else (1, 2))
    has_joules = all(run.steps.train_j[-1] is not None for run in runs)
    label = energy_label(runs[0].energy)
    _draw_loss(figure.add_subplot(grid[0, 0]), runs, has_joules, label)
    moments = next((run.masks for run in runs if run.masks), [])
    _draw_density(figure.add_subplot(grid[0, 1]), runs)
    _draw_served(figure.add_subplot(lower[0, 0]), runs)
    masks = lower[0, 1].subgridspec(1, max(1, len(moments)))
    for i, moment in enumerate(moments):
        _draw_mask(figure.add_subplot(masks[0, i]), moment, "(d)", i == 0)
    if is_measured:
        _draw_watts(figure.add_subplot(lower[0, 2]), runs, label)
    save(figure, path)


def _draw_loss(axes: Axes, runs: Sequence[RunRecord], has_joules: bool, label: str) -> None:
    for run in runs:
        x = np.array(run.steps.train_j, dtype=float) if has_joules else np.cumsum(run.steps.wall_s)
        first = run.seed == runs[0].seed
        colour, alpha = _COLOURS[run.mode], 0.9 if first else 0.3
        axes.plot(x, _smooth(run.steps.loss), color=colour, alpha=0.45 * alpha, lw=1.2)
        points = [((v.train_j if has_joules else v.clock_s), v.loss) for v in run.validation]
        axes.plot(
            *zip(*points, strict=True),
            "o-",
            color=colour,
            alpha=alpha,
            lw=1.8,
            ms=5,
            label=TITLES[run.mode] if first else None,
        )
    unit = f"training energy, J ({label})" if has_joules else "training time, s (no energy source)"
    title = "(a) Loss over energy" if has_joules else "(a) Loss over time"
    _style(axes, unit, "loss, nats a byte", title)
    smooth = [loss for run in runs for loss in _smooth(run.steps.loss)[len(run.steps) // 20 :]]
    lowest, highest = min(*smooth, *(v.loss for run in runs for v in run.validation)), max(smooth)
    axes.set_ylim(lowest - 0.06 * (highest - lowest) - 1e-3, highest + 1e-3)
    axes.plot([], [], color=INK, alpha=0.4, lw=1.2, label="training, smoothed")
    axes.plot([], [], "o-", color=INK, lw=1.8, ms=5, label="validation")
    legend(axes)


def _draw_served(axes: Axes, runs: Sequence[RunRecord]) -> None:
    for run in runs:
        first = run.seed == runs[0].seed
        axes.plot(
            run.served_weights / 1e6,
            run.validation[-1].loss,
            "o",
            color=_COLOURS[run.mode],
            alpha=0.9 if first else 0.3,
            ms=9,
            label=TITLES[run.mode] if first else None,
        )
    _style(axes, "weights to serve, millions", "validation loss, nats a byte", "(c) Loss over what is served")
    axes.margins(0.15)
    axes.set_xlim(left=0)
    legend(axes, "best")


def _draw_watts(axes: Axes, runs: Sequence[RunRecord], label: str) -> None:
    drawn = []
    for run in runs:
        times, power = watts(run.steps.clock_s, run.steps.total_j)
        drawn += power
        if power:
            first = run.seed == runs[0].seed
            axes.plot(
                times,
                power,
                color=_COLOURS[run.mode],
                alpha=0.9 if first else 0.3,
                label=TITLES[run.mode] if first else None,
            )
    _style(axes, "time since training began, s", f"watts ({label})", "(e) Power over time")
    if drawn:
        axes.set_ylim(0, 1.2 * max(drawn))
        legend(axes)


def _draw_density(axes: Axes, runs: Sequence[RunRecord]) -> None:
    run = next(run for run in runs if run.mode == DGM)
    dense = next(run for run in runs if run.mode == DENSE)
    log = run.steps
    starts = [0.0, *log.clock_s[:-1]]
    changes = [i for i in range(len(log)) if i == 0 or log.phase[i] != log.phase[i - 1]]
    phases = list(dict.fromkeys(log.phase))
    longest = max(dense.steps.clock_s[-1], log.clock_s[-1])
    for i, j in zip(changes, [*changes[1:], len(log)], strict=True):
        end = log.clock_s[j - 1]
        axes.axvspan(starts[i], end, color=PHASE_COLOURS[phases.index(log.phase[i]) % 4], lw=0)
        # Turned, so that names of short phases do not run into each other.
        axes.text(starts[i] + 0.01 * longest, 0.98, log.phase[i], va="top", fontsize=9, color=INK, rotation=90)
    axes.plot([0, dense.steps.clock_s[-1]], [1, 1], color=_COLOURS[DENSE], lw=1.8, label="Dense")
    axes.step(
        [*starts, log.clock_s[-1]],
        [*log.density, log.density[-1]],
        where="post",
        color=_COLOURS[DGM],
        lw=1.8,
        label="EST-DGM",
    )
    axes.annotate(
        f"{log.density[-1]:.2f}",
        (log.clock_s[-1], log.density[-1]),
        (6, 0),
        textcoords="offset points",
        va="center",
        color=_COLOURS[DGM],
    )
    _style(axes, "time since training began, s", "active share of the masked weights", "(b) Density over time")
    axes.set_ylim(0, 1.06)
    legend(axes, "center right")


def _draw_mask(axes: Axes, moment: MaskMoment, letter: str, first: bool) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("share", ["#fdf1e7", _COLOURS[DGM]])
    cells = np.array(moment.cells)
    axes.imshow(cells, cmap=colours, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    if max(cells.shape) <= 48:
        axes.set_xticks(np.arange(cells.shape[1]) - 0.5, minor=True)
        axes.set_yticks(np.arange(cells.shape[0]) - 0.5, minor=True)
        axes.grid(which="minor", color="white", lw=0.8)
        axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    axes.set_xlabel(f"step {moment.step}, {moment.phase}\nlayer density {moment.density:.2f}", fontsize=9, color=INK)
    if first:
        axes.set_title(f"{letter} Mask of {moment.layer}", loc="left", fontsize=11, fontweight="bold", color=INK)
        axes.set_ylabel("outputs (rows), inputs (columns)", fontsize=9, color=INK)


def _smooth(values: Sequence[float], share: float = 0.03) -> list[float]:
    """Centred moving mean over ``share`` of the values; shorter at the ends."""
    half = max(1, round(share * len(values) / 2))
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _style(axes: Axes, x: str, y: str, title: str) -> None:
    style_axes(axes, x, y, title)
    axes.margins(x=0.02)
