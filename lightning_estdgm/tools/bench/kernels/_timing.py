"""Seconds of a call on a CPU or a GPU, several calls in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

METHOD = {
    "cpu": "one call to warm up, then turns of one call each; the fastest turn counts",
    "cuda": "two calls to warm up, then turns of several calls, each between two events after its L2 cache was "
    "overwritten; the median of a turn, and the fastest turn counts",
}
"""Description of the timing by `take_turns`, by kind of device."""

_CACHE_BYTES = 256 * 2**20  # more than the L2 cache of any GPU so far
_TURN_S = 0.02  # calls of a GPU turn together take about this long
_MOST_CALLS = 50


def take_turns(calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Return the seconds of each call; they take turns, so that a slow moment of the machine hits all of them.

    Args:
        calls: functions to time, by name.
        device: device that they compute on.
        rounds: turns of each, at least 1.

    """
    turn = _gpu_turns(calls, device) if device.type == "cuda" else _cpu_turn
    if device.type != "cuda":
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(turn(call))
    return {name: min(taken) for name, taken in seconds.items()}


def _cpu_turn(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gpu_turns(
    calls: Mapping[str, Callable[[], object]], device: torch.device
) -> Callable[[Callable[[], object]], float]:
    cache = torch.empty(_CACHE_BYTES, dtype=torch.int8, device=device)
    count = {}
    for call in calls.values():
        call()
        once_s = statistics.median(_between_events(call, cache, 3))
        count[call] = max(3, min(_MOST_CALLS, round(_TURN_S / max(once_s, 1e-6))))
    return lambda call: statistics.median(_between_events(call, cache, count[call]))


def _between_events(call: Callable[[], object], cache: Tensor, count: int) -> list[float]:
    """Return the seconds of `count` calls on the GPU, each with a cold L2 cache; wait for it once, at the end."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        cache.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(cache.device)
    return [start.elapsed_time(end) / 1e3 for start, end in events]
