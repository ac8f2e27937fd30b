"""What a run is going to time, and what it has timed, in words for people."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_estdgm.sparse.autotune._cases import Case, ConvCase, layer_key, layer_of
from lightning_estdgm.sparse.autotune._timing import ROUNDS, TURN_S, Timing, time_of_dense

_WARM_UP = 2
_AGAIN = 1.5  # times the rounds, as some cases are timed again


def plan_words(pending: Sequence[tuple[Case | ConvCase, int]]) -> str:
    """Return what is going to be timed: how many cases, of how many layers, and about how long.

    How long is told by one dense forward and backward of the largest case, which is timed for it.

    Args:
        pending: Cases that nothing answers yet, each with the number of implementations that are timed.
    """
    by_layer: dict[str, list[tuple[Case | ConvCase, int]]] = {}
    for case, names in pending:
        by_layer.setdefault(layer_key(layer_of(case)), []).append((case, names))
    largest = max((case for case, _ in pending), key=lambda case: case.flops)
    s_per_flop = time_of_dense(largest) / largest.flops
    most, seconds = 0, 0.0
    for cases in by_layer.values():
        count = _most_timed(len(cases))
        (case, names), *_ = cases
        most += count
        seconds += count * names * max(TURN_S, case.flops * s_per_flop) * (_WARM_UP + _AGAIN * ROUNDS)
    return (
        f"dense and sparse products are timed on this machine: up to {_count(most, 'case')} "
        f"({_count(len(by_layer), 'shape')} of layer and input), about {_rough(seconds)}"
    )


def _most_timed(densities: int) -> int:
    """Return how many of a layer's densities have to be timed at most: the ends, and those of a search in between."""
    return densities if densities <= 2 else 2 + (densities - 2).bit_length()


@dataclass
class TimingReport:
    """Cases timed since the last report.

    Attributes:
        timings: Their timings.
        seconds: How long all that took.
    """

    timings: list[Timing] = field(default_factory=list)
    seconds: float = 0.0

    def words(self) -> str:
        """Return what was timed, how long it took, and what casts doubt on it; empty if nothing was timed."""
        if not self.timings:
            return ""
        parts = [f"{_count(len(self.timings), 'case')} timed in {self.seconds:.1f} s"]
        if unsure := sum(not timing.agrees for timing in self.timings):
            parts.append(f"{unsure} with rounds that did not all say the same, timed again")
        text = "; ".join(parts) + "."
        busy = [timing for timing in self.timings if timing.busy]
        return f"{text} {_busy_words(busy, len(self.timings))}" if busy else text


def _busy_words(busy: Sequence[Timing], count: int) -> str:
    shares = [timing.own_share for timing in busy if timing.own_share is not None]
    loads = [timing.load for timing in busy if timing.load is not None]
    facts = []
    if shares:
        facts.append(f"this process had {min(shares):.0%} of its core")
    if loads:
        facts.append(f"load average {max(loads) * (os.cpu_count() or 1):.1f} on {_count(os.cpu_count() or 1, 'core')}")
    meanwhile = "meanwhile" if len(busy) == count else f"during {len(busy)} of them"
    return (
        f"The machine was busy {meanwhile} ({', '.join(facts)}): choices may be others where it is not, and are "
        "timed again by the next run that finds it calm."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _rough(seconds: float) -> str:
    return "1 s" if seconds < 1.5 else f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"
