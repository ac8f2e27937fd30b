"""CPU and memory energy from RAPL (Intel and, from Linux 5.8, AMD) through the powercap file system.

Only zones that do not contain each other are added up: packages, and memory (dram), which is not inside a
package. psys contains the packages, which contain core and uncore; the MMIO tree shows the MSR tree's
packages once more.

A container sees the class folder (/sys/class/powercap, links side by side) or, bind-mounted, the device folder
(/sys/devices/virtual/powercap, with one folder per control type): both are understood.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lightning_estdgm.energy._counter_check import CounterCheck
from lightning_estdgm.energy._reading import (
    DeviceId,
    DeviceInfo,
    Kind,
    Method,
    Reading,
    Scope,
    SourceUnavailable,
    Status,
    hostname,
)
from lightning_estdgm.energy._sysfs import read_number, read_text

ROOT = "/sys/class/powercap"

ENVIRONMENT = "ESTDGM_POWERCAP"

PERMISSION_FIX = (
    "energy counters are readable by root only since Linux 5.10 (CVE-2020-8694). For now: "
    "`sudo chmod -R a+r {root}/intel-rapl*/`, or for a group that survives reboots a udev rule: "
    '`SUBSYSTEM=="powercap", ACTION=="add", RUN+="/bin/chgrp -R power /sys%p", '
    'RUN+="/bin/chmod -R g=u /sys%p"` '
    "with your user in the group `power`"
)


@dataclass(frozen=True)
class _Zone:
    path: Path
    kind: Kind
    uid: str  # "package-0", "package-0-die-1", "package-0/dram"
    mmio: bool
    range_uj: int | None
    check: CounterCheck = field(compare=False)


class Rapl:
    """Energy counters of the packages and the memory of this host, each once.

    Args:
        root: Folder of powercap, which a container may have bind-mounted elsewhere; None takes the
            environment variable ESTDGM_POWERCAP, else /sys/class/powercap.
    """

    name = "rapl"
    method: Method = "counter"
    scope: Scope = "host"
    update_period_s = 0.001
    driver = "powercap"

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self._root = Path((os.environ.get(ENVIRONMENT) or ROOT) if root is None else root)
        self._zones: dict[DeviceId, _Zone] = {}

    def open(self) -> None:
        """Find the zones; at least one must be readable."""
        zones = self._find()
        results = {zone.path: _try_energy(zone.path) for zone in zones}
        # Some machines show a zone (memory of client CPUs, all zones of a guest) that was never fed.
        zones = [zone for zone in zones if results[zone.path] != 0]
        results = {zone.path: results[zone.path] for zone in zones}
        if not zones:
            raise SourceUnavailable(
                Status.UNSUPPORTED, f"all energy counters in {self._root} read 0: a virtual machine does not feed them"
            )
        if not any(isinstance(result, int) for result in results.values()):
            path, failure = next(iter(results.items()))
            if any(isinstance(result, PermissionError) for result in results.values()):
                raise SourceUnavailable(
                    Status.NO_PERMISSION,
                    f"no permission to read {path}/energy_uj: " + PERMISSION_FIX.format(root=self._root),
                )
            raise SourceUnavailable(Status.UNAVAILABLE, f"{path}/energy_uj cannot be read: {failure}")
        host = hostname()
        self._zones = {DeviceId(host, zone.kind, zone.uid): zone for zone in _without_mirrors(zones)}

    def devices(self) -> Mapping[DeviceId, DeviceInfo]:
        """Return the packages and memory domains."""
        return {device: DeviceInfo(f"{zone.uid} ({zone.path.name})") for device, zone in self._zones.items()}

    def wrap_range_uj(self, device: DeviceId) -> int | None:
        """Return the zone's max_energy_range_uj."""
        return self._zones[device].range_uj

    def read(self, devices: Collection[DeviceId] | None = None) -> Mapping[DeviceId, Reading]:
        """Read the zones, one file each."""
        readings = {}
        for device, zone in self._zones.items():
            if devices is not None and device not in devices:
                continue
            result = _try_energy(zone.path)
            now_ns = time.monotonic_ns()
            if isinstance(result, int):
                status = zone.check.status(result, now_ns, _unknown_power)
                readings[device] = Reading(now_ns, energy_uj=result if status is Status.OK else None, status=status)
            elif isinstance(result, PermissionError):
                readings[device] = Reading(now_ns, status=Status.NO_PERMISSION)
            elif isinstance(result, FileNotFoundError):
                readings[device] = Reading(now_ns, status=Status.UNAVAILABLE)
            else:
                readings[device] = Reading(now_ns, status=Status.ERROR)
        return readings

    def close(self) -> None:
        """Forget the zones; nothing is held open."""
        self._zones = {}

    def _find(self) -> list[_Zone]:
        """Return all package and dram zones, MSR before MMIO, each name once."""
        try:
            entries = sorted(self._root.iterdir())
        except FileNotFoundError:
            raise SourceUnavailable(
                Status.UNAVAILABLE,
                f"{self._root} does not exist: no Linux, a virtual machine, or a kernel without powercap",
            ) from None
        except OSError as e:
            status = Status.NO_PERMISSION if isinstance(e, PermissionError) else Status.ERROR
            raise SourceUnavailable(status, f"{self._root} cannot be listed: {e}") from None
        entries += [child for e in entries if re.fullmatch(r"intel-rapl(-mmio)?", e.name) for child in _children(e)]
        found: dict[str, Path] = {}
        for entry in entries:
            # The class folder links to the zones of the device folder; of the two, take one that can be entered.
            if re.fullmatch(r"intel-rapl(-mmio)?:\d+", entry.name) and (
                entry.name not in found or read_text(found[entry.name] / "name") is None
            ):
                found[entry.name] = entry
        tops = sorted(found.values(), key=lambda path: ("mmio" in path.name, path.name))
        if not tops:
            raise SourceUnavailable(
                Status.UNAVAILABLE, f"{self._root} has no intel-rapl zones: the CPU or the machine shows none"
            )
        zones: dict[str, _Zone] = {}
        masked = 0
        for top in tops:
            name = read_text(top / "name")
            if name is None:
                masked += 1
                continue
            if not name.startswith("package"):
                continue  # psys holds the packages
            parts = [_zone(top, "cpu", name)]
            # Sub-zones lie inside the zone, and beside it as links; a bind mount may show only the one or
            # the other.
            subs = {p.name: p for p in [*entries, *_children(top)] if p.name.startswith(f"{top.name}:")}
            parts += [
                _zone(sub, "dram", f"{name}/dram")
                for _, sub in sorted(subs.items())
                if read_text(sub / "name") == "dram"
            ]
            for zone in parts:
                seen = zones.get(zone.uid)
                is_unfed = seen is not None and _try_energy(seen.path) == 0
                if seen is None or (zone.mmio and is_unfed):
                    zones[zone.uid] = zone
                elif not zone.mmio:  # two sockets that share a name are two devices; MMIO is the same one again
                    zone = replace(zone, uid=f"{zone.uid}@{zone.path.name}")
                    zones[zone.uid] = zone
        if not zones:
            why = (
                f"the zones in {self._root} cannot be entered: a container runtime masks them; mount the host's "
                f"/sys/devices/virtual/powercap at another place, such as /host/powercap, and set {ENVIRONMENT} to it"
                if masked
                else f"{self._root} has no package zone"
            )
            raise SourceUnavailable(Status.UNAVAILABLE, why)
        return list(zones.values())


