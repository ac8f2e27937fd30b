"""Estimate of CPU energy from the process's own CPU time, for machines where nothing can be measured.

    joules = CPU seconds of this process * watts per busy core

Nothing is measured, and nothing is added for idle cores, memory, disks or fans. All threads of this process
count; child processes (data loader workers) do not.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Mapping

from lightning_estdgm.energy._reading import (
    DeviceId,
    DeviceInfo,
    Method,
    Reading,
    Scope,
    SourceUnavailable,
    Status,
    hostname,
)

WATTS_PER_CORE = 6.0
"""Assumed watts of one busy core. Rated package power by physical core is 4.4 W for a 280 W, 64-core server
part and 8.1 W for a 65 W, 8-core desktop part; 6 lies between, so the result may be off by a factor of two
either way."""

ENVIRONMENT = "ESTDGM_WATTS_PER_CORE"

_FIRST_NAMESPACE = 0xEFFFFFFC
"""Inode of the machine's own namespace of process numbers, PROC_PID_INIT_INO of Linux."""


class CpuEstimate:
    """Process CPU time times an assumed power; labelled *estimated* wherever it appears.

    Args:
        watts_per_core: Power of one busy core; None takes the environment variable ESTDGM_WATTS_PER_CORE,
            else 6.0.

    Raises:
        ValueError: `watts_per_core` is not a positive finite number. A bad environment variable is refused by
            `open`.

    Example:
        >>> source = CpuEstimate(watts_per_core=10.0)
        >>> source.open()
        >>> [reading.status.value for reading in source.read().values()]
        ['ok']
    """

    name = "cpu-estimate"
    method: Method = "estimated"
    scope: Scope = "process"
    update_period_s = 0.01
    driver = ""

    def __init__(self, watts_per_core: float | None = None) -> None:
        if watts_per_core is not None:
            _check_watts(watts_per_core, "watts_per_core")
        self._asked = watts_per_core
        self._watts = WATTS_PER_CORE
        self._device: DeviceId | None = None

    def open(self) -> None:
        """Choose the watts per core."""
        text = os.environ.get(ENVIRONMENT)
        if self._asked is not None:
            self._watts = float(self._asked)
        elif text:
            try:
                self._watts = _check_watts(float(text), ENVIRONMENT)
            except ValueError:
                raise SourceUnavailable(
                    Status.ERROR, f"{ENVIRONMENT} must be a positive number of watts, got {text!r}"
                ) from None
        self._device = DeviceId(hostname(), "cpu", _process())

    def devices(self) -> Mapping[DeviceId, DeviceInfo]:
        """Return the one device: the CPU as far as this process uses it."""
        if self._device is None:
            return {}
        text = f"estimate: this process's CPU time at {self._watts:g} W per busy core, no child processes"
        return {self._device: DeviceInfo(text)}

    def wrap_range_uj(self, device: DeviceId) -> int | None:
        """Return None: CPU time never wraps."""
        return None

    def read(self, devices: Collection[DeviceId] | None = None) -> Mapping[DeviceId, Reading]:
        """Read the CPU time of all threads of this process, as microjoules."""
        if self._device is None:
            return {}
        now_ns = time.monotonic_ns()
        if self._device.uid != _process():  # a fork has its own CPU time, from zero
            return {self._device: Reading(now_ns, status=Status.UNAVAILABLE)}
        return {self._device: Reading(now_ns, energy_uj=round(time.process_time_ns() * self._watts / 1000))}

    def close(self) -> None:
        """Forget the device; nothing is held."""
        self._device = None


def _process() -> str:
    """Return the name of this process, which no other one of the machine has; each container has a process 1."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = _FIRST_NAMESPACE
    inside = "" if namespace == _FIRST_NAMESPACE else f"{namespace}-"
    return f"process-{inside}{os.getpid()}"


def _check_watts(value: float, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{what} must be a positive number of watts, got {value!r}")
    return float(value)


SOURCE = CpuEstimate
