"""Runs of the study that differ in their seeds only, and their distance to dense."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lightning_estdgm.tools._stats import Spread, spread
from lightning_estdgm.tools.study._settings import SCALED, SCHEDULES
from lightning_estdgm.tools.study._study_run import DENSE
from lightning_estdgm.tools.study._tasks import task_named


@dataclass(frozen=True)
class StudyArm:
    """Runs that differ in their seed only.

    Attributes:
        task: Name of the task.
        method: ``"dense"``, or a preset's name.
        settings: Differences from the preset, as `StudyRun.variant`.
        lr: Peak learning rate.
        density: Final density.
        length: Number of steps as a multiple of the task's.
        rows: Rows of the table, one a seed.

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
        """Deciding metric of each seed: perplexity (less is better) or accuracy (more is), tested if there is one."""
        task = task_named(self.task)
        if task.metric == "loss":
            return [math.exp(row["val_loss"]) for row in self.rows]
        return [row["test_accuracy" if task.is_tested else "val_accuracy"] for row in self.rows]

    @property
    def spread(self) -> Spread:
        """Mean and deviation of the deciding metric over the seeds."""
        return spread(self.scores)

    @property
    def score(self) -> float:
        """Mean of the deciding metric over the seeds."""
        return fmean(self.scores)

    @property
    def loss(self) -> float:
        """Mean of the quantity that is to be small: perplexity, or the share of wrong answers."""
        return self.score if task_named(self.task).metric == "loss" else 1.0 - self.score

    @property
    def diverged(self) -> int:
        """Number of seeds that diverged."""
        return sum(row["status"] != "ok" for row in self.rows)

    @property
    def flops(self) -> float:
        """Training FLOPs of linear and convolution layers over those of a dense run of the task's own length."""
        return self.mean("flops_ratio") * self.length

    def mean(self, column: str) -> float:
        """Mean of a column over the seeds; NaN where a seed lacks it."""
        return fmean(row[column] for row in self.rows)

    @property
    def label(self) -> str:
        """Method, differences from its preset, and the length where it is not 1."""
        settings = json.loads(self.settings or "{}")
        told = []
        if settings.get("block_size") == 1:
            del settings["block_size"]  # the unit of the whole study, unless another is named
        for name, bundle in (*SCHEDULES.items(), ("with scaled steps", SCALED)):
            if bundle.items() <= settings.items():
                settings = {k: v for k, v in settings.items() if k not in bundle}
                told.append(name)
        told += [_told(name, value) for name, value in settings.items()]
        told += [f"{self.length:g}x steps"] if self.length != 1.0 else []
        return " ".join([self.method, *told])


def _told(name: str, value: Any) -> str:
    if name == "schedule":
        return str(value)
    return name if value is True else f"{name.removeprefix('schedule.')}={value}"


def arms(rows: Sequence[dict[str, Any]]) -> list[StudyArm]:
    """Group rows into arms, in the order of the table."""
    names = ("task", "method", "settings", "lr", "density", "length")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return [StudyArm(**dict(zip(names, key, strict=True)), rows=tuple(group)) for key, group in groups.items()]


def baseline(found: Sequence[StudyArm], task: str) -> StudyArm | None:
    """Return the best dense arm of a task, of all its learning rates: of full length, or the longest below it."""
    dense = [arm for arm in found if (arm.task, arm.method) == (task, DENSE) and arm.length <= 1.0]
    return min(dense, key=lambda arm: (-arm.length, arm.loss), default=None)


def distance(arm: StudyArm, dense: StudyArm) -> float:
    """Loss of `arm` against `dense` in per cent of perplexity or points of accuracy; negative where it is better."""
    if task_named(arm.task).metric == "loss":
        return 100.0 * (arm.score / dense.score - 1.0)
    return 100.0 * (dense.score - arm.score)
