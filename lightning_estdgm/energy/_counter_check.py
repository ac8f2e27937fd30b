"""Check that a hardware counter counts: those of GPUs and CPUs have been seen to stand still and to jump.

ROCm/amdsmi issues 22, 38 and 115 tell of counters that keep one value under full load, or go back. A counter
that stands still would show 0 J for a device at work, so its readings are dropped and show as a gap.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from lightning_estdgm.energy._reading import Status

STILL_NS = 500_000_000
"""Longer than any known counter takes to be renewed (NVML: 20 to 100 ms)."""

MOST_W = 3000
"""No single device draws more: a counter that ran faster was set anew, or is wrong."""

_log = logging.getLogger(__name__)


def is_plausible(power_mw: int) -> bool:
    """Return whether a device that is switched on can draw this power, in milliwatts.

    0 W is a sensor that does not answer; drivers give 65535 W and 2^32 - 1 mW where they have no value.
    """
    return 0 < power_mw <= MOST_W * 1000


class CounterCheck:
    """Check of the readings of one counter; logs once that it stands still or jumps.

    Args:
        label: Name of the device in the log.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._energy_uj: int | None = None
        self._moved_ns = 0
        self._warned = False

    def status(self, energy_uj: int, now_ns: int, power_mw: Callable[[], int | None]) -> Status:
        """Return OK, or UNAVAILABLE for a reading that must not be counted.

        Args:
            energy_uj: Counter in microjoules.
            now_ns: `time.monotonic_ns()` of the reading.
            power_mw: Returns the device's power in milliwatts, None where unknown; called only where the counter
                did not move. A device that draws 0 mW may keep its counter still; one of unknown power may not,
                since whatever is switched on draws some.
        """
        last_uj, since_ns = self._energy_uj, now_ns - self._moved_ns
        if last_uj == energy_uj:
            if since_ns <= STILL_NS:
                return Status.OK
            power = power_mw()
            if power == 0:
                return Status.OK
            draws = "" if power is None else f" while it draws {power / 1000:g} W"
            return self._refuse(f"stands still{draws}")
        self._energy_uj, self._moved_ns = energy_uj, now_ns
        # A second more than passed: a renewal may carry the energy of the time before the last reading.
        if last_uj is not None and (energy_uj - last_uj) * 1000 > MOST_W * (since_ns + 1_000_000_000):
            return self._refuse(f"jumped by {(energy_uj - last_uj) / 1e6:g} J in {since_ns / 1e9:g} s")
        return Status.OK

    def _refuse(self, why: str) -> Status:
        if not self._warned:
            _log.warning("The energy counter of %s %s: not counted, shown as a gap.", self._label, why)
            self._warned = True
        return Status.UNAVAILABLE
