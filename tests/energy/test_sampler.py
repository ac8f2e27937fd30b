"""The background thread that reads sources."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Collection, Mapping

import pytest

from helpers.energy_parts import NEVER_S, ConstantPower, started_sampler
from lightning_estdgm.energy._reading import DeviceId, Reading, Status
from lightning_estdgm.energy._sampler import Sampler
from lightning_estdgm.energy._source_set import SourceSet
from lightning_estdgm.energy._totals import Totals


def test_constant_power_gives_its_joules() -> None:
    sampler = started_sampler(ConstantPower(watts=100.0))
    time.sleep(0.05)
    sampler.mark("train", "val")
    time.sleep(0.05)
    sampler.stop()
    totals = sampler.totals()
    assert totals.joules() == pytest.approx(100.0 * totals.covered_ns / 1e9, rel=1e-4)
    assert totals.coverage_ratio > 0.5
    for stage in ("train", "val"):
        assert totals.joules(stage=stage) == pytest.approx(100.0 * totals.window_ns["train", stage] / 1e9, rel=0.5)
    sampler.stop()
    assert sampler.totals() == totals


def test_the_thread_reads_by_itself_and_ends() -> None:
    source = ConstantPower()
    sampler = started_sampler(source, interval_s=0.005)
    deadline = time.monotonic() + 10
    while source.events.count("read") < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    sampler.stop()
    assert source.events.count("read") >= 4
    assert source.events[-1] == "close"
    assert not [t for t in threading.enumerate() if t.name == "estdgm-energy"]


def test_a_source_that_raises_is_a_gap_and_does_not_end_the_thread() -> None:
    source = ConstantPower()
    sampler = started_sampler(source)
    source.raises = True
    sampler.read()
    assert sampler.totals().gaps == 1
    source.raises = False
    time.sleep(0.01)
    sampler.stop()
    assert sampler.totals().joules() is not None


def test_a_source_that_vanishes_costs_coverage() -> None:
    source = ConstantPower()
    sampler = started_sampler(source)
    time.sleep(0.02)
    source.status = Status.UNAVAILABLE
    sampler.read()
    time.sleep(0.02)
    sampler.stop()
    totals = sampler.totals()
    assert totals.joules() is None
    assert (totals.gaps, totals.coverage_ratio) == (1, 0.0)


def test_a_source_is_read_no_more_often_than_it_is_renewed() -> None:
    slow, fast = ConstantPower(name="slow", update_period_s=3600.0), ConstantPower(name="fast", uid="c1")
    sampler = started_sampler(slow, fast)
    time.sleep(0.01)
    sampler.mark("train", "val")
    time.sleep(0.01)
    sampler.mark("train", "train")
    sampler.read()
    assert (slow.events.count("read"), fast.events.count("read")) == (1, 4)
    assert sampler.totals().gaps == 0
    sampler.stop()  # the last reading is taken whatever the time: nothing comes after it
    assert slow.events.count("read") == 2
    totals = sampler.totals()
    by_stage = {c.stage: uj for c, uj in totals.energy_uj.items() if c.device == slow.device}
    assert by_stage["val"] >= 100 * 0.01 * 1e6 * 0.99  # the boundaries in between split it by time
    assert sum(by_stage.values()) == pytest.approx(100 * totals.device_ns[slow.device] / 1000, abs=2)


def test_a_slow_source_holds_no_other_up() -> None:
    slow, fast = ConstantPower(name="slow", update_period_s=3600.0), ConstantPower(name="fast", uid="c1")
    sampler = started_sampler(slow, fast, interval_s=0.005)
    deadline = time.monotonic() + 10
    while fast.events.count("read") < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert (slow.events.count("read"), fast.events.count("read") >= 4) == (1, True)
    sampler.stop()


def test_power_that_is_renewed_seldom_is_integrated_all_the_same() -> None:
    class Power(ConstantPower):
        def read(self, devices: Collection[DeviceId] | None = None) -> Mapping[DeviceId, Reading]:
            return {self.device: Reading(next(times), power_mw=100_000)}

    now = time.monotonic_ns()
    times = iter((now, now + 60 * 10**9))
    sampler = started_sampler(Power(method="integrated", update_period_s=60.0), interval_s=1.0)
    sampler.stop()
    assert sampler.totals().joules() == pytest.approx(6000.0)
    times = iter((now, now + 60 * 10**9))
    sampler = started_sampler(Power(method="integrated", update_period_s=6.0), interval_s=1.0)
    sampler.stop()
    assert sampler.totals().joules() is None  # ten periods without a reading are a gap


def test_a_counter_is_read_before_it_can_pass_its_end_twice() -> None:
    class Wraps(ConstantPower):
        def wrap_range_uj(self, device: DeviceId) -> int | None:
            return 65_532_610_987

    for source, interval_s, expected in (
        (Wraps(), 70.0, 65_532.610987 / 1000 / 2),  # at 1 kW, which no CPU draws more of
        (Wraps(), 1.0, 1.0),
        (ConstantPower(), 70.0, 70.0),
        (ConstantPower(update_period_s=90.0), 70.0, 90.0),
    ):
        sources = SourceSet([("one", source)])
        sources.open()
        assert sources.due_s(interval_s) == pytest.approx(expected)


def test_a_signal_that_interrupts_a_reading_can_ask_for_totals() -> None:
    sampler = started_sampler(source := ConstantPower())

    def handle(number: int, frame: object) -> None:
        sampler.read()
        sampler.mark("train", "val")
        seen.append(sampler.totals())

    class Interrupted(ConstantPower):
        def read(self, devices: Collection[DeviceId] | None = None) -> Mapping[DeviceId, Reading]:
            signal.raise_signal(signal.SIGUSR1)
            return ConstantPower.read(self, devices)

    seen: list[Totals] = []
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        source.__class__ = Interrupted
        sampler.read()
        assert len(seen) == 1
        source.__class__ = ConstantPower
    finally:
        signal.signal(signal.SIGUSR1, before)
    sampler.stop()
    totals = sampler.totals()
    assert totals.joules() == pytest.approx(100.0 * totals.covered_ns / 1e9, rel=1e-4)


def stuck(sampler: Sampler, source: ConstantPower) -> tuple[threading.Thread, threading.Event]:
    """Have the thread wait in the source until the event is set that is returned with it."""
    thread = sampler._thread
    assert thread is not None
    asked, answers = hang(source)
    assert asked.wait(60)
    return thread, answers


def hang(source: ConstantPower) -> tuple[threading.Event, threading.Event]:
    """Have a source not answer until the second event is set; the first tells that it was asked."""
    asked, answers = threading.Event(), threading.Event()

    class Hangs(ConstantPower):
        def read(self, devices: Collection[DeviceId] | None = None) -> Mapping[DeviceId, Reading]:
            asked.set()
            assert answers.wait(60)
            return ConstantPower.read(self, devices)

    source.__class__ = Hangs
    return asked, answers


def test_a_source_that_never_answers_ends_the_reading_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_estdgm.energy._sampler.PATIENCE_S", 0.3)
    sampler = started_sampler(source := ConstantPower(name="of the board"), interval_s=0.005)
    time.sleep(0.05)
    thread, answers = stuck(sampler, source)
    with pytest.warns(RuntimeWarning, match=r"'of the board' has not answered for 0.3 s: no energy is read"):
        sampler.read()
    before = sampler.totals()
    assert before.joules() is not None
    sampler.mark("train", "val")  # warns no more, and books that nothing is known
    assert sampler.failing() == tuple(sampler.active[0].devices)
    answers.set()
    thread.join(60)
    assert not thread.is_alive()
    sampler.stop()
    after = sampler.totals()
    assert (after.joules(), after.covered_ns, after.gaps) == (before.joules(), before.covered_ns, 1)
    assert after.expected_ns > before.expected_ns


def test_a_reading_that_is_asked_for_and_never_answered_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_estdgm.energy._sampler.PATIENCE_S", 0.3)
    sampler = started_sampler(source := ConstantPower(), ConstantPower(name="other", uid="c1"))
    time.sleep(0.02)
    sampler.read()
    _, answers = hang(source)
    before = sampler.totals()
    with pytest.warns(RuntimeWarning, match="'constant' has not answered"):
        sampler.mark("train", "val")
    sampler.read()
    sampler.stop()
    answers.set()
    after = sampler.totals()
    assert (after.joules(), after.gaps) == (before.joules(), 2)
    assert len(sampler.failing()) == 2


def test_the_end_of_a_run_does_not_wait_for_a_source_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_estdgm.energy._sampler.PATIENCE_S", 0.3)
    sampler = started_sampler(source := ConstantPower(), interval_s=0.005)
    thread, answers = stuck(sampler, source)
    with pytest.warns(RuntimeWarning, match="has not answered"):
        sampler.stop()
    assert "close" not in source.events  # its library is in a call still
    sampler.stop()
    answers.set()
    thread.join(60)


def test_an_interval_longer_than_a_thread_can_wait_ends_no_thread() -> None:
    sampler = started_sampler(ConstantPower(), interval_s=2 * threading.TIMEOUT_MAX)
    time.sleep(0.05)
    assert [t for t in threading.enumerate() if t.name == "estdgm-energy"]
    sampler.stop()


def test_the_idle_baseline_is_measured_before_and_booked_apart() -> None:
    source = ConstantPower(watts=40.0)
    sampler = Sampler([("constant", source)], interval_s=0.002)
    sampler.open()
    sampler.measure_idle(0.25)
    assert sampler.idle_watts == {source.device: pytest.approx(40.0, rel=1e-3)}
    assert source.events.count("read") >= 3  # as often as otherwise: power would have to be integrated
    source.watts = 100.0
    before = time.monotonic()
    sampler.start("train", "train")
    time.sleep(0.01)
    sampler.stop()
    totals = sampler.totals()
    assert totals.joules() == pytest.approx(100 * totals.covered_ns / 1e9, rel=1e-4)
    assert totals.net_joules == pytest.approx(60 * totals.covered_ns / 1e9, rel=1e-3)
    assert totals.seconds <= time.monotonic() - before


def test_no_baseline_where_it_could_not_be_read() -> None:
    source = ConstantPower(status=Status.ERROR)
    sampler = Sampler([("constant", source)], interval_s=NEVER_S)
    sampler.open()
    sampler.measure_idle(0.001)
    source.status = Status.OK
    sampler.start("train", "train")
    time.sleep(0.002)
    sampler.stop()
    assert sampler.idle_watts == {}
    assert sampler.totals().joules() is not None
    assert sampler.totals().net_joules is None


def test_a_sampler_starts_once() -> None:
    sampler = started_sampler(ConstantPower())
    with pytest.raises(RuntimeError, match="starts once"):
        sampler.start("train", "train")
    sampler.stop()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_in_a_forked_child_nothing_is_read_and_nothing_hangs() -> None:
    source = ConstantPower()
    sampler = started_sampler(source)
    sampler._lock.acquire()  # as if the fork came in the middle of a reading
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # ends a child that waits for the lock
        reads = len(source.events)
        sampler.read()
        sampler.mark("a", "b")
        sampler.stop()
        sampler.totals()
        os._exit(0 if len(source.events) == reads else 1)
    sampler._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    sampler.stop()
    assert source.events[-1] == "close"
