"""Energy counters of this machine, and the watts that they have measured of a benchmark's steps."""

from __future__ import annotations

from typing import Any

from lightning_estdgm.energy._energy_meter import EnergyMeter
from lightning_estdgm.energy._reading import SourceUnavailable
from lightning_estdgm.energy.sources._protocol import discover


def counters() -> list[str]:
    """Return the names of the energy sources that measure here; estimates are none."""
    names = []
    for name, source in discover():
        if isinstance(source, SourceUnavailable) or source.method == "estimated":
            continue
        try:
            source.open()
            if source.devices():
                names.append(name)
            source.close()
        except SourceUnavailable:
            continue
        except Exception:  # a vendor's library may fail in any way: then it is no counter
            continue
    return names


def measured_watts(meter: EnergyMeter, booked: dict[str, int]) -> dict[str, Any] | None:
    """Return "watts" by label of `booked`, and the names of the "sources"; None where nothing was measured."""
    summary = meter.summary()
    seconds = summary["seconds_by_window"]
    watts = {
        label: joules / seconds[label]
        for label, joules in summary["by_window"].items()
        if label in booked and joules is not None and seconds[label] > 0
    }
    names = [source["name"] for source in summary["sources"]]
    return {"watts": watts, "sources": names} if watts else None
