"""The document has the rows that tests print, no others, and says what they check; numbers are not compared."""

from __future__ import annotations

import pytest
from test_models import MODELS

from helpers import compatibility_document as document
from helpers.compatibility_loggers import LOGGERS
from helpers.lightning_callbacks import CHECKED, REFUSED, ROWS


def test_the_table_of_models_has_the_models_that_are_tested() -> None:
    assert list(document.committed("models")) == [model.name for model in MODELS]


def test_the_table_of_callbacks_has_the_callbacks_that_are_tested() -> None:
    assert list(document.committed("callbacks")) == [*ROWS, *REFUSED]


def test_the_table_of_loggers_has_the_loggers_that_are_tested() -> None:
    assert list(document.committed("loggers")) == [case.name for case in LOGGERS]


def test_the_document_lists_what_is_checked() -> None:
    assert document.invariants() in document.DOCUMENT.read_text()
    assert "".join(f"- {one}\n" for one in CHECKED) in document.DOCUMENT.read_text()


def test_a_row_that_was_not_run_stays_and_one_without_a_test_goes() -> None:
    text = "<!-- models -->\n| model |\n|---|\n| a | old |\n| b | old |\n| gone | old |\n<!-- end of models -->\n"
    new = document.updated(text, "models", {"a": ("new",), "c": ("new",)}, ["c", "a", "b"])
    assert document.committed("models", new) == {"c": "| c | new |", "a": "| a | new |", "b": "| b | old |"}
    assert list(document.committed("models", new)) == ["c", "a", "b"]


def test_a_table_without_markers_is_named() -> None:
    with pytest.raises(AssertionError, match="no markers of a table 'models'"):
        document.committed("models", "")
