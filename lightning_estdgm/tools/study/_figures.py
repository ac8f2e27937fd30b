"""Figure of a table of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_estdgm.tools._plotting import COLOURS, INK, MARKERS, MUTED, new_figure, save, style_axes
from lightning_estdgm.tools.study._study_arm import arms, baseline, distance
from lightning_estdgm.tools.study._tasks import ALL_TASKS

_TICKS = (0.1, 0.2, 0.3, 0.5, 1.0)


def draw_study(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: for each task, every arm's distance to dense against its FLOPs, with the spread over seeds.

    Raises:
        ValueError: No row is of a dense run.
    """
    found = arms(rows)
    bases = [(task, dense) for task in ALL_TASKS if (dense := baseline(found, task.name)) is not None]
    if not bases:
        raise ValueError("expected at least one dense run to compare with, got none")
    figure = new_figure(4.5 * len(bases) + 1, 4)
    panels = figure.subplots(1, len(bases), squeeze=False)[0]
    methods = list(dict.fromkeys(arm.method for arm in found))
    handles: dict[str, Any] = {}
    for axes, (task, dense) in zip(panels, bases, strict=True):
        scale = 100.0 / (dense.score if task.metric == "loss" else 1.0)
        for index, method in enumerate(methods):
            mine = [arm for arm in found if (arm.task, arm.method) == (task.name, method)]
            if not mine:
                continue
            handles[method] = axes.errorbar(
                [arm.flops for arm in mine],
                [distance(arm, dense) for arm in mine],
                [scale * (arm.spread["std"] or 0.0) for arm in mine],
                fmt=MARKERS[index // len(COLOURS)],  # another marker where there are more methods than colours
                color=COLOURS[index % len(COLOURS)],
                capsize=2,
            )
        axes.axhline(0.0, color=MUTED, lw=0.8)
        axes.axhline(1.0, color=MUTED, lw=0.8, ls=":")
        axes.set_xscale("log")
        axes.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
        axes.minorticks_off()
        worse = "worse than dense, % of perplexity" if task.metric == "loss" else "worse than dense, points"
        style_axes(axes, "training FLOPs, share of dense", worse, task.name)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, labelcolor=INK)
    save(figure, path)
