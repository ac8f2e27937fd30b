"""`EnergyMeter`: plain code, no Lightning."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from helpers.energy_parts import ConstantPower
from lightning_estdgm import EnergyMeter
from lightning_estdgm.energy._reading import SourceUnavailable, Status

WATTS = 100.0


def test_joules_of_a_block_and_of_its_windows() -> None:
    with EnergyMeter([ConstantPower(watts=WATTS)]) as meter:
        time.sleep(0.01)
        with meter.window("load"):
            time.sleep(0.02)
            with meter.window("decode"):
                time.sleep(0.01)
            time.sleep(0.01)
        time.sleep(0.01)
        during = meter.joules
        with meter.window("load"):
            time.sleep(0.01)
    assert during is not None
    assert meter.joules is not None
    assert 0 < during < meter.joules
    by_window = meter.by_window
    assert list(by_window) == ["", "load", "decode"]
    assert sum(joules for joules in by_window.values() if joules) == pytest.approx(meter.joules, abs=1e-5)
    assert by_window["load"] >= WATTS * 0.04 * 0.99  # both windows, without the one inside
    assert by_window["decode"] >= WATTS * 0.01 * 0.99
    assert by_window[""] >= WATTS * 0.02 * 0.99  # before and after
    summary = meter.summary()
    assert summary["by_window"] == by_window
    assert sum(summary["seconds_by_window"].values()) == pytest.approx(meter.seconds)
    assert summary["total_joules"] == pytest.approx(WATTS * meter.seconds * summary["coverage_ratio"], rel=1e-4)
    assert (summary["method"], summary["sources"][0]["name"]) == ("counter", "constant")


def test_it_stops_with_the_block_and_blocks_add_up() -> None:
    source = ConstantPower(watts=WATTS)
    meter = EnergyMeter([source])
    assert meter.joules is None
    with pytest.raises(ZeroDivisionError), meter:
        _ = 1 / 0
    assert source.events[-1] == "close"
    assert not [t for t in threading.enumerate() if t.name == "estdgm-energy"]
    once = meter.joules
    assert once is not None
    time.sleep(0.005)
    assert meter.joules == once
    with meter:
        time.sleep(0.01)
    assert meter.joules >= once + WATTS * 0.01 * 0.99


def test_without_a_sensor_it_knows_the_seconds_and_says_why() -> None:
    with EnergyMeter([ConstantPower(absent=SourceUnavailable(Status.NO_PERMISSION, "ask root"))]) as meter:
        time.sleep(0.005)
    assert meter.joules is None
    assert meter.seconds >= 0.005
    assert meter.summary()["absent"] == [{"name": "constant", "status": "no_permission", "reason": "ask root"}]


def test_a_device_that_is_gone_at_the_end_is_named() -> None:
    source = ConstantPower()
    with EnergyMeter([source]) as meter:
        assert meter.summary()["failing"] == []
        source.raises = True
    assert [device["uid"] for device in meter.summary()["failing"]] == ["c0"]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"interval_s": 0}, ValueError, "interval_s must be > 0 seconds, got 0"),
        ({"interval_s": True}, TypeError, "interval_s must be a number of seconds, got True"),
        ({"sources": ["nvlm"]}, ValueError, "unknown energy source 'nvlm'"),
        ({"sources": "nvml"}, TypeError, "a list of names and energy sources, got 'nvml'"),
        ({"sources": ConstantPower()}, TypeError, "got .*ConstantPower.*: write sources=.* for a single one"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EnergyMeter(**kwargs)


def test_windows_and_blocks_in_the_wrong_place() -> None:
    meter = EnergyMeter([ConstantPower()])
    with pytest.raises(RuntimeError, match="inside the block"), meter.window("a"):
        pass
    with meter:
        with pytest.raises(RuntimeError, match="measuring already"), meter:
            pass
        with pytest.raises(ValueError, match="label must not be empty"), meter.window(""):
            pass
        with pytest.raises(TypeError, match="label must be a str, got 3"), meter.window(3):  # type: ignore[arg-type]
            pass
    assert list(meter.by_window) == [""]
