"""Intel GPUs (drivers i915 and xe): the energy counter that the kernel shows in hwmon."""

from __future__ import annotations

import os

from lightning_estdgm.energy._hwmon import DRM, HwmonSensors, Sensor, cards
from lightning_estdgm.energy._reading import DeviceInfo, Method, SourceUnavailable, Status
from lightning_estdgm.energy._sysfs import read_text

_FILES = {"energy1_input": "card", "energy2_input": "package"}
"""energy1 counts the card; the driver xe also has energy2, the package on it, which energy1 includes."""


class IntelHwmon(HwmonSensors):
    """Intel's discrete GPUs, by PCI address, each once: the card if it has a counter, else the package.

    Args:
        root: Folder of the cards.
    """

    name = "hwmon-intel"
    method: Method = "counter"
    update_period_s = 0.1

    def __init__(self, root: str | os.PathLike[str] = DRM) -> None:
        super().__init__()
        self._root = root

    def _find(self) -> dict[str, Sensor]:
        found: dict[str, Sensor] = {}
        drivers = set()
        # A card has one folder for itself and may have more for its tiles (i915_gt0): those are inside it.
        for card in cards(self._root, ("i915", "xe")):
            for file, what in _FILES.items():
                path = card.hwmon / file
                if path.exists() and card.pci not in found:
                    info = DeviceInfo(f"Intel GPU, energy counter of the {what} ({card.hwmon.name})", pci=card.pci)
                    found[card.pci] = Sensor(path, "energy", info)
                    drivers.add(read_text(card.hwmon / "name") or "")
        if not found:
            raise SourceUnavailable(
                Status.UNSUPPORTED, f"no Intel card in {self._root} has an energy counter: an integrated GPU has none"
            )
        self.driver = ", ".join(sorted(drivers))
        return found


SOURCE = IntelHwmon
