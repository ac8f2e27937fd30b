"""Summary of a table of results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_estdgm.tools._stats import spread_text
from lightning_estdgm.tools.study._study_arm import arms, baseline, distance
from lightning_estdgm.tools.study._tasks import ALL_TASKS


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One table a task: every arm by its distance to the best dense one, mean and sample deviation over the seeds.

    FLOPs of the whole run are over those of the task's own model, dense in its full length; time and joules are over
    those of the best dense run.
    """
    found = arms(rows)
    parts = []
    for task in ALL_TASKS:
        mine = [arm for arm in found if arm.task == task.name]
        dense = baseline(found, task.name)
        if not mine or dense is None:
            continue
        unit, metric = ("%", "perplexity") if task.metric == "loss" else ("points", "accuracy")
        lines = [
            f"### {task.name}: {task.what}\n",
            f"| method | density | rate | seeds | {metric} | worse than dense, {unit} | FLOPs | time | joules |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for arm in sorted(mine, key=lambda arm: distance(arm, dense)):
            lost = f"{len(arm.rows)}, {arm.diverged} diverged" if arm.diverged else str(len(arm.rows))
            lines.append(
                f"| {arm.label} | {arm.density:g} | {arm.lr:g} | {lost} | {spread_text(arm.spread, 4)} "
                f"| {distance(arm, dense):+.2f} | {arm.flops:.2f} | {arm.mean('seconds') / dense.mean('seconds'):.2f} "
                f"| {arm.mean('joules') / dense.mean('joules'):.2f} |"
            )
        parts.append("\n".join(lines))
    known = sorted({row["energy_method"] for row in rows if row["energy_method"]})
    parts.append(
        f"Joules are {' or '.join(known)}. FLOPs of the whole run are over those of the task's own model, dense in its "
        "full length; time and joules are over the best dense run's."
    )
    return "\n\n".join(parts) + "\n"
