"""One process in which this package, Zeus and CodeCarbon look at the same GPUs of the NVML stand-in.

Prints one JSON object: by scenario and meter, the joules, or the exception's name.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from codecarbon import OfflineEmissionsTracker
from zeus.device import gpu as zeus_gpus
from zeus.monitor import ZeusMonitor

from helpers.energy_parts import AmdMachine, FakeAmd, FakeGpu, Machine, totals_over
from lightning_estdgm import EnergyMeter
from lightning_estdgm.energy.sources import amdsmi

A, B = "GPU-aaaa1111-0000", "GPU-bbbb2222-0000"

logging.disable(logging.CRITICAL)


class Ours:
    def start(self) -> None:
        self.meter = EnergyMeter(["nvml"], interval_s=3600.0)
        self.meter.__enter__()

    def stop(self) -> float | None:
        self.meter.__exit__(None, None, None)
        return self.meter.joules


class Zeus:
    def start(self) -> None:
        zeus_gpus._gpus = None  # else it keeps the GPUs that were visible when it was first asked
        self.monitor = ZeusMonitor(cpu_indices=[])
        self.monitor.begin_window("window", sync_execution=False)

    def stop(self) -> float:
        return sum(self.monitor.end_window("window", sync_execution=False).gpu_energy.values())


class CodeCarbon:
    def __init__(self, pue: float = 1.0) -> None:
        self.pue = pue

    def start(self) -> None:
        self.tracker = OfflineEmissionsTracker(
            country_iso_code="FRA",
            output_methods=[],
            measure_power_secs=3600,
            tracking_mode="machine",
            force_cpu_power=1,
            force_ram_power=1,
            allow_multiple_runs=True,
            pue=self.pue,
        )
        self.tracker.start()

    def stop(self) -> float:
        self.tracker.stop()
        return self.tracker.final_emissions_data.gpu_energy * 3.6e6


Show = Callable[[], None]


def compare(*shows: Show) -> dict[str, float | str | None]:
    """Start all meters on what the first call shows, and stop them on what the last one shows."""
    meters = {"ours": Ours(), "zeus": Zeus(), "codecarbon": CodeCarbon(), "codecarbon, PUE 1.5": CodeCarbon(pue=1.5)}
    results: dict[str, float | str | None] = {}
    shows[0]()
    for name, meter in meters.items():
        try:
            meter.start()
        except Exception as e:
            results[name] = type(e).__name__
    for show in shows[1:]:
        show()
    time.sleep(0.06)  # CodeCarbon leaves out what came in the last 50 ms before it is stopped
    for name, meter in meters.items():
        if name not in results:
            try:
                results[name] = meter.stop()
            except Exception as e:
                results[name] = type(e).__name__
    return results


def counters(a_mj: int, b_mj: int, **fields: int) -> Show:
    machine = Machine(Path(os.environ["FAKE_NVML"]))
    return lambda: machine.show(FakeGpu(A, mj=a_mj, **fields), FakeGpu(B, mj=b_mj, **fields))


def amd() -> dict[str, float]:
    """10^8 units of an AMD accumulator."""
    machine = AmdMachine(Path(os.environ["FAKE_AMD"]))
    machine.show(FakeAmd())
    source, zeus = amdsmi.SOURCE(), zeus_gpus.amd.AMDGPU(0)
    source.open()
    joules: list[float] = []

    def show(ticks: int) -> None:
        machine.show(FakeAmd(ticks=ticks, watts=0))
        joules.append(zeus.get_total_energy_consumption() / 1000)

    show(10**9)
    ours = totals_over(source, lambda: show(10**9 + 10**8)).joules()
    assert ours is not None
    machine.show(init=34)  # no AMD GPU from here on
    return {"ours": ours, "zeus": joules[1] - joules[0]}


def main() -> None:
    zeus_gpus.amd.amdsmi_is_available()  # this starts it
    found: dict[str, Any] = {
        "amd": amd(),
        "counters": compare(counters(5_000_000, 9_000_000), counters(5_123_456, 9_876_544)),
        "reset": compare(counters(5_000_000, 9_000_000), counters(1_000, 9_002_000)),
        "failing": compare(counters(5_000_000, 9_000_000), counters(5_002_000, 9_002_000, energy=999)),
    }
    os.environ["CUDA_VISIBLE_DEVICES"] = B
    found["by_uuid"] = compare(counters(5_000_000, 9_000_000), counters(5_123_456, 9_876_544))
    os.environ["CUDA_VISIBLE_DEVICES"] = "1"
    found["by_index"] = compare(counters(5_000_000, 9_000_000), counters(5_123_456, 9_876_544))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
