"""Parts that a report is put together from, before any markup."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Headline:
    """A finding in a sentence, with the numbers behind it.

    Attributes:
        tone: Kind of finding.
        text: Sentence.
        details: Further sentences.
    """

    tone: Literal["saved", "cost more", "no difference", "not comparable", "single"]
    text: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        head: Text of the first column.
        cells: Texts of the other columns.
        differs: Whether the row is not the same in all runs.
    """

    head: str
    cells: tuple[str, ...]
    differs: bool = False


@dataclass(frozen=True)
class ReportTable:
    """A table of texts.

    Attributes:
        title: Title above it.
        columns: Heads of all columns; the first column holds the rows' heads.
        rows: Rows.
        note: Sentences below it.
        style: "words" for cells with text instead of numbers, "runs" for cells that stay on one line.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    style: Literal["", "words", "runs"] = ""
