"""Real parts for the tests: a constant-power source, a RAPL tree, and the NVML stand-in's script."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lightning_estdgm.energy import DeviceId, Method, Reading, Scope, SourceUnavailable, Status


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

    def devices(self) -> Mapping[DeviceId, str]:
        return {self.device: f"constant {self.watts:g} W"}

    def wrap_range_uj(self, device: DeviceId) -> int | None:
        return None

    def read(self) -> Mapping[DeviceId, Reading]:
        self.events.append("read")
        if self.raises:
            raise OSError("the bus is gone")
        now = time.monotonic_ns()
        if self.status is not Status.OK:
            return {self.device: Reading(now, status=self.status)}
        return {self.device: Reading(now, energy_uj=round(now * self.watts / 1000))}

    def close(self) -> None:
        self.events.append("close")


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

    def line(self) -> str:
        values = (self.handle, self.energy, self.mj, self.instant, self.mw, self.usage, self.avg)
        return f"gpu {self.uuid} {' '.join(map(str, values))}"


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
