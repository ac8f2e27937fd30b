"""Tables of docs/guides/compatibility.md: rows between markers, each printed by a test of tests/compatibility/."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from helpers.compatibility import CHECKED, Outcome

DOCUMENT = Path(__file__).parents[2] / "docs" / "guides" / "compatibility.md"
HEADERS = {
    "models": ("model", "masked share", "layers masked", "of them sparse", "what stays dense, and why"),
    "callbacks": (
        "beside `DGMCallback`",
        "masked share",
        "checked",
        "what stays dense, differs or is refused",
    ),
    "loggers": ("logger", "version", "curves of ours that arrived", "read from", "`energy.json` of the run"),
}


def _section(table: str, text: str) -> re.Match[str]:
    found = re.search(rf"(<!-- {table} -->\n)(.*?)(<!-- end of {table} -->)", text, re.DOTALL)
    assert found, f"docs/guides/compatibility.md has no markers of a table {table!r}"
    return found


def committed(table: str, text: str | None = None) -> dict[str, str]:
    """Return the lines of a table of the document by the names of its rows."""
    lines = _section(table, DOCUMENT.read_text() if text is None else text)[2].splitlines()
    return {line.split("|")[1].strip(): line for line in lines[2:]}


def line(name: str, cells: Sequence[str]) -> str:
    """Lay one row out."""
    return f"| {' | '.join((name, *cells))} |"


def updated(text: str, table: str, rows: Mapping[str, Sequence[str]], order: Sequence[str]) -> str:
    """Return the document's text with `rows` put into a table, in `order`; rows that were not run now stay."""
    lines = committed(table, text) | {name: line(name, cells) for name, cells in rows.items()}
    header = HEADERS[table]
    body = [line(header[0], header[1:]), "|" + "---|" * len(header), *(lines[name] for name in order if name in lines)]
    section = _section(table, text)
    return text[: section.start(2)] + "".join(f"{one}\n" for one in body) + text[section.end(2) :]


def invariants() -> str:
    """Lay the checked invariants out as a list."""
    return "".join(f"- {one}\n" for one in CHECKED)


def cells(outcome: Outcome) -> tuple[str, ...]:
    """Return the cells of a row: what was masked, and what not."""
    reasons = Counter(outcome.dense.values())
    dense = [f"{reason} ({count} layer{'s' if count > 1 else ''})" for reason, count in reasons.items()]
    if outcome.unlisted:
        percent = 100 * sum(outcome.unlisted.values()) / outcome.trainable
        share = f"{percent:.1f}" if percent >= 0.1 else "under 0.1"
        dense.append(f"in no linear or convolution layer ({share}% of the weights)")
    return f"{outcome.share:.1%}", str(len(outcome.layers)), str(len(outcome.sparse)), "; ".join(dense)
