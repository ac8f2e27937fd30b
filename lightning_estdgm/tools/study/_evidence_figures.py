"""Figures of the preset ``evidence``, one a question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_estdgm.tools._plotting import COLOURS, INK, MARKERS, new_figure, save, style_axes
from lightning_estdgm.tools._stats import Spread
from lightning_estdgm.tools.study._contender import Rows
from lightning_estdgm.tools.study._evidence_report import Field, fields
from lightning_estdgm.tools.study._standing import Standing

Point = tuple[float, Spread]


def draw_evidence(rows: Rows, folder: Path) -> list[Path]:
    """Write three PNGs, with a panel a task and error bars over the seeds; none where nothing is run."""
    found = fields(rows)
    if not found:
        return []
    return [
        _draw(found, folder / "evidence-energy.png", "training FLOPs, share of dense", _over_flops),
        _draw(found, folder / "evidence-served.png", "weights served, share of dense", _over_served),
        _draw(found, folder / "evidence-little-data.png", "steps, share of dense", _over_steps),
    ]


def _over_flops(field: Field, standing: Standing) -> list[Point]:
    whole = field.dense_cost("flops")
    return [(standing.cost_at(length, "flops") / whole, standing.scores(length)) for length in standing.lengths]


def _over_served(field: Field, standing: Standing) -> list[Point]:
    length = field.budget_length(standing)
    if length is None or not standing.at(length):
        return []
    served = standing.cost_at(length, "served_weights")
    return [(served / field.dense_cost("served_weights"), standing.scores(length))]


def _over_steps(field: Field, standing: Standing) -> list[Point]:
    return [(length, standing.scores(length)) for length in standing.lengths]


def _draw(found: Sequence[Field], path: Path, cost: str, points_of: Any) -> Path:
    figure = new_figure(4.2 * len(found) + 2, 4)
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    handles: dict[str, Any] = {}
    names = list(dict.fromkeys(standing.contender.name for field in found for standing in field.all))
    for axes, field in zip(panels, found, strict=True):
        for standing in field.all:
            points = sorted(points_of(field, standing))
            if not points:
                continue
            index = names.index(standing.contender.name)
            handles[standing.contender.name] = axes.errorbar(
                [x for x, _ in points],
                [y["mean"] for _, y in points],
                [y["std"] or 0.0 for _, y in points],
                marker=MARKERS[index // len(COLOURS)],
                color=COLOURS[index % len(COLOURS)],
                lw=0.8,
                ms=4,
                capsize=2,
            )
        axes.set_xscale("log")
        style_axes(axes, cost, "validation loss" if field.dense.less_is_better else "test accuracy, %", field.task)
    figure.legend(
        handles.values(), handles.keys(), loc="outside right center", frameon=False, labelcolor=INK, fontsize=7
    )
    save(figure, path)
    return path
