"""The pictures of the documentation, from the package and from results: ``make pictures``, into docs/pictures.

Nothing is measured here. Watts over time would say something with a counter only, and no run with one is there yet.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from lightning_estdgm import EstDgm
from lightning_estdgm.tools._plotting import (
    COLOURS,
    GRID,
    INK,
    MARKERS,
    MUTED,
    PHASE_COLOURS,
    legend,
    new_figure,
    save,
    style_axes,
)

DOCS = Path(__file__).parents[1]
FOLDER = DOCS / "pictures"
DENSE, SPARSE, SMALLER = COLOURS[:3]
DPI = 160
TEXT = 13  # points in figures of 9 inches: readable at half of the size on a page


def _style(axes: Any, x: str, y: str) -> None:
    style_axes(axes, x, y, tick_size=TEXT - 1)
    axes.xaxis.label.set_size(TEXT)
    axes.yaxis.label.set_size(TEXT)


def _legend(axes: Any, **where: Any) -> None:
    legend(axes)
    axes.legend(fontsize=TEXT - 1, framealpha=0.9, edgecolor=GRID, labelcolor=INK, **where)


def _finish(figure: Any, path: Path) -> None:
    figure.set_dpi(DPI)
    save(figure, path)


def _box(axes: Any, x: float, y: float, size: tuple[float, float], lines: Sequence[str], colour: str) -> None:
    """A box around a point, with a bold line of text and lines below it, which may be paths of modules."""
    from matplotlib.patches import FancyBboxPatch

    width, height = size
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=colour, edgecolor=MUTED, lw=1.2))
    for i, line in enumerate(lines):
        middle = y + (len(lines) / 2 - 0.5 - i) * 0.27
        is_path = "/" in line and " " not in line
        axes.text(
            x,
            middle,
            line,
            ha="center",
            va="center",
            color=MUTED if is_path else INK,
            fontsize=TEXT - (1 if is_path else 0),
            fontweight="bold" if i == 0 else "normal",
            family="monospace" if is_path else "sans-serif",
        )


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], **how: Any) -> None:
    style = {"arrowstyle": "-|>", "color": MUTED, "lw": 1.5, "mutation_scale": 16, "shrinkA": 0, "shrinkB": 0} | how
    axes.annotate("", end, start, arrowprops=style)


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    """A figure whose one unit is an inch, without axes."""
    figure = new_figure(width, height, pad_in=0.0)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    return figure, axes


def cycle(path: Path) -> None:
    """Draw the density over a run by phase, and the mask updates."""
    steps = 10_000
    schedule = EstDgm().resolve(steps)
    plans = [schedule(step) for step in range(steps)]
    shares = np.arange(steps) / steps
    figure = new_figure(9, 4.2)
    axes = figure.add_subplot()
    starts = [i for i in range(steps) if i == 0 or plans[i].phase != plans[i - 1].phase]
    for colour, start, end in zip(PHASE_COLOURS, starts, [*starts[1:], steps], strict=False):
        axes.axvspan(start / steps, end / steps, color=colour, lw=0)
        middle = (start + end) / 2 / steps
        axes.text(middle, 1.02, plans[start].phase, ha="center", va="bottom", fontsize=TEXT - 1, color=INK,
                  transform=axes.get_xaxis_transform(), gid="phase")  # fmt: skip
    axes.step(shares, [plan.density for plan in plans], where="post", color=SPARSE, lw=2.5, label="active share")
    updates = [i / steps for i, plan in enumerate(plans) if plan.update]
    axes.plot(
        updates, [0.02] * len(updates), "|", color=INK, ms=11, mew=1.3, label="mask update, after 8 observed steps"
    )
    last = max(updates)
    axes.text((last + 1) / 2, 0.02, "masks fixed", ha="center", va="center", fontsize=TEXT - 2, color=INK)
    axes.axhline(1, color=DENSE, lw=2.0, label="dense")
    _style(axes, "share of the run", "density")
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.03, 1.05)
    _legend(axes, loc="center right", bbox_to_anchor=(1, 0.62))
    _finish(figure, path)


def update(path: Path) -> None:
    """Draw what happens between two mask updates, as a circle."""
    figure, axes = _canvas(9, 3.9)
    size = (3.1, 1.0)
    left, right, top, bottom = 2.0, 7.0, 3.1, 0.75
    _box(axes, left, top, size, ["train", "products, gradients and", "steps of active units only"], PHASE_COLOURS[1])
    _box(axes, right, top, size, ["observe", "some steps also yield gradients", "of inactive units"], PHASE_COLOURS[0])
    _box(axes, right, bottom, size, ["drop", "the active units that score", "least become inactive"], PHASE_COLOURS[3])
    _box(axes, left, bottom, size, ["grow", "inactive units whose gradients", "are large and agree"], PHASE_COLOURS[2])
    _arrow(axes, (left + 1.6, top), (right - 1.6, top))
    _arrow(axes, (right, top - 0.55), (right, bottom + 0.55))
    _arrow(axes, (right - 1.6, bottom), (left + 1.6, bottom))
    _arrow(axes, (left, bottom + 0.55), (left, top - 0.55))
    middle = "one mask update,\nagain and again as\nthe density falls"
    axes.text(4.5, (top + bottom) / 2, middle, ha="center", va="center", fontsize=TEXT, color=MUTED)
    _finish(figure, path)


def units(path: Path) -> None:
    """Draw masks of one weight by units of 1, 4 and 64, of one density."""
    density = 0.125
    generator = np.random.default_rng(0)
    figure = new_figure(9, 3.5)
    kinds = ((1, 64, "single weights"), (4, 64, "blocks of 4 x 4"), (64, 256, "blocks of 64 x 64"))
    for i, (unit, side, title) in enumerate(kinds):
        axes = figure.add_subplot(1, 3, i + 1)
        blocks = side // unit
        mask = np.zeros(blocks**2)
        mask[generator.permutation(blocks**2)[: round(density * blocks**2)]] = 1
        _draw_mask(axes, np.kron(mask.reshape(blocks, blocks), np.ones((unit, unit))), unit)
        axes.set_title(title, fontsize=TEXT, fontweight="bold", color=INK)
        axes.set_xlabel(f"{side} x {side} weights", fontsize=TEXT - 1, color=MUTED)
    _finish(figure, path)


def _draw_mask(axes: Any, mask: Any, unit: int) -> None:
    from matplotlib.colors import ListedColormap

    axes.imshow(mask, cmap=ListedColormap(["#fdf1e7", SPARSE]), interpolation="nearest", vmin=0, vmax=1)
    axes.set_xticks(np.arange(0, mask.shape[1] + 1, unit) - 0.5, minor=True)
    axes.set_yticks(np.arange(0, mask.shape[0] + 1, unit) - 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=0.4 if unit == 1 else 0.9)
    axes.tick_params(which="both", length=0)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(MUTED)


def step(path: Path) -> None:
    """Draw a step's way through the callback and the kernels."""
    trainer, layer, engine, mask = "#eef0f2", PHASE_COLOURS[1], PHASE_COLOURS[2], PHASE_COLOURS[0]
    rows = [
        (("forward", trainer),
         ("the sparse operator", "sparse/", layer),
         ("from active blocks", "sparse/backends/", layer)),
        (("backward", trainer),
         ("its gradients", "sparse/", layer),
         ("of active blocks", "sparse/backends/", layer)),
        (("on_after_backward", "callbacks/dgm", trainer),
         ("in a window: observe", "engine/_observation", engine),
         ("outside masks: 0", "engine/_gradient_mask", engine)),
        (("optimizer: before", "engine/_step_hooks", engine),
         ("groups split by density", "engine/_step_size", engine),
         ("learning rates / density", "engine/_scaled_groups", engine)),
        (("optimizer.step", trainer), None, None),
        (("optimizer: after", "engine/_step_hooks", engine),
         ("your groups again", "engine/_step_size", engine),
         ("inactive weights: 0", "engine/_inactive", engine)),
        (("on_train_batch_end", "callbacks/dgm", trainer),
         ("next phase", "engine/_controller", engine),
         ("if due: new masks", "engine/_mask_update", mask)),
        (None, None, ("layers follow", "engine/_dispatch", engine)),
    ]  # fmt: skip
    high, wide, size = 1.0, (1.55, 4.95, 8.35), (2.85, 0.72)
    figure, axes = _canvas(10.4, len(rows) * high + 0.75)
    for x, title in zip(wide, ("Trainer, optimizer", "what it calls", "what is done"), strict=True):
        axes.text(
            x, len(rows) * high + 0.45, title, ha="center", va="center", fontsize=TEXT, fontweight="bold", color=MUTED
        )
    for i, row in enumerate(rows):
        y = (len(rows) - 0.5 - i) * high
        for x, cell in zip(wide, row, strict=True):
            if cell is not None:
                _box(axes, x, y, size, cell[:-1], cell[-1])
        for left, right, cell in zip(wide, wide[1:], row[1:], strict=False):
            if cell is not None and row[0] is not None:
                _arrow(axes, (left + size[0] / 2, y), (right - size[0] / 2, y))
        if i and row[0] is not None:
            _arrow(axes, (wide[0], y + high - size[1] / 2), (wide[0], y + size[1] / 2))
    last = 0.5 * high
    _arrow(axes, (wide[2], last + high - size[1] / 2), (wide[2], last + size[1] / 2))
    edge = wide[2] + size[0] / 2
    top = (len(rows) - 0.5) * high
    axes.plot([edge, edge + 0.3, edge + 0.3], [last, last, top], color=MUTED, lw=1.5, ls="--")
    _arrow(axes, (edge + 0.3, top), (edge, top), ls="--")
    axes.text(wide[0], last, "the next batch", ha="center", va="center", fontsize=TEXT, color=MUTED)
    _arrow(axes, (wide[0], last + high - size[1] / 2), (wide[0], last + 0.2), ls="--")
    axes.text(
        wide[1], last, "the next step computes on\nthe new masks", ha="center", va="center", fontsize=TEXT, color=MUTED
    )
    _finish(figure, path)


