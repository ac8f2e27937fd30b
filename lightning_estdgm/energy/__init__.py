"""Energy metering without Lightning: joules from hardware counters, and the interface of energy sources.

The names are imported on first use; importing this package loads neither torch nor Lightning.
"""

from typing import TYPE_CHECKING

from lightning_estdgm._lazy import attach

if TYPE_CHECKING:
    from lightning_estdgm.energy._energy_meter import EnergyMeter as EnergyMeter
    from lightning_estdgm.energy._footprint import Footprint as Footprint
    from lightning_estdgm.energy._reading import DeviceId as DeviceId
    from lightning_estdgm.energy._reading import DeviceInfo as DeviceInfo
    from lightning_estdgm.energy._reading import Reading as Reading
    from lightning_estdgm.energy._reading import SourceUnavailable as SourceUnavailable
    from lightning_estdgm.energy._reading import Status as Status
    from lightning_estdgm.energy._reading import hostname as hostname
    from lightning_estdgm.energy.sources._protocol import EnergySource as EnergySource
    from lightning_estdgm.energy.sources._protocol import discover as discover
    from lightning_estdgm.energy.sources.cpu_estimate import CpuEstimate as CpuEstimate

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CpuEstimate": "lightning_estdgm.energy.sources.cpu_estimate",
        "DeviceId": "lightning_estdgm.energy._reading",
        "DeviceInfo": "lightning_estdgm.energy._reading",
        "EnergyMeter": "lightning_estdgm.energy._energy_meter",
        "EnergySource": "lightning_estdgm.energy.sources._protocol",
        "Footprint": "lightning_estdgm.energy._footprint",
        "Reading": "lightning_estdgm.energy._reading",
        "SourceUnavailable": "lightning_estdgm.energy._reading",
        "Status": "lightning_estdgm.energy._reading",
        "discover": "lightning_estdgm.energy.sources._protocol",
        "hostname": "lightning_estdgm.energy._reading",
    },
)
