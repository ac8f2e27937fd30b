"""The sums of a run over restarts, fits and processes, so that no joule is lost or counted twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_estdgm.energy.accumulator import Totals

__all__ = ["Ledger"]


class Ledger:
    """``total = base + own + others``.

    - base: earlier fits of this object, or the checkpoint that was restored;
    - own: this process in the fit under way;
    - others: the other processes in it, as of the last exchange.

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

    def __getstate__(self) -> dict[str, Any]:
        # What is being measured stays in the process that measures; a copy holds it as of now.
        return {"_base": self.total(), "others": Totals(), "_own": None, "_fit": ""}

    def begin(self, fit: str, own: Callable[[], Totals]) -> None:
        """Start a fit, whose id no other fit has; `own` reports its sums from now on."""
        self.end()
        self._own = own
        self._fit = fit

    def end(self) -> None:
        """The fit is over: what it used becomes part of the base."""
        self._base = self.total()
        self.others = Totals()
        self._own = None
        self._fit = ""

    def own(self) -> Totals:
        """This process in the fit under way."""
        return Totals() if self._own is None else self._own()

    def fit(self) -> Totals:
        """All processes in the fit under way."""
        return self.own().add(self.others, beside=True)

    def total(self) -> Totals:
        """All of the run."""
        return self._base.add(self.fit())

    def state_dict(self) -> dict[str, Any]:
        """The total, in plain types, and the fit it was taken in."""
        return {"totals": self.total().state_dict(), "fit": self._fit}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a checkpoint's total as the base; the fit under way comes on top, so loading twice changes nothing.

        A state taken in the fit that is still under way (a tuner puts the run back to where it was) changes
        nothing either: its joules are counted already.

        Raises:
            ValueError: the state is of an unknown version.
        """
        totals = Totals.from_state_dict(state["totals"])
        if self._fit and state.get("fit") == self._fit:
            return
        if "steps" in state:  # written by release 0.1
            totals.steps = int(state["steps"])
            totals.counts = {"sample": state["samples"]}
        self._base = totals
