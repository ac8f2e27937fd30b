"""Fits whose joules a run holds: those before the checkpoint it came from, and its own, with their times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any


class FitHistory:
    """Ids and times of a run's fits, the earliest first.

    A resumed run continues the history of its checkpoint, so two histories tell whether one run continues the other.

    Example:
        >>> history = FitHistory()
        >>> history.begin("first")
        >>> resumed = FitHistory()
        >>> resumed.load(history.spans(steps=8))
        >>> resumed.begin("second")
        >>> [(span["id"], span["steps"]) for span in resumed.spans(steps=20)]
        [('first', 8), ('second', 20)]
    """

    def __init__(self) -> None:
        self._past: list[dict[str, Any]] = []
        self._current: tuple[str, str] | None = None  # id and start

    def begin(self, fit: str) -> None:
        """Begin a fit, now; the one before has ended."""
        self._current = fit, _now()

    def end(self, steps: int) -> None:
        """End the current fit, now, at this number of steps. May be called twice."""
        self._past = self.spans(steps)
        self._current = None

    def spans(self, steps: int) -> list[dict[str, Any]]:
        """Return the fits; the current one ends now, at this number of steps.

        Returns:
            "id", "started" and "ended" (UTC, ISO 8601), and "steps": those of the whole run at the end of the fit.
        """
        past = [dict(span) for span in self._past]
        if self._current is None:
            return past
        fit, started = self._current
        return [*past, {"id": fit, "started": started, "ended": _now(), "steps": steps}]

    def load(self, spans: Iterable[Mapping[str, Any]]) -> None:
        """Replace the fits before the current one by those of a checkpoint."""
        current = self._current[0] if self._current else None
        self._past = [dict(span) for span in spans if span["id"] != current]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
