"""Output of the benchmark commands: tables on the terminal, JSON and PNG side by side."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_estdgm.tools._terminal import wide_console
from lightning_estdgm.tools.bench._environment import environment, header
from lightning_estdgm.tools.report._json_format import write_json

Columns = tuple[list[str], list[list[str]]]
"""Head and cells of a table, for the terminal or for Markdown."""


class Record:
    """JSON of a benchmark, written anew after every part, so that a cut loses one part only.

    Args:
        path: path of the JSON; None to write nothing.

    Attributes:
        header: command, date and environment.

    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.header = header()

    def write(self, content: Mapping[str, Any], complete: bool) -> None:
        """Write the results so far; "complete" tells a reader whether these are all."""
        if self.path is not None:
            write_json({**self.header, "complete": complete, **content}, self.path)

    @property
    def picture(self) -> Path | None:
        """Path of the PNG, beside the JSON."""
        return None if self.path is None else self.path.with_suffix(".png")


def machine_name(machine: Mapping[str, Any]) -> str:
    """Return device and torch in a few words, from `_environment.environment`."""
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} thread(s)"
    return f"{device}, torch {machine['torch']}"


def markdown_table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table.

    >>> print(markdown_table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("|" + "|".join(line) + "|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines)


def terminal_table(
    title: str, columns: Columns, *, left: Container[int], wrapped: Container[int] = (), caption: str | None = None
) -> Table:
    """Return a table for the terminal.

    Args:
        title: text above it.
        columns: head and cells.
        left: columns that are aligned to the left; others are to the right.
        wrapped: columns that may be wrapped.
        caption: text below it.

    """
    table = Table(title=title, caption=caption)
    head, cells = columns
    for index, column in enumerate(head):
        table.add_column(column, justify="left" if index in left else "right", no_wrap=index not in wrapped)
    for line in cells:
        table.add_row(*line)
    return table


def console() -> Console:
    """Return a console that is wide enough for the tables."""
    return wide_console(150)


def show(table: Table, content: dict[str, Any], json: Path | None) -> None:
    """Print a benchmark's table with the machine it ran on, and write its JSON where one is wanted."""
    out = console()
    out.print(table)
    out.print(machine_name(environment()), style="dim", soft_wrap=True)
    if json is not None:
        write_json({**header(), **content}, json)
        out.print(str(json), style="dim", soft_wrap=True)
