from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import replace

import pytest

from helpers.energy_parts import ConstantPower
from lightning_estdgm.energy.reading import DeviceId, DeviceInfo, Reading, SourceUnavailable, Status
from lightning_estdgm.energy.sampler import Meter, Select

SLOW = 3600.0  # the thread never gets to read: what is read is read by the test


def started(
    *sources: ConstantPower | SourceUnavailable, interval_s: float = SLOW, select: Select | None = None
) -> Meter:
    meter = Meter([(getattr(s, "name", "gone"), s) for s in sources], interval_s=interval_s)
    meter.open(select)
    meter.start("train", "train")
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


def test_a_source_is_read_no_more_often_than_it_is_renewed() -> None:
    slow, fast = ConstantPower(name="slow", update_period_s=3600.0), ConstantPower(name="fast", uid="c1")
    meter = started(slow, fast)
    time.sleep(0.01)
    meter.mark("train", "val")
    time.sleep(0.01)
    meter.mark("train", "train")
    meter.read()
    assert (slow.events.count("read"), fast.events.count("read")) == (1, 4)
    assert meter.totals().gaps == 0
    meter.stop()  # the last reading is taken whatever the time: nothing comes after it
    assert slow.events.count("read") == 2
    totals = meter.totals()
    by_stage = {c.stage: uj for c, uj in totals.energy_uj.items() if c.device == slow.device}
    assert by_stage["val"] >= 100 * 0.01 * 1e6 * 0.99  # the boundaries in between split it by time
    assert sum(by_stage.values()) == pytest.approx(100 * totals.device_ns[slow.device] / 1000, abs=2)


def test_a_module_counter_leaves_out_what_it_holds_already() -> None:
    module = ConstantPower(name="module", uid="m", info=DeviceInfo("Grace Hopper module", covers=("cpu", "dram")))
    package = ConstantPower(name="package", kind="cpu", uid="package-0")
    memory = ConstantPower(name="memory", kind="dram", uid="package-0/dram")
    guess = ConstantPower(name="guess", method="estimated", kind="cpu", uid="p", scope="process")
    meter = started(package, memory, guess, module)  # whatever the order
    meter.stop()
    assert [o.name for o in meter.opened] == ["module"]
    assert {a.name: a.reason for a in meter.absent} == {
        "package": "it would count twice: cpu is in the readings of module",
        "memory": "it would count twice: dram is in the readings of module",
        "guess": "not needed: cpu is measured by module",
    }
    assert all(source.events[-1] == "close" for source in (package, memory, guess, module))


def test_what_other_processes_read_is_closed() -> None:
    ours, theirs = ConstantPower(name="ours"), ConstantPower(name="theirs", uid="c1")
    meter = Meter([("ours", ours), ("theirs", theirs)], interval_s=SLOW)
    meter.open()
    meter.keep([opened for opened in meter.opened if opened.name == "ours"])
    meter.start("train", "train")
    meter.stop()
    assert theirs.events == ["open", "close"]
    assert [o.name for o in meter.opened] == ["ours"]
    assert [(a.name, a.reason) for a in meter.absent] == [("theirs", "read by another process of this run")]


def test_of_a_source_with_several_devices_only_those_kept_are_read() -> None:
    asked: list[set[DeviceId]] = []

    class Two(ConstantPower):
        other = DeviceId("host", "gpu", "c1")

        def devices(self) -> Mapping[DeviceId, DeviceInfo]:
            return {**super().devices(), self.other: DeviceInfo("the other")}

        def read(self, devices: Collection[DeviceId] | None = None) -> Mapping[DeviceId, Reading]:
            asked.append(set(devices or ()))
            return super().read()

    source = Two()
    meter = Meter([("two", source)], interval_s=SLOW)
    meter.open()
    (both,) = meter.opened
    assert set(both.devices) == {source.device, source.other}
    meter.keep([replace(both, devices={source.device: both.devices[source.device]})])
    meter.start("train", "train")
    meter.stop()
    assert asked == [{source.device}] * 2


def test_the_idle_baseline_is_measured_before_and_booked_apart() -> None:
    source = ConstantPower(watts=40.0)
    meter = Meter([("constant", source)], interval_s=0.002)
    meter.open()
    meter.measure_idle(0.25)
    assert meter.idle_watts == {source.device: pytest.approx(40.0, rel=1e-3)}
    assert source.events.count("read") >= 3  # as often as otherwise: power would have to be integrated
    source.watts = 100.0
    before = time.monotonic()
    meter.start("train", "train")
    time.sleep(0.01)
    meter.stop()
    totals = meter.totals()
    assert totals.joules() == pytest.approx(100 * totals.covered_ns / 1e9, rel=1e-4)
    assert totals.net_joules == pytest.approx(60 * totals.covered_ns / 1e9, rel=1e-3)
    assert totals.seconds <= time.monotonic() - before


def test_no_baseline_where_it_could_not_be_read() -> None:
    source = ConstantPower(status=Status.ERROR)
    meter = Meter([("constant", source)], interval_s=SLOW)
    meter.open()
    meter.measure_idle(0.001)
    source.status = Status.OK
    meter.start("train", "train")
    time.sleep(0.002)
    meter.stop()
    assert meter.idle_watts == {}
    assert meter.totals().joules() is not None
    assert meter.totals().net_joules is None


def test_a_source_with_a_wrap_range_that_makes_no_sense_is_absent() -> None:
    class Odd(ConstantPower):
        def wrap_range_uj(self, device: DeviceId) -> int | None:
            return 0

    source = Odd()
    meter = started(source)
    meter.stop()
    assert "wrap_range_uj must be > 0 or None, got 0" in meter.absent[0].reason
    assert source.events == ["open", "close"]


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
