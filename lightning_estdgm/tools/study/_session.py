"""One call of ``estdgm study``: what there is to train, how long that takes, and the report of the table."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from lightning_estdgm.tools.study._evidence_figures import draw_evidence
from lightning_estdgm.tools.study._evidence_report import report
from lightning_estdgm.tools.study._figures import draw_study
from lightning_estdgm.tools.study._plans import is_evidence, plan_named, runs_named
from lightning_estdgm.tools.study._results_table import ResultsTable, read_rows
from lightning_estdgm.tools.study._runner import run_study
from lightning_estdgm.tools.study._study_run import StudyRun
from lightning_estdgm.tools.study._summary import markdown
from lightning_estdgm.tools.study._tasks import task_named

COMMITTED = Path(__file__).parents[3] / "docs" / "results" / "study"
"""Folder of the tables that a checkout of the repository has."""


class Session:
    """A plan, its table, and the part of it that is asked for.

    Args:
        preset: Name of the plan.
        out: Folder of its table.
        console: Console for lines about it.
        tasks: Names of the tasks that are asked for; all where empty.
        names: Names of runs that are to be trained again, into a table of their own; the whole plan where empty.

    Raises:
        ValueError: A name is unknown.

    """

    def __init__(
        self, preset: str, out: Path, console: Console, tasks: Sequence[str] = (), names: Sequence[str] = ()
    ) -> None:
        plan_named(preset)
        self.preset, self.out, self.console, self.names = preset, out, console, names
        self.tasks = {task_named(name).name for name in tasks}
        self.table = ResultsTable(out / (f"{preset}-again.csv" if names else f"{preset}.csv"))

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the table; of the committed one, where there is none in `out`."""
        return read_rows(self._whole_table) if self._whole_table.exists() else []

    @property
    def _whole_table(self) -> Path:
        own, committed = self.out / f"{self.preset}.csv", COMMITTED / f"{self.preset}.csv"
        return committed if committed.exists() and not own.exists() else own

    def runs(self) -> list[StudyRun]:
        """Return the runs that are asked for, as far as the rows tell which they are."""
        rows = self.rows()
        runs = runs_named(self.preset, self.names, rows) if self.names else plan_named(self.preset, rows)
        return [run for run in runs if not self.tasks or run.task in self.tasks]

    def train(self, jobs: int, minutes: float | None = None, is_quiet: bool = False) -> None:
        """Train what the table lacks, round by round: what is found in one may name the runs of the next.

        Args:
            jobs: Number of runs at a time.
            minutes: Time after which no run begins.
            is_quiet: Whether nothing else runs on the machine.

        """
        until = math.inf if minutes is None else time.perf_counter() + 60.0 * minutes
        missing = self._missing()
        command = f"estdgm study --preset {self.preset}"
        before: list[StudyRun] | None = None
        while (todo := self._todo(missing)) != before:
            self._tell_time(todo, jobs)
            run_study(
                self._asked(missing), self.table, jobs, self.console, until=until, is_quiet=is_quiet, command=command
            )
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
        table = self.table.path if self.names else self._whole_table
        is_begun = table.exists() or not is_evidence(self.preset)  # its report names what is not run yet
        rows, name = read_rows(table) if is_begun else [], self.out / table.stem
        self.out.mkdir(parents=True, exist_ok=True)
        pictures: list[Path] = []
        if self.names:
            text = _run_by_run(rows)
        else:
            text = summary(self.preset, rows)
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


def summary(preset: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return the tables of a plan's rows as Markdown."""
    return report(rows) if is_evidence(preset) else markdown(rows)


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