def loss_over_joules(path: Path) -> None:
    """Draw validation loss over training joules, of the runs in results/demo.json."""
    results = json.loads((DOCS / "results" / "demo.json").read_text())
    figure = new_figure(9, 4.4)
    axes = figure.add_subplot()
    is_estimated = False
    kinds = (("dense", "dense", DENSE, "o"), ("dgm", "EST-DGM", SPARSE, "s"), ("small", "smaller dense", SMALLER, "^"))
    for mode, name, colour, marker in kinds:
        runs = [run for run in results["runs"] if run["mode"] == mode]
        is_estimated |= any(run["energy"]["estimated_joules"] for run in runs)
        points = [[(v["train_j"], v["loss"]) for v in run["validation"]] for run in runs]
        for seed in points:
            axes.plot(*zip(*seed, strict=True), "-", color=colour, lw=1.2, alpha=0.4)
        mean = [tuple(fmean(values) for values in zip(*moment, strict=True)) for moment in zip(*points, strict=True)]
        axes.plot(*zip(*mean, strict=True), color=colour, lw=2.6, marker=marker, ms=8, label=name)
    _style(
        axes,
        f"training energy, J{' (estimated from CPU time)' if is_estimated else ''}",
        "validation loss, nats a byte",
    )
    axes.set_xlim(left=0)
    _legend(axes, loc="upper right")
    _finish(figure, path)


