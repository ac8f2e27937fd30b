"""AMD GPUs without ROCm: the power that the kernel driver amdgpu shows in hwmon, integrated."""

from __future__ import annotations

import os
from dataclasses import replace

from lightning_estdgm.energy._amd_visibility import KFD, AmdGpu, hip_order, no_visible_gpu, visible_gpus
from lightning_estdgm.energy._hwmon import DRM, Card, HwmonSensors, Sensor, cards
from lightning_estdgm.energy._reading import DeviceInfo, Method, SourceUnavailable, Status
from lightning_estdgm.energy._sysfs import read_number, read_text


class AmdHwmon(HwmonSensors):
    """Discrete AMD GPUs that this process may use, by PCI address.

    An integrated GPU is left out: its power is that of the whole socket, which RAPL counts.

    Args:
        root: Folder of the cards.
        kfd: Folder of ROCm's nodes, for HIP's order.
    """

    name = "hwmon-amd"
    method: Method = "integrated"
    update_period_s = 0.1
    driver = "amdgpu"

    def __init__(self, root: str | os.PathLike[str] = DRM, kfd: str | os.PathLike[str] = KFD) -> None:
        super().__init__()
        self._root = root
        self._kfd = kfd

    def _find(self) -> dict[str, Sensor]:
        order = hip_order(self._kfd)
        sensors: dict[str, Sensor] = {}
        gpus: list[AmdGpu] = []  # all of them: HIP counts those without a sensor too
        reader: dict[str, str] = {}  # whose reading holds a GPU's energy
        integrated = 0
        for card in cards(self._root, ("amdgpu",)):
            unique_id = read_text(card.device / "unique_id")
            ids = () if unique_id is None else (f"GPU-{unique_id}",)
            gpus.append(AmdGpu(None, card.pci, "AMD GPU", ids, order.get(card.pci)))
            if _integrated(card):
                integrated += 1
                continue
            # The average where there is one; newer GPUs have the momentary power only.
            names = ("power1_average", "power1_input")
            values = {name: read_number(card.hwmon / name) for name in names}
            working = [name for name in names if isinstance(values[name], int) and values[name] != 0]
            present = [name for name in names if not isinstance(values[name], FileNotFoundError)]
            if working or any(values[name] != 0 for name in present):
                name = (working or present)[0]
                text = f"AMD GPU, {'averaged' if name == 'power1_average' else 'momentary'} power ({card.hwmon.name})"
                sensors[card.pci] = Sensor(card.hwmon / name, "power", DeviceInfo(text, pci=card.pci, ids=ids))
                reader[card.pci] = card.pci
            elif present and sensors:
                # The second die of an MI250 shows 0 W: the first one reports both.
                first = next(reversed(sensors))
                info = sensors[first].info
                both = replace(info, shared=True, ids=(*info.ids, card.pci, *ids))
                sensors[first] = replace(sensors[first], info=both)
                reader[card.pci] = first
        if not sensors:
            raise SourceUnavailable(
                Status.UNSUPPORTED,
                "the AMD GPU is part of the CPU, whose package RAPL counts"
                if integrated
                else f"no AMD card in {self._root} has a power sensor (power1_average or power1_input)",
            )
        wanted = {reader.get(gpu.pci) for gpu in visible_gpus(gpus)}
        left = {pci: sensor for pci, sensor in sensors.items() if pci in wanted}
        if not left:
            raise no_visible_gpu(len(sensors))
        return left


def _integrated(card: Card) -> bool:
    """Return whether a card is part of the CPU.

    The header of gpu_metrics has the format's number in its third byte: 1 for cards, 2 and 3 for APUs.
    """
    try:
        header = (card.device / "gpu_metrics").read_bytes()[:3]
    except OSError:
        return False
    return len(header) == 3 and header[2] >= 2


SOURCE = AmdHwmon
