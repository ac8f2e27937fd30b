"""`Pace`: how a run's steps become positions in its schedule, also where it was resumed with another length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Pace:
    """Straight line from the progress of a run, in steps as its loop counts them, to the position in its schedule.

    A new run has one position a step. A run that goes on with another length keeps the schedule that it was begun with
    and its position there, and goes through the rest of it in the steps that are left.

    Attributes:
        total_steps: length of the schedule.
        run: length of the run in steps, and of an epoch if the run is limited by epochs: what a resumed run compares.
        first: progress at which this pace begins.
        position: position in the schedule there.
        last: progress at which the schedule ends.

    """

    total_steps: int
    run: tuple[int, int | None]
    first: int
    position: int
    last: int

    @classmethod
    def even(cls, total_steps: int, epoch_steps: int | None = None) -> Pace:
        """Return the pace of a new run: one position a step."""
        return cls(total_steps, (total_steps, epoch_steps), 0, 0, total_steps)

    def position_at(self, progress: int) -> int:
        """Return the position in the schedule; after its end it grows by one a step."""
        done = progress - self.first
        if done <= 0 or self.last <= self.first:
            return self.position + max(0, done)
        if progress >= self.last:
            return self.total_steps + progress - self.last
        return self.position + done * (self.total_steps - self.position) // (self.last - self.first)

    def with_length(self, run: tuple[int, int | None], *, progress: int, position: int, left: int) -> Pace:
        """Return the pace of the same run with another length; its schedule ends with the last of `left` steps.

        A run whose schedule has ended stays past its end, whatever its new length.
        """
        left = max(0, left) if position < self.total_steps else 0
        return Pace(self.total_steps, run, progress, position, progress + left)

    def state_dict(self) -> dict[str, Any]:
        """Return the attributes as plain types."""
        return asdict(self) | {"run": list(self.run)}


def saved_pace(state: Mapping[str, Any]) -> Pace:
    """Return the pace in a controller's state; states of earlier versions hold the length only."""
    if "pace" not in state:
        return Pace.even(state["total_steps"])
    steps, epoch_steps = state["pace"]["run"]
    return Pace(**state["pace"] | {"run": (steps, epoch_steps)})
