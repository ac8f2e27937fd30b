"""`EnergyMeter`: the joules of any stretch of code, without Lightning."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from lightning_estdgm.energy._sampler import Sampler, check_seconds
from lightning_estdgm.energy._summary import joules_and_sources
from lightning_estdgm.energy._totals import Totals
from lightning_estdgm.energy.sources._protocol import EnergySource, listed, resolve

OUTSIDE = ""
"""Label of the energy outside all windows."""


class EnergyMeter:
    """Measures the energy of a ``with`` block: of all devices that this process sees, whoever else uses them.

    Figures are available during the block and after it. A meter may be used for several blocks, which add up.
    At the ends of blocks and windows it waits for the kernels that CUDA has queued on the current device.

    Args:
        sources: Names ("nvml", "rapl", "cpu-estimate") or `EnergySource` objects; None takes all that work
            here, and the CPU estimate only where the CPU is not measured.
        interval_s: Seconds between two readings of the background thread.

    Raises:
        TypeError: `sources` is no list, one of its objects is no source, or `interval_s` is no number.
        ValueError: `interval_s` is not positive, or no source has that name.

    Example:
        >>> from lightning_estdgm import EnergyMeter
        >>> with EnergyMeter(["cpu-estimate"]) as meter:
        ...     with meter.window("sum"):
        ...         total = sum(range(300_000))
        >>> meter.joules >= meter.by_window["sum"] > 0
        True
    """

    def __init__(self, sources: Iterable[str | EnergySource] | None = None, interval_s: float = 1.0) -> None:
        self._interval_s = check_seconds("interval_s", interval_s)
        self._sources = listed(sources)
        resolve(self._sources)
        self._base = Totals()
        self._sampler: Sampler | None = None
        self._last: Sampler | None = None
        self._labels: list[str] = []

    def __enter__(self) -> EnergyMeter:
        if self._sampler is not None:
            raise RuntimeError("this EnergyMeter is measuring already; use window() inside its block")
        self._labels = [OUTSIDE]
        _synchronize()
        self._sampler = self._last = Sampler(resolve(self._sources), interval_s=self._interval_s)
        self._sampler.start(OUTSIDE, "")
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._sampler is not None
        _synchronize()
        self._sampler.stop()
        self._base, self._sampler = self._totals(), None

    @contextlib.contextmanager
    def window(self, label: str) -> Iterator[None]:
        """Attribute the energy of this block to `label`; that of a nested window to the inner one alone.

        Raises:
            TypeError: `label` is no str.
            ValueError: `label` is empty.
            RuntimeError: The meter's own block is not entered.
        """
        if not isinstance(label, str):
            raise TypeError(f"label must be a str, got {label!r}")
        if not label:
            raise ValueError("label must not be empty")
        if self._sampler is None:
            raise RuntimeError("window() works inside the block of its EnergyMeter only")
        self._labels.append(label)
        self._switch()
        try:
            yield
        finally:
            self._labels.pop()
            self._switch()

    @property
    def joules(self) -> float | None:
        """Joules so far; None where nothing was read. `summary` tells how many of them are estimated."""
        return self._current().joules()

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return self._current().seconds

    @property
    def by_window(self) -> dict[str, float | None]:
        """Joules by label; windows of one label add up, and "" is the energy outside all windows."""
        totals = self._current()
        return {label: totals.joules(label=label) for label in totals.labels()}

    def summary(self) -> dict[str, Any]:
        """Return all figures in plain types: those of `EnergyMonitor.summary` that apply here, and sums by window."""
        totals = self._current()
        last = self._last
        active, unavailable, failing = (last.active, last.unavailable, last.failing()) if last else ([], [], ())
        return {
            **joules_and_sources(totals, active, unavailable, failing),
            "by_window": {label: totals.joules(label=label) for label in totals.labels()},
            "seconds_by_window": {label: totals.window_ns[label, ""] / 1e9 for label in totals.labels()},
        }

    def _switch(self) -> None:
        assert self._sampler is not None
        _synchronize()
        self._sampler.mark(self._labels[-1], "")

    def _current(self) -> Totals:
        if self._sampler is not None:
            self._sampler.read()
        return self._totals()

    def _totals(self) -> Totals:
        return self._base if self._sampler is None else self._base.add(self._sampler.totals())


def _synchronize() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
