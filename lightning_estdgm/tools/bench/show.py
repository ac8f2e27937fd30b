"""How benchmark commands tell what they found: tables on the terminal, JSON and PNG side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_estdgm.tools.bench.environment import environment, header
from lightning_estdgm.tools.report import write_json
from lightning_estdgm.tools.terminal import wide_console

__all__ = ["Record", "console", "machine_name", "markdown_table", "show"]


class Record:
    """A benchmark's JSON, written anew after every part: what was measured survives a cut.

    Args:
        path: of the JSON; None to write nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.header = header()

    def write(self, content: Mapping[str, Any], complete: bool) -> None:
        """Write what there is so far; "complete" tells a reader whether that is all."""
        if self.path is not None:
            write_json({**self.header, "complete": complete, **content}, self.path)

    @property
    def picture(self) -> Path | None:
        """Where the PNG goes: beside the JSON."""
        return None if self.path is None else self.path.with_suffix(".png")


def machine_name(machine: Mapping[str, Any]) -> str:
    """Device and torch in a few words, from `environment.environment`."""
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} thread(s)"
    return f"{device}, torch {machine['torch']}"


def markdown_table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    >>> print(markdown_table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("|" + "|".join(line) + "|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines)


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
