"""Energy metering without Lightning: joules from hardware counters, and the interface of energy sources.

The names are imported on first use; importing this package loads neither torch nor Lightning.
"""

from typing import TYPE_CHECKING

from lightning_estdgm._lazy import attach

if TYPE_CHECKING:
    from lightning_estdgm.energy.energy_meter import EnergyMeter as EnergyMeter
    from lightning_estdgm.energy.footprint import Footprint as Footprint
    from lightning_estdgm.energy.reading import DeviceId as DeviceId
    from lightning_estdgm.energy.reading import DeviceInfo as DeviceInfo
    from lightning_estdgm.energy.reading import Reading as Reading
    from lightning_estdgm.energy.reading import SourceUnavailable as SourceUnavailable
    from lightning_estdgm.energy.reading import Status as Status
    from lightning_estdgm.energy.reading import hostname as hostname
    from lightning_estdgm.energy.sources.protocol import EnergySource as EnergySource
    from lightning_estdgm.energy.sources.protocol import discover as discover

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "DeviceId": "lightning_estdgm.energy.reading",
        "DeviceInfo": "lightning_estdgm.energy.reading",
        "EnergyMeter": "lightning_estdgm.energy.energy_meter",
        "EnergySource": "lightning_estdgm.energy.sources.protocol",
        "Footprint": "lightning_estdgm.energy.footprint",
        "Reading": "lightning_estdgm.energy.reading",
        "SourceUnavailable": "lightning_estdgm.energy.reading",
        "Status": "lightning_estdgm.energy.reading",
        "discover": "lightning_estdgm.energy.sources.protocol",
        "hostname": "lightning_estdgm.energy.reading",
    },
)
