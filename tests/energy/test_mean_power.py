"""Mean watts between two looks."""

from __future__ import annotations

import time

import pytest

from helpers.energy_parts import ConstantPower, started_sampler
from lightning_estdgm.energy._mean_power import MeanPower


def test_watts_are_the_mean_since_the_last_call_and_missing_without_readings() -> None:
    source = ConstantPower(watts=40.0)
    sampler = started_sampler(source)
    power = MeanPower(sampler.active)
    assert power.since_last(sampler.totals()) == {}
    time.sleep(0.01)
    sampler.read()
    assert power.since_last(sampler.totals()) == {source.device: pytest.approx(40.0, rel=1e-3)}
    assert power.since_last(sampler.totals()) == {}
    sampler.stop()


def test_watts_wait_for_the_update_period() -> None:
    sampler = started_sampler(ConstantPower(update_period_s=3600.0))
    time.sleep(0.01)
    sampler.read()
    assert MeanPower(sampler.active).since_last(sampler.totals()) == {}
    sampler.stop()
