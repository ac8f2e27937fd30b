"""NVIDIA Grace CPUs: the socket power of the ACPI power meters in hwmon, integrated.

Meters contain each other: the module (Grace and GPU) contains the Grace socket, which contains the CPU rail, the
SysIO rail and the memory. The Grace socket is read. On a GH200 the GPU's own energy counter covers the whole
module already (see `lightning_estdgm.energy.sources.nvml`), so there this source is not used beside it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from lightning_estdgm.energy._hwmon import HwmonSensors, Sensor
from lightning_estdgm.energy._reading import DeviceInfo, Kind, Method, SourceUnavailable, Status
from lightning_estdgm.energy._sysfs import read_text

HWMON = "/sys/class/hwmon"

_LABEL = re.compile(r"(grace|cpu) power socket (\d+)", re.IGNORECASE)


class GraceHwmon(HwmonSensors):
    """Grace sockets, each once: with memory where the meter has it, else the CPU rail alone.

    Args:
        root: Folder of hwmon.
    """

    name = "hwmon-grace"
    method: Method = "integrated"
    kind: Kind = "cpu"
    update_period_s = 0.1
    driver = "acpi_power_meter"

    def __init__(self, root: str | os.PathLike[str] = HWMON) -> None:
        super().__init__()
        self._root = Path(root)

    def _find(self) -> dict[str, Sensor]:
        found: dict[str, tuple[str, Path]] = {}
        for path in sorted(self._root.glob("hwmon*/device/power*_oem_info")):
            label = _LABEL.fullmatch(read_text(path) or "")
            if label is None:
                continue
            part, socket = label.group(1).lower(), label.group(2)
            if part == "grace" or socket not in found:
                found[socket] = (part, path.with_name(path.name.replace("_oem_info", "_average")))
        if not found:
            raise SourceUnavailable(
                Status.UNAVAILABLE,
                f"{self._root} has no power meter of a Grace socket: another CPU, or the kernel lacks "
                "CONFIG_SENSORS_ACPI_POWER",
            )
        sensors = {}
        for socket, (part, path) in found.items():
            whole = part == "grace"
            text = f"Grace socket {socket}, averaged power {'with memory' if whole else 'of the CPU rail alone'}"
            sensors[f"grace-{socket}"] = Sensor(path, "power", DeviceInfo(text, covers=("dram",) if whole else ()))
        return sensors


SOURCE = GraceHwmon
