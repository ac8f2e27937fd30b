"""Timing of a case: dense and sparse in turns, compared turn by turn, and how busy the machine was meanwhile."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lightning_estdgm.sparse.autotune._cases import DENSE, Case, ConvCase

MARGIN = 0.05
"""By what share of the dense time a sparse backend must be faster: noise must not choose it."""

TIE = 0.02
"""By what share of the time of one sparse backend a later one must be faster: of equals, the first counts."""

ROUNDS, AGAIN = 5, 3
"""Rounds of turns where all of them agree, and how many times as many there are at most where they do not."""

LONG_S, LONG_ROUNDS = 0.2, 3
"""A round this long has little noise and costs much: fewer rounds are enough where they agree."""

TURN_S, MOST_CALLS = 1e-3, 50
"""A turn is as many calls as take about this long, up to a number: a single short call is mostly the clock's noise."""

OWN_SHARE = 0.9
"""Below this share of the time on a core, other processes took the rest: the machine was busy."""

LOAD, CALM = 1.25, 0.5
"""Load average for each core above which a machine is busy, and below which it certainly is not."""


@dataclass(frozen=True)
class Stopwatch:
    """Clocks that a case is timed with.

    Attributes:
        wall: Seconds that pass.
        own: Seconds that the calling thread computes.
        load: Load average for each core, None where the system has none.
    """

    wall: Callable[[], float] = time.perf_counter
    own: Callable[[], float] = time.thread_time
    load: Callable[[], float | None] = lambda: load_per_core()


def load_per_core() -> float | None:
    """Return the number of processes of the last minute that ran or waited to run, for each core of the machine."""
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else None


@dataclass(frozen=True)
class Timing:
    """Turns of a case, of the first name (dense) and of others that are compared with it.

    Attributes:
        turns: Seconds of forward and backward by name; turns of one place in their lists followed each other.
        own_share: Share of the time that the timing thread computed, None where that says nothing (on a GPU).
        load: Load average for each core at the end; None if unknown.
    """

    turns: Mapping[str, Sequence[float]]
    own_share: float | None = None
    load: float | None = None

    @classmethod
    def of(cls, found: Timing | Mapping[str, float]) -> Timing:
        """Return a timing as it is, and seconds by name as a timing of one turn each."""
        return found if isinstance(found, Timing) else cls({name: (seconds,) for name, seconds in found.items()})

    @property
    def busy(self) -> bool:
        """Whether other processes loaded the machine."""
        kept_waiting = self.own_share is not None and self.own_share < OWN_SHARE
        return kept_waiting or (self.load is not None and self.load > LOAD)

    @property
    def seconds(self) -> dict[str, float]:
        """Median of the first name's turns; of each other, that times the median of its ratio to the first."""
        first_s = statistics.median(self.turns[self._first])
        return {name: first_s * statistics.median(self.ratios(name)) for name in self.turns}

    @property
    def others(self) -> list[str]:
        """Names that are compared with the first, the fastest first; of equals, in their order."""
        return sorted(list(self.turns)[1:], key=lambda name: statistics.median(self.ratios(name)))

    @property
    def _first(self) -> str:
        return next(iter(self.turns))

    def ratios(self, name: str, to: str | None = None) -> list[float]:
        """Ratio of the time of `name` to that of another (the first) in each round."""
        base = self.turns[self._first if to is None else to]
        return [mine / theirs for mine, theirs in zip(self.turns[name], base, strict=True)]

    def middle(self, name: str, to: str | None = None) -> tuple[float, float]:
        """Bounds of the middle half of `ratios`."""
        ratios = self.ratios(name, to)
        if len(ratios) == 1:
            return ratios[0], ratios[0]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high

    def wins(self, name: str, against: str | None = None) -> bool:
        """Whether `name` is faster than another (the first) by more than a margin, and its turns leave no doubt."""
        return self.middle(name, against)[1] <= _threshold(against)

    @property
    def agrees(self) -> bool:
        """Whether every round says the same: of the fastest and the first, and if it wins, of it and the others."""
        if not (others := self.others):
            return True
        fastest, *slower = others
        if not _one_side(self.ratios(fastest), _threshold(None)):
            return False
        if not self.wins(fastest):
            return True
        place = list(self.turns).index
        pairs = [sorted((fastest, name), key=place) for name in slower]
        return all(_one_side(self.ratios(later, earlier), _threshold(earlier)) for earlier, later in pairs)


def _threshold(against: str | None) -> float:
    return 1.0 - (MARGIN if against is None else TIE)


def _one_side(ratios: Sequence[float], threshold: float) -> bool:
    return max(ratios) <= threshold or min(ratios) > threshold


def measure_case(
    case: Case | ConvCase, names: Sequence[str], *, rounds: int | None = None, stopwatch: Stopwatch | None = None
) -> Timing:
    """Time one forward and backward of a case by each name, in turns.

    Dense is the layer's own forward with a masked weight, everything else its sparse operator, with all gradients, on
    random data of the case's shape, memory format and dtype, autocast off. Two rounds warm up
    caches, pages of memory, threads, and what compiles on first use. Then each round times all names one after the
    other, every other round in reverse, so that none always comes first, and a slow moment of the machine hits all of
    them. Where the rounds do not all say the same, the case is timed again, up to `AGAIN` times as many rounds.

    Neither the global random state nor any ``.grad`` is touched, and ambient ``no_grad``, ``inference_mode`` and
    autocast do not matter.

    Args:
        case: Layer, input and density to time.
        names: Names of backends, ``"dense"`` included where wanted; the first is what the others are compared with.
        rounds: Rounds where all agree; None: `ROUNDS`, or `LONG_ROUNDS` of long ones.
        stopwatch: Clocks; None: those of the machine.
    """
    device, watch = case.device, stopwatch or Stopwatch()
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        problem = case.problem()
        for leaf in problem.leaves:
            leaf.requires_grad_()

        def turn(name: str, calls: int = 1) -> float:
            _synchronize(device)
            start = watch.wall()
            for _ in range(calls):
                torch.autograd.grad(problem.forward(name), problem.leaves, problem.dy)
            _synchronize(device)
            return (watch.wall() - start) / calls

        def a_round(order: Sequence[str], calls: int = 1) -> dict[str, float]:
            return {name: turn(name, calls) for name in order}

        a_round(names)
        once = a_round(names)
        fewest = rounds or (ROUNDS if sum(once.values()) < LONG_S else LONG_ROUNDS)
        calls = max(1, min(MOST_CALLS, math.ceil(TURN_S / max(once[names[0]], 1e-9))))
        turns: dict[str, list[float]] = {name: [] for name in names}
        wall_s, own_s = watch.wall(), watch.own()
        for number in range(1, AGAIN * fewest + 1):
            for name, seconds in a_round(names if number % 2 else names[::-1], calls).items():
                turns[name].append(seconds)
            if number >= fewest and Timing(turns).agrees:
                break
        wall_s, own_s = watch.wall() - wall_s, watch.own() - own_s
    # A GPU's backward runs in another thread, which waits for it.
    own_share = own_s / wall_s if device.type == "cpu" and wall_s > 0 else None
    return Timing(turns, own_share, watch.load())


def time_of_dense(case: Case | ConvCase, stopwatch: Stopwatch | None = None) -> float:
    """Return the seconds of one dense forward and backward, roughly: how long timings will take is told by it."""
    return measure_case(case, [DENSE], rounds=1, stopwatch=stopwatch).seconds[DENSE]


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
