"""Mean power of each device between two looks at the sums."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_estdgm.energy._device_assignment import ActiveSource
from lightning_estdgm.energy._reading import DeviceId
from lightning_estdgm.energy._totals import Totals


class MeanPower:
    """Mean watts per device between two calls of `since_last`.

    Args:
        sources: Sources in use. Over a shorter time than its source's update period a device has no mean.
    """

    def __init__(self, sources: Iterable[ActiveSource] = ()) -> None:
        self._periods_s = {device: source.update_period_s for source in sources for device in source.devices}
        self._seen: dict[DeviceId, tuple[int, int]] = {}

    def since_last(self, totals: Totals) -> dict[DeviceId, float]:
        """Return the watts since the last call that reported the device; devices not read since are left out."""
        watts = {}
        energy_uj = totals.device_uj()
        for device, ns in totals.device_ns.items():
            uj = energy_uj.get(device, 0)
            old_uj, old_ns = self._seen.get(device, (0, 0))
            if ns - old_ns > 1e9 * self._periods_s[device]:
                watts[device] = (uj - old_uj) * 1000 / (ns - old_ns)
                self._seen[device] = (uj, ns)
        return watts
