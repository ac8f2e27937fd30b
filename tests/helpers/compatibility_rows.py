"""Hooks and a fixture for the rows of docs/guides/compatibility.md: compared by name, written by a make target."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest

from helpers import compatibility_document as document

_ROWS = pytest.StashKey[dict[str, dict[str, Sequence[str]]]]()
_ORDER = pytest.StashKey[dict[str, list[str]]]()
WRITES = os.environ.get("ESTDGM_WRITE_COMPATIBILITY") == "1"


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, str, Sequence[str]], None]:
    """Return a function of a table, a row's name and its cells: it writes the row, or finds it in the document."""

    def row(table: str, name: str, cells: Sequence[str]) -> None:
        if WRITES:
            request.config.stash.setdefault(_ROWS, {}).setdefault(table, {})[name] = cells
        else:
            assert name in document.committed(table), (
                f"docs/guides/compatibility.md has no row {name!r}: make compatibility"
            )

    return row


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note the order of the rows: that of the tests, with those that are skipped."""
    order = config.stash.setdefault(_ORDER, {})
    for item in items:
        module, _, name = item.nodeid.rpartition("/")[2].partition(".py::")
        if "[" in name and "/compatibility/" in item.nodeid:
            order.setdefault(module.removeprefix("test_"), []).append(name.partition("[")[2].removesuffix("]"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the tables."""
    for table, rows in session.config.stash.get(_ROWS, {}).items():
        text = document.DOCUMENT.read_text()
        order = session.config.stash[_ORDER][table]
        document.DOCUMENT.write_text(document.updated(text, table, rows, order))
