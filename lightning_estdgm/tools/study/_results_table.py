"""Table of results: one CSV with a row a run, appended as runs end, so that a study that was cut off goes on."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_estdgm.tools.study._study_run import StudyRun

COLUMNS = (
    *("task", "method", "lr", "seed", "density", "length", "settings", "steps"),
    *("status", "val_loss", "val_accuracy", "flops_ratio", "final_density"),
    *("seconds", "joules", "energy_method", "when", "torch", "cpu"),
)
"""Columns that every table has."""

MORE_COLUMNS = ("test_accuracy", "flops", "served_weights", "served_joules", "command")
"""Columns that tables begun since have after them."""

_TEXT = {"task", "method", "settings", "status", "energy_method", "when", "torch", "cpu", "command"}


class ResultsTable:
    """A CSV of results that is read at the start and appended to.

    Args:
        path: CSV file; made with its folders at the first row.

    Raises:
        ValueError: The file has other columns than `COLUMNS`.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns = read_columns(path) if path.exists() else COLUMNS + MORE_COLUMNS
        self._done = {row["key"] for row in read_rows(path)} if path.exists() else set()

    def lacks(self, runs: Iterable[StudyRun]) -> list[StudyRun]:
        """Return those of `runs` that have no row yet, each once, in their order."""
        return [run for run in {run.key: run for run in runs}.values() if run.key not in self._done]

    def add(self, run: StudyRun, result: Mapping[str, Any]) -> None:
        """Append a row at once."""
        row = {**asdict(run), "settings": run.variant, "steps": run.steps, **result}
        unknown = row.keys() - {*COLUMNS, *MORE_COLUMNS}
        if unknown:
            raise ValueError(f"expected results named {COLUMNS + MORE_COLUMNS}, got also {sorted(unknown)}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, extrasaction="ignore")  # of an older table
            if is_new:
                writer.writeheader()
            writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()})
        self._done.add(run.key)


def read_columns(path: Path) -> tuple[str, ...]:
    """Return the columns of a table.

    Raises:
        ValueError: They are neither `COLUMNS` nor these and `MORE_COLUMNS`.

    """
    with path.open(newline="", encoding="utf-8") as file:
        columns = tuple(next(csv.reader(file), ()))
    if columns not in (COLUMNS, COLUMNS + MORE_COLUMNS):
        raise ValueError(f"{path}: expected a table with columns {COLUMNS + MORE_COLUMNS}, got {columns}")
    return columns


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a table: numbers as numbers, and ``key`` as `StudyRun.key`. A last line that was cut off is left out.

    Raises:
        ValueError: The columns are none of a table of results.

    """
    read_columns(path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values() and None not in row]
    for row in rows:
        key = tuple(row[name] for name in ("task", "method", "lr", "seed", "density", "length", "settings"))
        row.update({name: float(value) if value else float("nan") for name, value in row.items() if name not in _TEXT})
        row["key"] = key
    return rows