def _zone(path: Path, kind: Kind, uid: str) -> _Zone:
    text = read_text(path / "max_energy_range_uj")
    range_uj = int(text) if text is not None and text.isdigit() and int(text) > 0 else None
    return _Zone(path, kind, uid, "mmio" in path.name, range_uj, CounterCheck(f"RAPL zone {uid}"))


def _children(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except OSError:
        return []


def _try_energy(zone: Path) -> int | OSError | ValueError:
    return read_number(zone / "energy_uj")


def _unknown_power() -> None:
    return None


def _without_mirrors(zones: list[_Zone]) -> list[_Zone]:
    """Drop dies and sockets that show another one's counter.

    Some machines show one counter under several zones of a kind. Two counters that are independent do not
    agree to the microjoule: a zone whose value lies between two readings of another one, taken right before
    and after it, is the same counter.
    """
    kept: list[_Zone] = []
    for zone in zones:
        for other in kept:
            if other.kind != zone.kind:
                continue
            before, value, after = _try_energy(other.path), _try_energy(zone.path), _try_energy(other.path)
            if (
                isinstance(before, int)
                and isinstance(value, int)
                and isinstance(after, int)
                and before <= value <= after
            ):
                break
        else:
            kept.append(zone)
    return kept


SOURCE = Rapl