UNITS_SHOWN = ("1", "4 x 1", "4", "16", "64")
"""Mask units in the picture of speeds."""


def _speeds(folder: Path) -> tuple[str, dict[str, dict[float, float]]]:
    """Return the shape that most rows of a machine have, and of that the best speed-up of any backend.

    The speed-ups are by unit and density, of `UNITS_SHOWN`. Only `kernels-units` is read: a curve is of one run.
    """
    files = sorted(folder.glob("kernels-units.json"))
    rows = [row for file in files for row in json.loads(file.read_text())["rows"]]
    rows = [row for row in rows if row["kind"] == "linear" and row["speedup"] and str(row["block_size"]) in UNITS_SHOWN]
    shapes = [tuple(row[key] for key in ("tokens", "out_features", "in_features", "dtype")) for row in rows]
    if not shapes:
        return "", {}
    shape = max(shapes, key=shapes.count)
    found: dict[str, dict[float, float]] = {}
    for row, its in zip(rows, shapes, strict=True):
        if its == shape and row["backend"] in ("cpu", "native", "triton", "reference"):
            at = found.setdefault(str(row["block_size"]), {})
            density = round(row["density"], 2)  # the nearest that whole units allow
            at[density] = max(at.get(density, 0.0), row["speedup"])
    tokens, out_features, in_features, dtype = shape
    return f"{tokens} tokens, {in_features} to {out_features}, {dtype}", found


def layer_speed(path: Path) -> None:
    """Draw how many times as fast as dense a linear layer is, over density by unit: a panel for each machine."""
    folders = sorted({file.parent for file in DOCS.glob("benchmarks/*/kernels-units.json")})
    found = [(folder.name, *_speeds(folder)) for folder in folders]
    found = [each for each in found if each[2]]
    figure = new_figure(9, 4.4 * len(found))
    for i, (machine, shape, by_unit) in enumerate(found):
        axes = figure.add_subplot(len(found), 1, i + 1)
        order = [unit for unit in UNITS_SHOWN if unit in by_unit]
        for unit, colour, marker in zip(order, COLOURS[1:], MARKERS, strict=False):
            points = sorted(by_unit[unit].items())
            label = f"{unit} x {unit}" if unit.isdigit() else unit
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=8, lw=2.4, label=label)
        axes.axhline(1, color=DENSE, lw=2.0, label="dense")
        densities = sorted({density for points in by_unit.values() for density in points})
        _style(axes, "density", "times as fast as dense")
        axes.set_title(f"{machine}: {shape}", loc="left", fontsize=TEXT, color=INK)
        axes.set_xscale("log")
        axes.set_xticks(densities, [f"{density:g}" for density in densities])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        _legend(axes, title="mask unit", title_fontsize=TEXT - 1, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _finish(figure, path)


PICTURES: dict[str, Callable[[Path], None]] = {
    "cycle.png": cycle,
    "update.png": update,
    "units.png": units,
    "step.png": step,
    "layer-speed.png": layer_speed,
    "loss-over-joules.png": loss_over_joules,
}
"""What draws each picture, by its file's name."""


def draw(folder: Path = FOLDER) -> None:
    """Draw all pictures into a folder."""
    for name, picture in PICTURES.items():
        picture(folder / name)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
