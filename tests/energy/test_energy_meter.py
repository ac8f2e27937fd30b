from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from energy_parts import ConstantPower

from lightning_estdgm.energy import SourceUnavailable, Status
from lightning_estdgm.energy.meter import Meter

SLOW = 3600.0  # the thread never gets to read: what is read is read by the test


def started(*sources: ConstantPower | SourceUnavailable, interval_s: float = SLOW, **kwargs) -> Meter:
    meter = Meter([(getattr(s, "name", "gone"), s) for s in sources], interval_s=interval_s)
    meter.start("train", "train", **kwargs)
    return meter


def test_constant_power_gives_its_joules() -> None:
    meter = started(ConstantPower(watts=100.0))
    time.sleep(0.05)
    meter.mark("train", "val")
    time.sleep(0.05)
    meter.stop()
    totals = meter.totals()
    assert totals.joules() == pytest.approx(100.0 * totals.covered_ns / 1e9, rel=1e-4)
    assert totals.coverage_ratio > 0.5
    for stage in ("train", "val"):
        assert totals.joules(stage=stage) == pytest.approx(100.0 * totals.window_ns["train", stage] / 1e9, rel=0.5)
    meter.stop()
    assert meter.totals() == totals


def test_the_thread_reads_by_itself_and_ends() -> None:
    source = ConstantPower()
    meter = started(source, interval_s=0.005)
    deadline = time.monotonic() + 10
    while source.events.count("read") < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    meter.stop()
    assert source.events.count("read") >= 4
    assert source.events[-1] == "close"
    assert not [t for t in threading.enumerate() if t.name == "estdgm-energy"]


def test_a_source_that_raises_is_a_gap_and_does_not_end_the_thread() -> None:
    source = ConstantPower()
    meter = started(source)
    source.raises = True
    meter.read()
    assert meter.totals().gaps == 1
    source.raises = False
    time.sleep(0.01)
    meter.stop()
    assert meter.totals().joules() is not None


def test_a_source_that_vanishes_costs_coverage() -> None:
    source = ConstantPower()
    meter = started(source)
    time.sleep(0.02)
    source.status = Status.UNAVAILABLE
    meter.read()
    time.sleep(0.02)
    meter.stop()
    totals = meter.totals()
    assert totals.joules() is None
    assert (totals.gaps, totals.coverage_ratio) == (1, 0.0)


def test_absent_sources_say_why() -> None:
    meter = started(ConstantPower(absent=SourceUnavailable(Status.NO_PERMISSION, "ask root")))
    meter.stop()
    assert [(a.name, a.status, a.reason) for a in meter.absent] == [("constant", Status.NO_PERMISSION, "ask root")]
    assert meter.opened == []
    assert meter.totals().joules() is None


def test_an_estimate_gives_way_to_a_measurement_of_its_kind() -> None:
    guess = ConstantPower(name="guess", method="estimated", kind="cpu", uid="p")
    rapl = ConstantPower(name="rapl", kind="cpu", uid="package-0")
    meter = started(guess, rapl)
    meter.stop()
    assert [o.name for o in meter.opened] == ["rapl"]
    assert [(a.name, a.reason) for a in meter.absent] == [("guess", "not needed: cpu is measured by rapl")]
    gpu = ConstantPower(name="gpu")
    meter = started(ConstantPower(name="guess", method="estimated", kind="cpu", uid="p"), gpu)
    meter.stop()
    assert [o.name for o in meter.opened] == ["gpu", "guess"]


def test_an_estimate_gives_way_even_where_another_process_reads() -> None:
    guess = ConstantPower(name="guess", method="estimated", kind="cpu", uid="p", scope="process")
    rapl = ConstantPower(name="rapl", kind="cpu", uid="package-0")
    meter = started(guess, rapl, select=lambda source, devices: [] if source.scope == "host" else devices)
    meter.stop()
    assert meter.opened == []
    assert {a.name for a in meter.absent} == {"guess", "rapl"}


def test_a_device_that_two_sources_offer_is_read_once() -> None:
    meter = started(ConstantPower(name="a"), ConstantPower(name="b"))
    meter.stop()
    assert [o.name for o in meter.opened] == ["a"]
    assert "another source" in meter.absent[0].reason


def test_watts_are_the_mean_since_the_last_call_and_missing_without_readings() -> None:
    source = ConstantPower(watts=40.0)
    meter = started(source)
    assert meter.watts() == {}
    time.sleep(0.01)
    meter.read()
    assert meter.watts() == {source.device: pytest.approx(40.0, rel=1e-3)}
    assert meter.watts() == {}
    meter.stop()


def test_watts_wait_for_the_update_period() -> None:
    meter = started(ConstantPower(update_period_s=3600.0))
    time.sleep(0.01)
    meter.read()
    assert meter.watts() == {}
    meter.stop()


def test_a_meter_starts_once() -> None:
    meter = started(ConstantPower())
    with pytest.raises(RuntimeError, match="starts once"):
        meter.start("train", "train")
    meter.stop()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_in_a_forked_child_nothing_is_read_and_nothing_hangs() -> None:
    source = ConstantPower()
    meter = started(source)
    meter._lock.acquire()  # as if the fork came in the middle of a reading
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # ends a child that waits for the lock
        reads = len(source.events)
        meter.read()
        meter.mark("a", "b")
        meter.stop()
        meter.totals()
        meter.watts()
        os._exit(0 if len(source.events) == reads else 1)
    meter._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    meter.stop()
    assert source.events[-1] == "close"
