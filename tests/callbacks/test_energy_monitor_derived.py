"""Figures derived from joules: above the idle baseline, CO2 and cost."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from helpers.energy_parts import ConstantPower
from helpers.energy_runs import WATTS, Net, data, monitor, rows, trainer
from lightning_estdgm.energy._footprint import Footprint
from lightning_estdgm.energy._reading import DeviceId, Reading

pytestmark = pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*")  # as they mean to


class Loaded(ConstantPower):
    """Draws 50 W more from `since_ns` on."""

    since_ns: int | None = None

    def read(self, devices: Collection[DeviceId] | None = None) -> Mapping[DeviceId, Reading]:
        now, extra_uj = time.monotonic_ns(), 0
        if self.since_ns is not None:
            extra_uj = (now - self.since_ns) * 50 // 1000
        return {self.device: Reading(now, energy_uj=now * int(self.watts) // 1000 + extra_uj)}


def test_idle_joules_are_told_beside_the_gross_ones(tmp_path: Path) -> None:
    source = Loaded(watts=WATTS)

    class Work(Callback):
        def on_train_start(self, *args: Any) -> None:
            source.since_ns = time.monotonic_ns()

    mon = monitor(source, idle_s=0.02, interval_s=0.005)
    trainer(tmp_path, mon, Work(), logger=CSVLogger(tmp_path, "csv", "")).fit(Net(), data())
    summary = mon.summary()
    assert summary["idle"]["watts"] == pytest.approx(WATTS, rel=1e-3)
    covered_s = summary["seconds"] * summary["coverage_ratio"]
    assert summary["idle"]["joules"] == pytest.approx(WATTS * covered_s, rel=1e-3)
    assert summary["idle"]["net_joules"] == pytest.approx(summary["total_joules"] - summary["idle"]["joules"], abs=1e-5)
    assert 50 * 8 * 0.002 * 0.9 < summary["idle"]["net_joules"] < summary["total_joules"] * 0.5
    last = rows(tmp_path / "csv")[-1]
    assert last["energy/net_joules"] == pytest.approx(summary["idle"]["net_joules"], abs=1e-5)
    assert last["energy/total_joules"] == pytest.approx(summary["total_joules"], abs=1e-5)
    assert summary["by_phase"].keys() == {"train"}  # the wait before it is in no figure of the run


def test_a_restart_without_a_baseline_has_no_net_joules(tmp_path: Path) -> None:
    first = monitor(idle_s=0.01)
    run = trainer(tmp_path, first)
    run.fit(Net(), data())
    assert first.summary()["idle"]["net_joules"] is not None
    run.save_checkpoint(tmp_path / "a.ckpt")
    second = monitor()
    trainer(tmp_path, second, max_epochs=2, logger=CSVLogger(tmp_path, "csv", "")).fit(
        Net(), data(), ckpt_path=tmp_path / "a.ckpt"
    )
    assert second.summary()["idle"] is None
    assert "energy/net_joules" not in rows(tmp_path / "csv")[-1]


def test_co2_and_cost_are_derived_and_kept_apart(tmp_path: Path) -> None:
    plain, priced = monitor(), monitor(footprint=Footprint(grams_co2_per_kwh=400, price_per_kwh=0.25, pue=1.5))
    for mon, name in ((plain, "plain"), (priced, "priced")):
        trainer(tmp_path, mon, logger=CSVLogger(tmp_path, name, "")).fit(Net(), data())
    assert not [name for row in rows(tmp_path / "plain") for name in row if name.startswith("footprint/")]
    summary, last = priced.summary(), rows(tmp_path / "priced")[-1]
    kwh = summary["total_joules"] / 3.6e6
    assert summary["total_joules"] == pytest.approx(WATTS * summary["seconds"] * summary["coverage_ratio"], rel=1e-4)
    assert summary["footprint"]["grams_co2"] == last["footprint/co2_grams"] == pytest.approx(kwh * 1.5 * 400)
    assert summary["footprint"]["cost"] == last["footprint/cost"] == pytest.approx(kwh * 1.5 * 0.25)
