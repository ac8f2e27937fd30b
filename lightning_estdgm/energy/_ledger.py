"""Sums of a run over restarts, fits and processes: no joule is lost or counted twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_estdgm.energy._fit_history import FitHistory
from lightning_estdgm.energy._totals import Totals


class Ledger:
    """Sums of a run: ``total = base + own + others``.

    - base: earlier fits of this object, or the checkpoint that was restored;
    - own: this process in the current fit;
    - others: the other processes in the current fit, as of the last exchange.

    Attributes:
        others: Sums of the other processes.

    Example:
        >>> ledger = Ledger()
        >>> ledger.begin("fit 1", lambda: Totals(gaps=2))
        >>> state = ledger.state_dict()
        >>> ledger.end()
        >>> restored = Ledger()
        >>> restored.load_state_dict(state)
        >>> restored.total().gaps
        2
    """

    def __init__(self) -> None:
        self._base = Totals()
        self.others = Totals()
        self._own: Callable[[], Totals] | None = None
        self._fit = ""
        self._history = FitHistory()

    def __getstate__(self) -> dict[str, Any]:
        # The measurement stays in the process that measures; a copy holds its sums as of now.
        history = FitHistory()
        history.load(self.fits())
        return {"_base": self.total(), "others": Totals(), "_own": None, "_fit": "", "_history": history}

    def begin(self, fit: str, own: Callable[[], Totals]) -> None:
        """Start a fit.

        Args:
            fit: Id that no other fit has.
            own: Returns the sums of this process in the fit.
        """
        self.end()
        self._own = own
        self._fit = fit
        self._history.begin(fit)

    def end(self) -> None:
        """End the fit: its sums become part of the base."""
        self._base = self.total()
        self.others = Totals()
        self._own = None
        self._fit = ""
        self._history.end(self._base.steps)

    def fits(self) -> list[dict[str, Any]]:
        """Return the fits whose sums these are, the earliest first, as `FitHistory.spans` does."""
        return self._history.spans(self.total().steps)

    def own(self) -> Totals:
        """Return the sums of this process in the current fit."""
        return Totals() if self._own is None else self._own()

    def fit(self) -> Totals:
        """Return the sums of all processes in the current fit."""
        return self.own().add(self.others, beside=True)

    def total(self) -> Totals:
        """Return the sums of the whole run."""
        return self._base.add(self.fit())

    def state_dict(self) -> dict[str, Any]:
        """Return the total in plain types, the id of the fit it was taken in, and the times of all fits so far."""
        return {"totals": self.total().state_dict(), "fit": self._fit, "fits": self.fits()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a checkpoint's total as the base; the current fit comes on top, so loading twice changes nothing.

        A state taken in the current fit (a tuner puts the run back to where it was) changes nothing either: its
        joules are counted already.

        Raises:
            ValueError: The state has an unknown version.
        """
        totals = Totals.from_state_dict(state["totals"])
        if self._fit and state.get("fit") == self._fit:
            return
        if "steps" in state:  # written by release 0.1
            totals.steps = int(state["steps"])
            totals.counts = {"sample": state["samples"]}
        self._base = totals
        self._history.load(state.get("fits", ()))
