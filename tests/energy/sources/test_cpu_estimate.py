"""The estimate of CPU energy."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import pytest

from lightning_estdgm.energy._reading import SourceUnavailable, Status
from lightning_estdgm.energy.sources import cpu_estimate
from lightning_estdgm.energy.sources.cpu_estimate import ENVIRONMENT, WATTS_PER_CORE, CpuEstimate


def test_the_cpu_estimate_is_cpu_time_times_watts() -> None:
    source = CpuEstimate(watts_per_core=50.0)
    source.open()
    (before,) = source.read().values()
    start = time.process_time()
    while time.process_time() - start < 0.02:
        pass
    (after,) = source.read().values()
    end = time.process_time()
    assert source.method == "estimated"
    assert before.energy_uj is not None
    assert after.energy_uj is not None
    assert 0.02 * 50 <= (after.energy_uj - before.energy_uj) / 1e6 <= (end - start + 0.02) * 50
    assert "50 W per busy core" in next(iter(source.devices().values())).name


@pytest.mark.parametrize("watts", [0, -1.0, float("nan"), float("inf"), True, "9"])
def test_the_cpu_estimate_refuses_bad_watts(watts: float) -> None:
    with pytest.raises(ValueError, match="watts_per_core must be a positive number of watts, got"):
        CpuEstimate(watts_per_core=watts)


def test_the_cpu_estimate_takes_watts_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "3.5")
    source = CpuEstimate()
    source.open()
    assert "3.5 W per busy core" in next(iter(source.devices().values())).name
    monkeypatch.setenv(ENVIRONMENT, "lots")
    with pytest.raises(SourceUnavailable, match="ESTDGM_WATTS_PER_CORE must be a positive number of watts, got 'lots'"):
        CpuEstimate().open()


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "")
    source = CpuEstimate()
    source.open()
    assert f"{WATTS_PER_CORE:g} W per busy core" in next(iter(source.devices().values())).name


def test_process_1_of_each_container_is_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def uid(namespace: int) -> str:
        def stat(path: str) -> SimpleNamespace:
            assert path == "/proc/self/ns/pid"
            return SimpleNamespace(st_ino=namespace)

        with monkeypatch.context() as patch:
            patch.setattr(cpu_estimate.os, "stat", stat)
            source = CpuEstimate()
            source.open()
            assert [reading.status for reading in source.read().values()] == [Status.OK]
            return next(iter(source.devices())).uid

    assert uid(0xEFFFFFFC) == f"process-{os.getpid()}"  # the machine's own
    assert uid(4026532201) == f"process-4026532201-{os.getpid()}"
