"""What a table shows: means and spreads over seeds, the distance to dense, as Markdown and as pictures."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_estdgm.tools.study.plans import SCALED, SCHEDULES
from lightning_estdgm.tools.study.runs import DENSE
from lightning_estdgm.tools.study.tasks import TASKS, task_named

__all__ = ["Arm", "arms", "baseline", "distance", "markdown", "picture"]


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed only.

    Attributes:
        task: the task's name.
        method: ``"dense"`` or a preset's name.
        settings: what differs from the preset.
        lr: peak learning rate.
        density: final density.
        length: steps as a multiple of the task's.
        rows: a row a seed.

    """

    task: str
    method: str
    settings: str
    lr: float
    density: float
    length: float
    rows: tuple[dict[str, Any], ...]

    @property
    def scores(self) -> list[float]:
        """The deciding metric of each seed: perplexity (less is better) or accuracy (more is)."""
        if task_named(self.task).metric == "loss":
            return [math.exp(row["val_loss"]) for row in self.rows]
        return [row["val_accuracy"] for row in self.rows]

    @property
    def loss(self) -> float:
        """Mean of what is to be small: perplexity, or the share of wrong answers."""
        mean = statistics.fmean(self.scores)
        return mean if task_named(self.task).metric == "loss" else 1.0 - mean

    @property
    def diverged(self) -> int:
        """How many seeds did."""
        return sum(row["status"] != "ok" for row in self.rows)

    @property
    def flops(self) -> float:
        """Training FLOPs of linear and convolution layers over those of a dense run of the task's own length."""
        return self.mean("flops_ratio") * self.length

    def mean(self, column: str) -> float:
        """Mean of a column over the seeds; NaN where a seed lacks it."""
        return statistics.fmean(row[column] for row in self.rows)

    @property
    def label(self) -> str:
        """Method, what differs from its preset, and the length where it is not 1."""
        settings = json.loads(self.settings or "{}")
        told = []
        if settings.get("block_size") == 1:
            del settings["block_size"]  # the unit of the whole study, unless another is named
        for name, bundle in (*SCHEDULES.items(), ("with scaled steps", SCALED)):
            if bundle.items() <= settings.items():
                settings = {k: v for k, v in settings.items() if k not in bundle}
                told.append(name)
        told += [k if v is True else f"{k.removeprefix('schedule.')}={v}" for k, v in settings.items()]
        told += [f"{self.length:g}x steps"] if self.length != 1.0 else []
        return " ".join([self.method, *told])


def arms(rows: Sequence[dict[str, Any]]) -> list[Arm]:
    """Group rows into arms, in the order of the table."""
    names = ("task", "method", "settings", "lr", "density", "length")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return [Arm(**dict(zip(names, key, strict=True)), rows=tuple(group)) for key, group in groups.items()]


def baseline(found: Sequence[Arm], task: str) -> Arm | None:
    """Return the best dense arm of a task, of all its learning rates: of full length, or the longest below it."""
    dense = [arm for arm in found if (arm.task, arm.method) == (task, DENSE) and arm.length <= 1.0]
    return min(dense, key=lambda arm: (-arm.length, arm.loss), default=None)


def distance(arm: Arm, dense: Arm) -> float:
    """How much worse `arm` is than `dense`: per cent of perplexity, or points of accuracy; negative where better."""
    mean, best = statistics.fmean(arm.scores), statistics.fmean(dense.scores)
    return 100.0 * (mean / best - 1.0) if task_named(arm.task).metric == "loss" else 100.0 * (best - mean)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One table a task: every arm by its distance to the best dense one, mean and sample deviation over the seeds.

    FLOPs, time and joules are those of the whole run over those of the best dense run.
    """
    found = arms(rows)
    parts = []
    for task in TASKS:
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
            spread = f" ± {statistics.stdev(arm.scores):.4f}" if len(arm.scores) > 1 else ""
            lost = f"{len(arm.rows)}, {arm.diverged} diverged" if arm.diverged else str(len(arm.rows))
            lines.append(
                f"| {arm.label} | {arm.density:g} | {arm.lr:g} | {lost} | {statistics.fmean(arm.scores):.4f}{spread} "
                f"| {distance(arm, dense):+.2f} | {arm.flops:.2f} | {arm.mean('seconds') / dense.mean('seconds'):.2f} "
                f"| {arm.mean('joules') / dense.mean('joules'):.2f} |"
            )
        parts.append("\n".join(lines))
    known = sorted({row["energy_method"] for row in rows if row["energy_method"]})
    parts.append(f"Joules are {' or '.join(known)}. FLOPs, time and joules: of the whole run, over the best dense one.")
    return "\n\n".join(parts) + "\n"


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw, for each task, every arm's distance to dense against its FLOPs, with the spread over seeds."""
    import matplotlib.pyplot as plt

    found = arms(rows)
    tasks = [task for task in TASKS if baseline(found, task.name) is not None]
    if not tasks:
        raise ValueError("expected at least one dense run to compare with, got none")
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.5 * len(tasks), 4), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        dense = baseline(found, task.name)
        assert dense is not None
        for index, method in enumerate(dict.fromkeys(arm.method for arm in found if arm.task == task.name)):
            mine = [arm for arm in found if (arm.task, arm.method) == (task.name, method)]
            spreads = [statistics.stdev(arm.scores) if len(arm.scores) > 1 else 0.0 for arm in mine]
            scale = 100.0 / (statistics.fmean(dense.scores) if task.metric == "loss" else 1.0)
            axis.errorbar(
                [arm.flops for arm in mine],
                [distance(arm, dense) for arm in mine],
                [scale * spread for spread in spreads],
                fmt="o",
                color=f"C{index}",
                label=method,
                capsize=2,
            )
        axis.axhline(0.0, color="grey", linewidth=0.8)
        axis.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        axis.set_xlabel("training FLOPs, share of dense")
        axis.set_ylabel("worse than dense, % of perplexity" if task.metric == "loss" else "worse than dense, points")
        axis.set_title(task.name)
        axis.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
