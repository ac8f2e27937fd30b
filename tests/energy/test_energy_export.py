"""OpenTelemetry's names, and Prometheus's text."""

from __future__ import annotations

import builtins
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lightning_estdgm.callbacks.energy import EnergyMonitor
from lightning_estdgm.energy._device_assignment import ActiveSource
from lightning_estdgm.energy._export import measurements, write_prometheus
from lightning_estdgm.energy._reading import DeviceId, DeviceInfo
from lightning_estdgm.energy._totals import Cell, Totals

GPU, CPU, DRAM = DeviceId("a", "gpu", "GPU-1"), DeviceId("a", "cpu", "package-0"), DeviceId("b", "dram", 'od"d\\')
TOTALS = Totals(
    {
        Cell("nvml", "counter", GPU, "exploration", "train"): 3_000_000,
        Cell("nvml", "counter", GPU, "refinement", "val"): 500_000,
        Cell("cpu-estimate", "estimated", CPU, "refinement", "train"): 2_000_000,
        Cell("rapl", "counter", DRAM, "refinement", "train"): 1,
    },
    covered_ns=3,
    expected_ns=4,
    gaps=2,
    steps=7,
)
OPENED = [
    ActiveSource("nvml", "counter", "host", "550.1", 0.1, {GPU: DeviceInfo("H100")}),
    ActiveSource("cpu-estimate", "estimated", "process", "", 0.1, {CPU: DeviceInfo("estimate")}),
]


def test_names_are_those_of_opentelemetry() -> None:
    found = measurements(TOTALS, OPENED, {GPU: 412.5})
    energy = [m for m in found if m.name == "hw.energy"]
    assert {(m.instrument, m.unit) for m in energy} == {("counter", "J")}
    assert [m.value for m in energy] == [3.0, 0.5, 2.0, 1e-6]
    assert [m.attributes["hw.type"] for m in energy] == ["gpu", "gpu", "cpu", "memory"]
    assert energy[0].attributes == {
        "host.name": "a",
        "hw.id": "GPU-1",
        "hw.type": "gpu",
        "hw.name": "H100",
        "estdgm.method": "counter",
        "estdgm.phase": "exploration",
        "estdgm.stage": "train",
    }
    assert energy[2].attributes["estdgm.method"] == "estimated"
    (power,) = [m for m in found if m.name == "hw.power"]
    assert (power.instrument, power.unit, power.value, power.attributes["hw.id"]) == ("gauge", "W", 412.5, "GPU-1")


def test_prometheus_reads_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "estdgm.prom"
    write_prometheus(path, measurements(TOTALS, OPENED, {GPU: 412.5}))
    families = {family.name: family for family in text_string_to_metric_families(path.read_text())}
    assert {name: family.type for name, family in families.items()} == {
        "hw_energy_joules": "counter",
        "hw_power_watts": "gauge",
        "estdgm_energy_coverage_ratio": "gauge",
        "estdgm_energy_gaps": "counter",
        "estdgm_steps": "counter",
    }
    energy = {
        (s.labels["hw_id"], s.labels["estdgm_phase"], s.labels["estdgm_stage"]): s.value
        for s in families["hw_energy_joules"].samples
    }
    assert energy == {
        ("GPU-1", "exploration", "train"): 3.0,
        ("GPU-1", "refinement", "val"): 0.5,
        ("package-0", "refinement", "train"): 2.0,
        ('od"d\\', "refinement", "train"): 1e-6,
    }
    values = {name: family.samples[0].value for name, family in families.items() if len(family.samples) == 1}
    assert values == {
        "hw_power_watts": 412.5,
        "estdgm_energy_coverage_ratio": 0.75,
        "estdgm_energy_gaps": 2.0,
        "estdgm_steps": 7.0,
    }


def test_what_two_sources_read_of_a_device_is_one_series(tmp_path: Path) -> None:
    cells = {
        Cell("rocm-smi", "counter", GPU, "refinement", "train"): 3_000_000,
        Cell("amdsmi", "counter", GPU, "refinement", "train"): 1_500_000,
        Cell("amdsmi", "integrated", GPU, "refinement", "train"): 250_000,
    }
    found = [m for m in measurements(Totals(cells), (), {}) if m.name == "hw.energy"]
    assert [(m.value, m.attributes["estdgm.method"]) for m in found] == [(4.5, "counter"), (0.25, "integrated")]
    write_prometheus(tmp_path / "estdgm.prom", found)
    lines = (tmp_path / "estdgm.prom").read_text().splitlines()
    series = [line.rsplit(" ", 1)[0] for line in lines if not line.startswith("#")]
    assert len(series) == len(set(series)) == 2


def test_without_prometheus_client_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "prometheus_client" else found(name, *rest)
    )
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-estdgm\[prometheus\]'"):
        EnergyMonitor(["cpu-estimate"], prometheus="estdgm.prom")


def test_nothing_else_needs_prometheus_client(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        assert not name.startswith("prometheus_client")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert EnergyMonitor(["cpu-estimate"]).measurements()[0].name == "estdgm.energy.coverage"
