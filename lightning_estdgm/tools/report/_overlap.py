"""Runs that used one counter at the same time, so that each one's joules hold the other's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from lightning_estdgm.tools.report._finished_run import FinishedRun
from lightning_estdgm.tools.report._words import text

_MOST = 3
"""Number of pairs of runs that are named; more are counted."""


@dataclass(frozen=True)
class Overlap:
    """Two runs that overlap in time and read a device both.

    Attributes:
        runs: Folders of the two.
        seconds: Time for which both ran.
        devices: Devices that both read, as "kind uid on host".
    """

    runs: tuple[Path, Path]
    seconds: float
    devices: tuple[str, ...]

    def sentence(self, names: Mapping[Path, str]) -> str:
        """Return the overlap in words.

        Args:
            names: Name of each run by its folder.
        """
        first, second = (names[path] for path in self.runs)
        return (
            f"{first} and {second} ran at the same time for {self.seconds:.3g} s and both read {text(self.devices)}: "
            "the joules of each include the other's"
        )


def overlaps_of(runs: Sequence[FinishedRun]) -> tuple[Overlap, ...]:
    """Return the pairs of runs that used one counter at the same time.

    Fits that two runs share, such as one that both were resumed from, are no overlap. Estimates are of a process
    alone: those of two containers, whose process ids may be equal, hold nothing of each other. Runs whose files do not
    state the times of their fits are taken to have had the machine to themselves.
    """
    found = []
    for one, other in combinations(runs, 2):
        seconds = _seconds_together(one, other)
        devices = one.counted_devices & other.counted_devices
        if seconds > 0 and devices:
            named = tuple(f"{kind} {uid} on {host}" for host, kind, uid in sorted(devices))
            found.append(Overlap((one.path, other.path), seconds, named))
    return tuple(found)


def some(sentences: Iterable[str]) -> list[str]:
    """Return the first few of the sentences on overlaps, and how many more there are."""
    every = list(sentences)
    more = len(every) - _MOST
    return every[:_MOST] + ([f"{more} more pairs of runs used one counter at the same time"] if more > 0 else [])


def _seconds_together(one: FinishedRun, other: FinishedRun) -> float:
    spans = [
        (mine, yours)
        for fit, mine in one.fits.items()
        for another, yours in other.fits.items()
        if fit not in other.fits and another not in one.fits
    ]
    return sum(max(0.0, (min(mine[1], yours[1]) - max(mine[0], yours[0])).total_seconds()) for mine, yours in spans)
