"""Runs whose joules include those of another run, since one EnergyMonitor adds up over the fits of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_estdgm.tools.report._finished_run import FinishedRun
from lightning_estdgm.tools.report._words import text


@dataclass(frozen=True)
class AddedFits:
    """A run whose joules include fits of other runs.

    Attributes:
        run: Folder of the run.
        others: Folders of the others.
    """

    run: Path
    others: tuple[Path, ...]

    def sentence(self, names: Mapping[Path, str]) -> str:
        """Return it in words, with the way out.

        Args:
            names: Name of each run by its folder.
        """
        others = text([names[path] for path in self.others])
        return (
            f"the joules of {names[self.run]} include a fit of {others}: one EnergyMonitor adds up over all its fits. "
            "Give each run a new EnergyMonitor"
        )


def added_fits_of(runs: Sequence[FinishedRun]) -> tuple[AddedFits, ...]:
    """Return the runs that hold a fit of another run, and more steps than they came to.

    A run that was resumed holds the fits before it as well. Its steps are those of all of them, so its joules belong
    to it.
    """
    found = []
    for run in runs:
        others = tuple(other.path for other in runs if other is not run and run.fits.keys() & other.fits.keys())
        if others and _has_more_steps_than_its_own(run):
            found.append(AddedFits(run.path, others))
    return tuple(found)


def _has_more_steps_than_its_own(run: FinishedRun) -> bool:
    counted, own = run.energy.get("steps"), run.run.get("global_step")
    return isinstance(counted, int) and isinstance(own, int) and counted > own
