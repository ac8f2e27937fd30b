"""One call of ``estdgm study``: what there is to train, how long that takes, and the report of the table."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from lightning_estdgm.tools.study._costing import cost
from lightning_estdgm.tools.study._evidence_figures import draw_evidence
from lightning_estdgm.tools.study._evidence_plan import cost_runs
from lightning_estdgm.tools.study._evidence_report import report
from lightning_estdgm.tools.study._figures import draw_study
from lightning_estdgm.tools.study._plans import is_evidence, plan_named, runs_named
from lightning_estdgm.tools.study._results_table import ResultsTable, read_rows
from lightning_estdgm.tools.study._runner import run_study
from lightning_estdgm.tools.study._study_run import StudyRun
from lightning_estdgm.tools.study._summary import markdown
from lightning_estdgm.tools.study._tasks import task_named
from lightning_estdgm.tools.study._training import train

COMMITTED = Path(__file__).parents[3] / "docs" / "results" / "study"
"""Folder of the tables that a checkout of the repository has."""

COSTS = "-costs"
"""What the name of a table of costs has after the plan's."""


class Session:
    """A plan, its table, and the part of it that is asked for.

    Args:
        preset: Name of the plan.
        out: Folder of its table.
        console: Console for lines about it.
        tasks: Names of the tasks that are asked for; all where empty.
        names: Names of runs that are to be trained again, into a table of their own; the whole plan where empty.
        is_quiet: Whether nothing else runs on the machine: runs are trained one at a time, and served, for their
            seconds and joules; of the plan evidence one of each contender, into a table of costs.

    Raises:
        ValueError: A name is unknown, or `is_quiet` of a plan that has no costs.

    """

    def __init__(
        self,
        preset: str,
        out: Path,
        console: Console,
        tasks: Sequence[str] = (),
        names: Sequence[str] = (),
        is_quiet: bool = False,
    ) -> None:
        plan_named(preset)
        if is_quiet and not is_evidence(preset):
            raise ValueError(f"quiet: got the preset {preset}, expected evidence: no other has a table of costs")
        self.preset, self.out, self.console, self.names, self.is_quiet = preset, out, console, names, is_quiet
        self.tasks = {task_named(name).name for name in tasks}
        suffix = "-again" if names else COSTS if is_quiet else ""
        self.table = ResultsTable(out / f"{preset}{suffix}.csv")

    def rows(self, suffix: str = "") -> list[dict[str, Any]]:
        """Return the rows of the plan's table, or of that with a suffix; of committed ones, where `out` has no plan."""
        table = self._whole_table(suffix)
        return read_rows(table) if table.exists() else []

    def _whole_table(self, suffix: str = "") -> Path:
        own, committed = (folder / f"{self.preset}.csv" for folder in (self.out, COMMITTED))
        folder = COMMITTED if committed.exists() and not own.exists() else self.out
        return folder / f"{self.preset}{suffix}.csv"

    def runs(self) -> list[StudyRun]:
        """Return the runs that are asked for, as far as the rows tell which they are."""
        rows = self.rows()
        if self.names:
            runs: Iterable[StudyRun] = runs_named(self.preset, self.names, rows)
        else:
            runs = cost_runs(rows) if self.is_quiet else plan_named(self.preset, rows, self._costs())
        return [run for run in runs if not self.tasks or run.task in self.tasks]

    def _costs(self) -> Sequence[dict[str, Any]]:
        return self.rows(COSTS) if is_evidence(self.preset) else ()

    def train(self, jobs: int, minutes: float | None = None) -> None:
        """Train what the table lacks, round by round: what is found in one may name the runs of the next.

        Args:
            jobs: Number of runs at a time; one where the machine is to be quiet.
            minutes: Time after which no run begins.

        """
        jobs, how = (1, cost) if self.is_quiet else (jobs, train)
        until = math.inf if minutes is None else time.perf_counter() + 60.0 * minutes
        missing = self._missing()
        command = f"estdgm study --preset {self.preset}"
        before: list[StudyRun] | None = None
        while (todo := self._todo(missing)) != before:
            self._tell_time(todo, jobs)
            run_study(self._asked(missing), self.table, jobs, self.console, until=until, how=how, command=command)
            if time.perf_counter() > until:
                break
            before = todo

    def _asked(self, missing: Mapping[str, str]) -> list[StudyRun]:
        return [run for run in self.runs() if not missing.get(run.task)]

    def _todo(self, missing: Mapping[str, str]) -> list[StudyRun]:
        return self.table.lacks(self._asked(missing))

    def _missing(self) -> dict[str, str]:
        """Return the tasks without data, and say so."""
        asked = dict.fromkeys(run.task for run in self.runs())
        missing = {name: why for name in asked if (why := task_named(name).missing)}
        for name, why in missing.items():
            self.console.print(f"{name}: left out. {why}", style="yellow", highlight=False, soft_wrap=True)
        if missing and len(missing) == len(asked):
            raise FileNotFoundError("no task has its data: give their folder by --data")
        return missing

    def _tell_time(self, todo: Sequence[StudyRun], jobs: int) -> None:
        if not todo:
            return
        rows = self.rows()
        seconds: dict[str, float] = {}
        for run in todo:
            seconds[run.task] = seconds.get(run.task, 0.0) + guessed_seconds(run, rows)
        parts = ", ".join(f"{task} {_hours(of_task / jobs)}" for task, of_task in seconds.items())
        self.console.print(
            f"{len(todo)} runs, about {_hours(sum(seconds.values()) / jobs)} with {jobs} at a time ({parts})",
            highlight=False,
            soft_wrap=True,
        )

    def report(self) -> tuple[str, list[Path]]:
        """Write the Markdown and pictures of the table; return the text and all files."""
        table = self.table.path if self.names else self._whole_table()
        is_begun = table.exists() or not is_evidence(self.preset)  # its report names what is not run yet
        rows, name = read_rows(table) if is_begun else [], self.out / table.stem
        self.out.mkdir(parents=True, exist_ok=True)
        pictures: list[Path] = []
        if self.names:
            text = _run_by_run(rows)
        else:
            text = summary(self.preset, rows, self._costs())
            if is_evidence(self.preset):
                pictures = draw_evidence(rows, self.out)
            else:
                pictures = [name.with_suffix(".png")]
                draw_study(rows, pictures[0])
        name.with_suffix(".md").write_text(text, encoding="utf-8")
        return text, [table, name.with_suffix(".md"), *pictures]


def guessed_seconds(run: StudyRun, rows: Sequence[Mapping[str, Any]]) -> float:
    """Return about how long a run takes: by runs of its task and method in a table, else as long as dense."""
    known = [row["seconds"] / row["steps"] for row in rows if (row["task"], row["method"]) == (run.task, run.method)]
    return run.steps * (median(known) if known else task_named(run.task).step_s)


def summary(preset: str, rows: Sequence[dict[str, Any]], costs: Sequence[dict[str, Any]] = ()) -> str:
    """Return the tables of a plan's rows, and of those of its costs, as Markdown."""
    return report(rows, costs) if is_evidence(preset) else markdown(rows)


def _run_by_run(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| run | validation loss | test accuracy | FLOPs | seconds |", "|---|---|---|---|---|"]
    for row in rows:
        name = row["command"].rpartition(" ")[2]
        lines.append(
            f"| {row['task']} {name} | {row['val_loss']:.4f} | {row['test_accuracy']:.4f} | {row['flops']:.3g} "
            f"| {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
