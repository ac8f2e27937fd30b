"""The estimate of CPU energy."""

from __future__ import annotations

import time

import pytest

from lightning_estdgm.energy._reading import SourceUnavailable
from lightning_estdgm.energy.sources.cpu_estimate import ENVIRONMENT, CpuEstimate


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
