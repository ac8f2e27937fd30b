"""Real parts for the tests: a constant-power source, a RAPL tree, and the NVML stand-in's script."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from lightning_estdgm.energy._accumulator import Accumulator
from lightning_estdgm.energy._reading import DeviceId, DeviceInfo, Method, Reading, Scope, SourceUnavailable, Status
from lightning_estdgm.energy._sampler import Sampler
from lightning_estdgm.energy._source_set import Select
from lightning_estdgm.energy._totals import Totals
from lightning_estdgm.energy.sources._protocol import EnergySource

NEVER_S = 3600.0
"""An interval in which a sampler's thread never gets to read."""


@dataclass
class ConstantPower:
    """A counter that runs at `watts` of wall time, so joules over covered seconds are known in advance."""

    watts: float = 100.0
    name: str = "constant"
    method: Method = "counter"
    scope: Scope = "host"
    kind: str = "gpu"
    uid: str = "c0"
    update_period_s: float = 0.0
    driver: str = "constant 1.0"
    info: DeviceInfo | None = None
    absent: SourceUnavailable | None = None
    status: Status = Status.OK
    raises: bool = False
    events: list[str] = field(default_factory=list)

    @property
    def device(self) -> DeviceId:
        return DeviceId("host", self.kind, self.uid)  # type: ignore[arg-type]

    def open(self) -> None:
        if self.absent is not None:
            raise self.absent
        self.events.append("open")

    def devices(self) -> Mapping[DeviceId, DeviceInfo]:
        return {self.device: self.info or DeviceInfo(f"constant {self.watts:g} W")}

    def wrap_range_uj(self, device: DeviceId) -> int | None:
        return None

    def read(self, devices: Collection[DeviceId] | None = None) -> Mapping[DeviceId, Reading]:
        self.events.append("read")
        if self.raises:
            raise OSError("the bus is gone")
        now = time.monotonic_ns()
        if self.status is not Status.OK:
            return {self.device: Reading(now, status=self.status)}
        return {self.device: Reading(now, energy_uj=round(now * self.watts / 1000))}

    def close(self) -> None:
        self.events.append("close")


def started_sampler(
    *sources: ConstantPower | SourceUnavailable, interval_s: float = NEVER_S, select: Select | None = None
) -> Sampler:
    """A sampler that runs; by default its thread never gets to read, so that the test alone does."""
    sampler = Sampler([(getattr(s, "name", "gone"), s) for s in sources], interval_s=interval_s)
    sampler.open(select)
    sampler.start("train", "train")
    return sampler


def totals_over(source: EnergySource, *changes: Callable[[], object]) -> Totals:
    """Read an open source once, then once more after each change: what the accumulator makes of it."""
    accumulator = Accumulator()
    for device in source.devices():
        wrap_range_uj = source.wrap_range_uj(device)
        accumulator.add_device(device, source=source.name, method=source.method, wrap_range_uj=wrap_range_uj)
    accumulator.switch(time.monotonic_ns(), "train", "train")
    accumulator.update(time.monotonic_ns(), source.read())
    for change in changes:
        change()
        accumulator.update(time.monotonic_ns(), source.read())
    return accumulator.totals()


def rapl_zone(root: Path, zone: str, name: str, energy_uj: int | None, range_uj: int | None = 262143328850) -> Path:
    """Add one zone as the kernel shows it: sub-zones inside their parent, and a link beside it."""
    parts = zone.split(":")
    parent = root / ":".join(parts[:2]) if len(parts) == 3 else root
    path = parent / zone
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    if energy_uj is not None:
        (path / "energy_uj").write_text(f"{energy_uj}\n")
    if range_uj is not None:
        (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    if parent is not root:
        (root / zone).symlink_to(path, target_is_directory=True)
    return path


@dataclass
class FakeGpu:
    """One line of the NVML stand-in's script; codes are NVML's."""

    uuid: str
    handle: int = 0
    energy: int = 0
    mj: int = 1_000_000
    instant: int = 0
    mw: int = 300_000
    usage: int = 0
    avg: int = 250_000
    watts: int = 0  # the counter runs by itself, on the monotonic clock
    pci: str = "00000000:C1:00.0"
    mig: int = -1
    name: str = "Fake GPU"

    def line(self) -> str:
        values = (self.handle, self.energy, self.mj, self.instant, self.mw, self.usage, self.avg, self.watts, self.pci)
        return f"gpu {self.uuid} {' '.join(map(str, values))} {self.mig} {self.name}"


@dataclass
class Machine:
    """The machine that the NVML stand-in shows."""

    script: Path

    def show(self, *gpus: FakeGpu, init: int = 0, mig: Iterable[tuple[str, int]] = ()) -> None:
        lines = [f"init {init}", *(g.line() for g in gpus), *(f"mig {uuid} {parent}" for uuid, parent in mig)]
        # The stand-in may read at any moment: replace the file, never truncate it.
        new = self.script.with_suffix(".new")
        new.write_text("\n".join(lines) + "\n")
        new.replace(self.script)


@dataclass
class FakeAmd:
    """One line of the AMD stand-in's script; codes are those of the library that reads it."""

    pci: str = "0000:c1:00.0"
    energy: int = 0
    ticks: int = 1_000_000
    watts: int = 500
    power: int = 0
    current: int = 490
    average: int = 0xFFFF
    hip: int = 0
    unique: str = "1122334455667788"
    name: str = "AMD Instinct MI300X"

    def line(self) -> str:
        values = (self.energy, self.ticks, self.watts, self.power, self.current, self.average, self.hip, self.unique)
        return f"gpu {self.pci} {' '.join(map(str, values))} {self.name}"


@dataclass
class AmdMachine:
    """The machine that the AMD stand-in shows."""

    script: Path

    def show(self, *gpus: FakeAmd, init: int = 0) -> None:
        new = self.script.with_suffix(".new")
        new.write_text("\n".join([f"init {init}", *(g.line() for g in gpus)]) + "\n")
        new.replace(self.script)


def forget_amdsmi() -> dict[str, ModuleType]:
    """Take amdsmi out of the imported modules: it looks for its library when it is imported."""
    names = [name for name in sys.modules if name.partition(".")[0] == "amdsmi"]
    return {name: sys.modules.pop(name) for name in names}


def compile_library(source: Path, library: Path, *options: str) -> None:
    compiler = shutil.which("cc")
    assert compiler is not None, "the energy tests build stand-ins of vendors' libraries: they need a C compiler"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", *options, "-o", str(library), str(source)], check=True)
