"""Conversion of readings to joules."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_estdgm.energy._accumulator import Accumulator
from lightning_estdgm.energy._reading import DeviceId, Reading, Status
from lightning_estdgm.energy._totals import Totals

S = 1_000_000_000
GPU = DeviceId("a", "gpu", "GPU-1")
CPU = DeviceId("a", "cpu", "package-0")


def counter(wrap_range_uj: int | None = None) -> Accumulator:
    acc = Accumulator()
    acc.add_device(GPU, source="s", method="counter", wrap_range_uj=wrap_range_uj)
    acc.switch(0, "train", "train")
    return acc


def read(acc: Accumulator, t_s: float, uj: int | None = None, status: Status = Status.OK) -> None:
    ns = round(t_s * S)
    acc.update(ns, {GPU: Reading(ns, energy_uj=uj, status=status)})


def power(acc: Accumulator, t_s: float, mw: int | None = None, status: Status = Status.OK) -> None:
    ns = round(t_s * S)
    acc.update(ns, {GPU: Reading(ns, power_mw=mw, status=status)})


def test_a_counter_gives_differences_from_its_first_reading() -> None:
    acc = counter()
    assert acc.totals().joules() is None
    read(acc, 0, 5_000_000)
    assert acc.totals().joules() is None  # one reading is no energy, and not 0 J either
    read(acc, 1, 7_000_000)
    read(acc, 2, 7_500_000)
    totals = acc.totals()
    assert totals.joules() == 2.5
    assert totals.coverage_ratio == 1.0
    assert (totals.gaps, totals.segments) == (0, 1)


def test_a_wrap_is_added_where_the_range_is_known() -> None:
    acc = counter(wrap_range_uj=262_143_328_850)
    read(acc, 0, 262_143_000_000)
    read(acc, 1, 100_000)
    assert acc.totals().joules() == pytest.approx(0.428850)
    assert acc.totals().gaps == 0


@pytest.mark.parametrize("wrap", [None, 262_143_328_850], ids=["unknown range", "wrap would mean 200 kW"])
def test_a_counter_that_goes_back_was_reset(wrap: int | None) -> None:
    acc = counter(wrap_range_uj=wrap)
    read(acc, 0, 60_000_000_000)
    read(acc, 1, 60_001_000_000)
    read(acc, 2, 3_000_000)
    read(acc, 3, 5_000_000)
    totals = acc.totals()
    assert totals.joules() == 3.0
    assert (totals.gaps, totals.segments) == (1, 2)
    assert totals.coverage_ratio == pytest.approx(2 / 3)


def test_so_long_between_readings_that_it_may_have_wrapped_twice_is_a_gap() -> None:
    acc = counter(wrap_range_uj=65_000_000)  # 65 J: at 1 kW a wrap every 65 ms
    read(acc, 0, 0)
    read(acc, 1, 10)
    assert acc.totals().joules() is None
    assert acc.totals().gaps == 1


def test_a_counter_runs_on_while_it_cannot_be_read() -> None:
    acc = counter()
    read(acc, 0, 0)
    for t in (1, 2, 3):
        read(acc, t, status=Status.ERROR)
    totals = acc.totals()
    assert totals.joules() is None
    assert totals.coverage_ratio == 0.0
    assert totals.gaps == 1  # one stretch
    read(acc, 4, 8_000_000)
    assert acc.totals().joules() == 8.0
    assert acc.totals().segments == 1


@pytest.mark.parametrize("status", [Status.UNAVAILABLE, Status.NO_PERMISSION, Status.UNSUPPORTED])
def test_a_device_that_was_lost_starts_anew(status: Status) -> None:
    acc = counter()
    read(acc, 0, 0)
    read(acc, 1, 1_000_000)
    read(acc, 2, status=status)
    read(acc, 3, 9_000_000)
    read(acc, 4, 10_000_000)
    totals = acc.totals()
    assert totals.joules() == 2.0
    assert (totals.gaps, totals.segments) == (1, 2)


def test_a_device_missing_from_the_readings_failed() -> None:
    acc = counter()
    read(acc, 0, 0)
    acc.update(1 * S, {})
    assert acc.totals().gaps == 1


def test_a_device_that_is_not_due_neither_failed_nor_was_read() -> None:
    acc = counter()
    read(acc, 0, 0)
    acc.switch(1 * S, "train", "val")
    acc.update(1 * S, {}, {GPU})
    assert acc.totals().gaps == 0
    assert acc.failing == ()
    acc.update(2 * S, {})
    assert acc.failing == (GPU,)
    read(acc, 4, 4_000_000)
    assert acc.failing == ()
    assert acc.totals().joules(stage="train") == 1.0  # a boundary without a reading: split by time
    assert acc.totals().joules(stage="val") == 3.0


def test_a_good_status_without_a_value_is_no_reading() -> None:
    acc = counter()
    read(acc, 0, 0)
    read(acc, 1, None)
    assert acc.totals().gaps == 1


def test_power_is_integrated_by_trapezoids() -> None:
    acc = counter()
    power(acc, 0, 100_000)
    power(acc, 2, 200_000)
    power(acc, 3, 0)
    assert acc.totals().joules() == 300.0 + 100.0


def test_power_is_not_bridged_over_a_failure_or_a_long_pause() -> None:
    acc = counter()
    power(acc, 0, 100_000)
    power(acc, 1, 100_000)
    power(acc, 2, status=Status.ERROR)
    power(acc, 3, 100_000)
    power(acc, 4, 100_000)
    assert acc.totals().joules() == 200.0
    assert acc.totals().gaps == 1
    power(acc, 10, 100_000)
    assert acc.totals().joules() == 200.0
    assert acc.totals().gaps == 2
    assert acc.totals().coverage_ratio == pytest.approx(0.2)


def test_a_device_that_changes_from_counter_to_power_does_not_continue() -> None:
    acc = counter()
    read(acc, 0, 0)
    power(acc, 1, 100_000)
    power(acc, 2, 100_000)
    assert acc.totals().joules() == 100.0
    assert acc.totals().gaps == 1


def test_energy_goes_to_the_window_in_which_it_fell() -> None:
    acc = counter()
    read(acc, 0, 0)
    read(acc, 1, 10_000_000)
    acc.switch(1 * S, "train", "val")
    read(acc, 2, 30_000_000)
    acc.switch(2 * S, "refinement", "train")
    read(acc, 3, 60_000_000)
    totals = acc.totals()
    assert totals.joules(label="train", stage="train") == 10.0
    assert totals.joules(stage="val") == 20.0
    assert totals.joules(label="refinement") == 30.0
    assert totals.labels() == ["train", "refinement"]
    assert totals.window_ns == {("train", "train"): S, ("train", "val"): S, ("refinement", "train"): S}


def test_energy_over_several_windows_is_split_by_time() -> None:
    acc = counter()
    read(acc, 0, 0)
    acc.switch(1 * S, "b", "train")
    read(acc, 2, status=Status.ERROR)
    acc.switch(3 * S, "c", "train")
    read(acc, 4, 4_000_001)
    totals = acc.totals()
    assert totals.joules(label="train") == 1.0
    assert totals.joules(label="b") == 2.0
    assert totals.joules(label="c") == 1.000001  # the odd microjoule is not lost
    assert totals.joules() == 4.000001


def test_kinds_and_estimates_are_told_apart() -> None:
    acc = counter()
    acc.add_device(CPU, source="guess", method="estimated")
    for t in (0, 1):
        acc.update(t * S, {GPU: Reading(t * S, energy_uj=t * 5), CPU: Reading(t * S, energy_uj=t * 7)})
    totals = acc.totals()
    assert totals.joules(kind="gpu") == 5e-6
    assert totals.joules(kind="dram") is None
    assert totals.joules(estimated=True) == 7e-6
    assert totals.joules(estimated=False) == 5e-6


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="max_interval_s must be > 0, got 0"):
        Accumulator(max_interval_s=0)
    acc = counter()
    with pytest.raises(ValueError, match="already read by source 's'"):
        acc.add_device(GPU, source="t", method="counter")
    with pytest.raises(ValueError, match="wrap_range_uj must be > 0 or None, got 0"):
        acc.add_device(CPU, source="t", method="counter", wrap_range_uj=0)
    with pytest.raises(RuntimeError, match="switch"):
        Accumulator().update(0, {})
    with pytest.raises(ValueError, match="version 1 or 2 expected, got 7"):
        Totals.from_state_dict({"version": 7})


OUTCOMES = ("ok", "ok", "ok", "error", "lost", "reset", "missing")
RANGE = 50_000_000
events = st.lists(
    st.one_of(
        st.tuples(
            st.just("read"),
            st.integers(1, 40_000_000),  # ns: a wrap of the 50 J range at 1 kW takes 50 ms
            st.integers(0, 700),  # uJ/us: power below the plausible 1 kW
            st.sampled_from(OUTCOMES),
        ),
        st.tuples(
            st.just("switch"),
            st.integers(0, 5_000),
            st.sampled_from(["exploration", "consolidation", "refinement"]),
            st.sampled_from(["train", "val"]),
        ),
        st.just(("restart",)),
    ),
    max_size=40,
)


@given(events)
def test_windows_sum_to_the_total_in_any_interleaving_and_with_any_fault(history: list[tuple]) -> None:
    wrapping, plain, sampled = (DeviceId("a", k, u) for k, u in (("cpu", "w"), ("gpu", "p"), ("gpu", "i")))

    def begin() -> Accumulator:
        acc = Accumulator(max_interval_s=0.03)
        acc.add_device(wrapping, source="rapl", method="counter", wrap_range_uj=RANGE)
        acc.add_device(plain, source="nvml", method="counter")
        acc.add_device(sampled, source="nvml", method="integrated")
        acc.switch(now, *window)
        return acc

    now, window = 0, ("exploration", "train")
    saved, acc = Totals(), begin()
    true_uj = 0  # drawn since the beginning
    origin_uj = 10**12  # of the plain counter
    wrap_since: tuple[int, int] | None = None  # ns and true energy at the last reading of the segment
    plain_since: int | None = None
    power_since: tuple[int, int] | None = None
    expected = {wrapping: 0, plain: 0, sampled: 0}
    for event in history:
        if event[0] == "switch":
            now += event[1]
            window = event[2:]
            acc.switch(now, *window)
        elif event[0] == "restart":
            saved = Totals.from_state_dict(saved.add(acc.totals()).state_dict())
            acc = begin()
            wrap_since = plain_since = power_since = None
        else:
            _, passed_ns, watts, outcome = event
            now += passed_ns
            true_uj += watts * passed_ns // 1000
            if outcome == "reset":
                origin_uj, plain_since = -true_uj, None  # reads 0 now
            if outcome in ("ok", "reset"):
                readings = {
                    wrapping: Reading(now, energy_uj=true_uj % RANGE),
                    plain: Reading(now, energy_uj=origin_uj + true_uj),
                    sampled: Reading(now, power_mw=watts * 1000),
                }
                if wrap_since is not None and 1000 * (now - wrap_since[0]) // 1000 < RANGE:
                    expected[wrapping] += true_uj - wrap_since[1]
                if plain_since is not None:
                    expected[plain] += true_uj - plain_since
                if power_since is not None and now - power_since[0] <= 30_000_000:
                    expected[sampled] += int(Fraction(power_since[1] + watts, 2) * Fraction(now - power_since[0], 1000))
                wrap_since, plain_since, power_since = (now, true_uj), true_uj, (now, watts)
            elif outcome == "missing":
                readings = {}
                power_since = None
            else:
                status = Status.ERROR if outcome == "error" else Status.UNAVAILABLE
                readings = {d: Reading(now, status=status) for d in expected}
                power_since = None
                if outcome == "lost":
                    wrap_since = plain_since = None
            acc.update(now, readings)
    totals = saved.add(acc.totals())

    for device, uj in expected.items():
        assert sum(v for c, v in totals.energy_uj.items() if c.device == device) == uj
    for cut in ("label", "stage"):
        windows = {getattr(cell, cut) for cell in totals.energy_uj}
        parts = [totals.joules(**{cut: value}) for value in windows]
        assert sum(round(p * 1e6) for p in parts if p is not None) == sum(expected.values())
    assert all(uj >= 0 for uj in totals.energy_uj.values())
    assert sum(totals.window_ns.values()) == now
    assert 0 <= totals.covered_ns <= totals.expected_ns == 3 * now
