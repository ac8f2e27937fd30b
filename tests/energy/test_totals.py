"""Sums of energy: their state, and joules above the idle baseline."""

from __future__ import annotations

import io

import torch

from lightning_estdgm.energy._accumulator import Accumulator
from lightning_estdgm.energy._reading import DeviceId, Reading
from lightning_estdgm.energy._totals import Totals

GPU = DeviceId("a", "gpu", "GPU-1")


def after(*energy_uj: int, idle_mw: int | None = None) -> Totals:
    """The sums of a counter that was read once a second."""
    acc = Accumulator()
    acc.add_device(GPU, source="nvml", method="counter", idle_mw=idle_mw)
    acc.switch(0, "train", "train")
    for second, uj in enumerate(energy_uj):
        acc.update(second * 10**9, {GPU: Reading(second * 10**9, energy_uj=uj)})
    return acc.totals()


def through_a_file(totals: Totals) -> Totals:
    file = io.BytesIO()
    torch.save(totals.state_dict(), file)
    file.seek(0)
    return Totals.from_state_dict(torch.load(file, weights_only=True))


def test_the_state_loads_with_weights_only_and_adds_up() -> None:
    totals = after(0, 3_000_000)
    restored = through_a_file(totals)
    assert restored == totals
    both = restored.add(totals)
    assert both.joules() == 6.0
    assert both.seconds == 2.0
    assert both.coverage_ratio == 1.0
    beside = restored.add(totals, beside=True)
    assert beside.joules() == 6.0
    assert beside.seconds == 1.0


def test_net_joules_need_a_baseline_for_all_that_was_read() -> None:
    readings = (0, 300_000_000, 600_000_000)
    with_baseline, without = after(*readings, idle_mw=60_000), after(*readings)
    assert (with_baseline.joules(), with_baseline.net_joules) == (600.0, 600.0 - 2 * 60.0)
    assert with_baseline.add(with_baseline).net_joules == 2 * 480.0
    assert without.net_joules is None
    assert with_baseline.add(without).net_joules is None  # a restart without idle_s
    assert through_a_file(with_baseline) == with_baseline
