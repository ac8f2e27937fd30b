"""Sensors of the kernel's hwmon tree."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lightning_estdgm.energy._counter_check import CounterCheck, is_plausible
from lightning_estdgm.energy._reading import (
    DeviceId,
    DeviceInfo,
    Kind,
    Reading,
    Scope,
    SourceUnavailable,
    Status,
    hostname,
)
from lightning_estdgm.energy._sysfs import read_number, read_text

DRM = "/sys/class/drm"

_PCI = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


@dataclass(frozen=True)
class Card:
    """A graphics card and one of its hwmon folders.

    Attributes:
        pci: PCI address.
        device: Folder of the device.
        hwmon: Folder of the sensors.
    """

    pci: str
    device: Path
    hwmon: Path


def cards(root: str | os.PathLike[str], drivers: tuple[str, ...]) -> list[Card]:
    """Return the cards with a hwmon folder of one of the drivers.

    Args:
        root: Folder of the cards, /sys/class/drm.
        drivers: Names of the drivers.

    Raises:
        SourceUnavailable: There is no such folder, or no such card.
    """
    folder = Path(root)
    try:
        entries = sorted(p for p in folder.iterdir() if re.fullmatch(r"card\d+", p.name))
    except FileNotFoundError:
        raise SourceUnavailable(
            Status.UNAVAILABLE, f"{folder} does not exist: no Linux, or no graphics driver is loaded"
        ) from None
    except OSError as e:
        status = Status.NO_PERMISSION if isinstance(e, PermissionError) else Status.ERROR
        raise SourceUnavailable(status, f"{folder} cannot be listed: {e}") from None
    found = []
    for entry in entries:
        device = entry / "device"
        address = _PCI.fullmatch(os.path.realpath(device).rsplit("/", 1)[-1].lower())
        if address is not None:
            folders = sorted(device.glob("hwmon/hwmon*"))
            found += [Card(address.group(), device, path) for path in folders if read_text(path / "name") in drivers]
    if not found:
        masked = sum(not (entry / "device").exists() for entry in entries)
        why = (
            f"the {masked} cards in {folder} cannot be entered: a container runtime masks them; mount /sys into it"
            if masked
            else f"{folder} shows no card of the driver {' or '.join(drivers)}"
        )
        raise SourceUnavailable(Status.UNAVAILABLE, why)
    return found


@dataclass
class Sensor:
    """One file of energy or power.

    Attributes:
        path: File with a whole number of microjoules or microwatts.
        quantity: "energy" or "power".
        info: Device that it belongs to.
        check: Check of a counter's readings.
    """

    path: Path
    quantity: Literal["energy", "power"]
    info: DeviceInfo
    check: CounterCheck = field(init=False)

    def __post_init__(self) -> None:
        self.check = CounterCheck(self.info.name)


class HwmonSensors:
    """Base of the sources that read hwmon files, which a subclass finds in `_find`."""

    name: str
    scope: Scope = "host"
    kind: Kind = "gpu"
    driver = ""

    def __init__(self) -> None:
        self._sensors: dict[DeviceId, Sensor] = {}

    def _find(self) -> dict[str, Sensor]:
        """Return the sensors by uid; raise `SourceUnavailable` where there is none."""
        raise NotImplementedError

    def open(self) -> None:
        """Find the sensors; at least one must be readable."""
        sensors = self._find()
        results = {uid: read_number(sensor.path) for uid, sensor in sensors.items()}
        if not any(isinstance(result, int) for result in results.values()):
            uid, result = next(iter(results.items()))
            path = sensors[uid].path
            if isinstance(result, PermissionError):
                raise SourceUnavailable(
                    Status.NO_PERMISSION, f"no permission to read {path}: as root, `chmod a+r {path}`"
                )
            raise SourceUnavailable(Status.UNAVAILABLE, f"{path} cannot be read: {result}")
        host = hostname()
        self._sensors = {DeviceId(host, self.kind, uid): sensor for uid, sensor in sensors.items()}

    def devices(self) -> Mapping[DeviceId, DeviceInfo]:
        """Return the devices of the sensors that were found."""
        return {device: sensor.info for device, sensor in self._sensors.items()}

    def wrap_range_uj(self, device: DeviceId) -> int | None:
        """Return None: the kernel extends counters that wrap in hardware to 64 bits."""
        return None

    def read(self, devices: Collection[DeviceId] | None = None) -> Mapping[DeviceId, Reading]:
        """Read the sensors, one file each. One whose file is gone is sought: drivers that load again number anew."""
        readings = {d: _read(sensor) for d, sensor in self._sensors.items() if devices is None or d in devices}
        for device, reading in readings.items():
            if reading.status is Status.UNAVAILABLE and not self._sensors[device].path.exists():
                with contextlib.suppress(SourceUnavailable):
                    self._sensors[device] = self._find().get(device.uid, self._sensors[device])
        return readings

    def close(self) -> None:
        """Forget the sensors; nothing is held open."""
        self._sensors = {}


def _read(sensor: Sensor) -> Reading:
    result = read_number(sensor.path)
    now_ns = time.monotonic_ns()
    if isinstance(result, PermissionError):
        return Reading(now_ns, status=Status.NO_PERMISSION)
    if isinstance(result, FileNotFoundError):
        return Reading(now_ns, status=Status.UNAVAILABLE)
    if not isinstance(result, int) or result < 0:
        return Reading(now_ns, status=Status.ERROR)
    if sensor.quantity == "energy":
        status = sensor.check.status(result, now_ns, lambda: None)
        return Reading(now_ns, energy_uj=result if status is Status.OK else None, status=status)
    if not is_plausible(result // 1000):
        return Reading(now_ns, status=Status.ERROR)
    return Reading(now_ns, power_mw=result // 1000)
