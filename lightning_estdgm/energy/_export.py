"""Export of energy under OpenTelemetry's names, and as a text file for Prometheus."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_estdgm.energy._device_assignment import ActiveSource
from lightning_estdgm.energy._reading import DeviceId, DeviceInfo, Kind
from lightning_estdgm.energy._totals import Cell, Totals

_HW_TYPES: dict[Kind, str] = {"gpu": "gpu", "cpu": "cpu", "dram": "memory"}
_UNITS = {"J": "joules", "W": "watts", "1": "ratio"}


@dataclass(frozen=True)
class EnergyMeasurement:
    """One value under the names of OpenTelemetry's semantic conventions for hardware.

    Attributes:
        name: "hw.energy", "hw.power", or a name of this package under "estdgm.".
        instrument: "counter" or "gauge".
        unit: Unit in UCUM: "J", "W", "1", "{step}".
        value: Current value; a counter's since the beginning of the run.
        attributes: `hw.id`, `hw.type`, `hw.name`, `host.name`, and those of this package under "estdgm.".
    """

    name: str
    instrument: Literal["counter", "gauge"]
    unit: str
    value: float
    attributes: Mapping[str, str]


def measurements(
    totals: Totals, active: Sequence[ActiveSource], watts: Mapping[DeviceId, float]
) -> list[EnergyMeasurement]:
    """Return joules by device, phase and stage, watts by device, coverage, gaps and steps.

    What several sources of one method read of a device, as before and after a restart, is one value. Estimates
    are told apart by the attribute `estdgm.method`. Source of the names:
    https://opentelemetry.io/docs/specs/semconv/hardware/common/ (status: development).
    """
    infos = {device: info for source in active for device, info in source.devices.items()}
    methods = {device: source.method for source in active for device in source.devices}
    energy_uj: dict[Cell, int] = {}
    for cell, uj in totals.energy_uj.items():
        of_all = replace(cell, source="")  # it is no attribute, so two of them would be one series twice
        energy_uj[of_all] = energy_uj.get(of_all, 0) + uj
    found = [
        EnergyMeasurement(
            "hw.energy",
            "counter",
            "J",
            uj / 1e6,
            {
                **_attributes(cell.device, infos.get(cell.device), cell.method),
                "estdgm.phase": cell.label,
                "estdgm.stage": cell.stage,
            },
        )
        for cell, uj in energy_uj.items()
    ]
    found += [
        EnergyMeasurement("hw.power", "gauge", "W", w, _attributes(device, infos.get(device), methods[device]))
        for device, w in watts.items()
    ]
    found += [
        EnergyMeasurement("estdgm.energy.coverage", "gauge", "1", totals.coverage_ratio, {}),
        EnergyMeasurement("estdgm.energy.gaps", "counter", "{gap}", totals.gaps, {}),
        EnergyMeasurement("estdgm.steps", "counter", "{step}", totals.steps, {}),
    ]
    return found


def check_prometheus() -> None:
    """Check that `prometheus_client` is installed.

    Raises:
        ModuleNotFoundError: It is not; the message says what to install.
    """
    if importlib.util.find_spec("prometheus_client") is None:
        raise ModuleNotFoundError(
            "the Prometheus file needs prometheus_client: pip install 'lightning-estdgm[prometheus]'"
        )


def write_prometheus(path: str | os.PathLike[str], values: Iterable[EnergyMeasurement]) -> None:
    """Write a file for the textfile collector of Prometheus's node exporter; it is replaced in one move.

    Names follow OpenTelemetry's translation: ``hw.energy`` in J becomes ``hw_energy_joules_total``.

    Raises:
        ModuleNotFoundError: `prometheus_client` is not installed.
        OSError: The file cannot be written.
    """
    check_prometheus()
    from prometheus_client import CollectorRegistry, write_to_textfile

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(list(values)))
    write_to_textfile(os.fspath(path), registry)


class _Collector:
    def __init__(self, values: list[EnergyMeasurement]) -> None:
        self._values = values

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name in dict.fromkeys(value.name for value in self._values):
            values = [value for value in self._values if value.name == name]
            first = values[0]
            unit = _UNITS.get(first.unit, "")
            labels = list(dict.fromkeys(key for value in values for key in value.attributes))
            family = CounterMetricFamily if first.instrument == "counter" else GaugeMetricFamily
            metric = family(
                name.replace(".", "_"), f"{name} in {first.unit}", labels=[_label(x) for x in labels], unit=unit
            )
            for value in values:
                metric.add_metric([value.attributes.get(label, "") for label in labels], value.value)
            yield metric


def _label(name: str) -> str:
    return name.replace(".", "_")


def _attributes(device: DeviceId, info: DeviceInfo | None, method: str) -> dict[str, str]:
    return {
        "host.name": device.host,
        "hw.id": device.uid,
        "hw.type": _HW_TYPES[device.kind],
        "hw.name": info.name if info else "",
        "estdgm.method": method,
    }
