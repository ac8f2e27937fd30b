"""Where `EnergyMonitor` writes: loggers of every kind, TensorBoard's page, the Prometheus file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from helpers.energy_parts import ConstantPower
from helpers.energy_runs import WATTS, Net, Phases, data, monitor, rows, trainer
from lightning_estdgm.callbacks.energy import EnergyMonitor

pytestmark = pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*")  # as they mean to


class Dashes(CSVLogger):
    """Some loggers cannot have a slash in a name."""

    group_separator = "-"


def test_every_kind_of_logger(tmp_path: Path) -> None:
    loggers = [Dashes(tmp_path, "dashes", ""), CSVLogger(tmp_path, "csv", ""), TensorBoardLogger(tmp_path, "tb", "")]
    trainer(tmp_path, monitor(), Phases(), logger=loggers).fit(Net(), data())
    slashes = {name for row in rows(tmp_path / "csv") for name in row}
    dashes = {name for row in rows(tmp_path / "dashes") for name in row}
    assert "energy-phase-refinement_joules" in dashes
    assert "power-gpu-0-0_watts" in dashes
    assert dashes == {name.replace("/", "-") for name in slashes}


def test_tensorboard_opens_with_the_energy_curves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG

    mon = EnergyMonitor([ConstantPower(watts=WATTS), "cpu-estimate"], idle_s=0.01)
    logger = [CSVLogger(tmp_path, "csv", ""), TensorBoardLogger(tmp_path, "tb", "")]
    trainer(tmp_path, mon, Phases(), logger=logger).fit(Net(), data(), data(8))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors(CONFIG_SUMMARY_TAG)[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert list(charts)[:3] == ["Joules by phase", "Joules", "Watts"]
    tags = events.Tags()["scalars"]
    shown = {title: {t for t in tags for p in patterns if re.match(p, t)} for title, patterns in charts.items()}
    assert shown["Joules"] == {"energy/total_joules_estimated", "energy/net_joules_estimated"}
    phases = ("setup", "exploration", "refinement")
    assert shown["Joules by phase"] == {f"energy/phase/{phase}_joules_estimated" for phase in phases}
    assert {"power/total_watts_estimated", "power/gpu_watts"} <= shown["Watts"]
    told = {"energy/seconds", "energy/coverage_ratio", "energy/gaps"}
    assert {t for t in tags if re.match("(energy|power)/", t)} - told == set().union(*shown.values())


def test_hyperparameters_of_the_module_keep_their_values_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    class Named(Net):
        def __init__(self, method: str = "adamw-large", density: float = 0.25) -> None:
            super().__init__()
            self.save_hyperparameters()

    logger = TensorBoardLogger(tmp_path, "tb", "", default_hp_metric=False)
    trainer(tmp_path, monitor(), logger=logger).fit(Named(), data())
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    written = [HParamsPluginData.FromString(c) for c in events.PluginTagToContent("hparams").values()]
    (row,) = [each.session_start_info.hparams for each in written if each.session_start_info.hparams]
    values = {name: value.string_value or value.number_value for name, value in row.items()}
    assert values == {
        "method": "adamw-large",
        "density": 0.25,
        "estdgm/method": "dense",
        "estdgm/density": 1.0,
        "unit": "none",
        "rate": values["rate"],
    }


def test_a_prometheus_file_is_renewed_at_every_log(tmp_path: Path) -> None:
    path, seen = tmp_path / "estdgm.prom", []

    class Look(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(path.read_text() if path.exists() else "")

    mon = monitor(prometheus=path)
    trainer(tmp_path, mon, Look()).fit(Net(), data())
    values = [float(re.findall(r"^hw_energy_joules_total\{.*\} (.*)$", text, re.M)[0]) for text in seen if text]
    assert values[0] < values[2] < values[4]  # written every second step
    assert f"{mon.total_joules}" in path.read_text()
    assert {p.name for p in tmp_path.iterdir() if "prom" in p.name} == {"estdgm.prom"}


def test_a_fit_on_other_devices_has_no_watts_of_those_before(tmp_path: Path) -> None:
    mon = monitor(ConstantPower(watts=WATTS, uid="first"))
    trainer(tmp_path, mon).fit(Net(), data())
    assert [m.attributes["hw.id"] for m in mon.measurements() if m.name == "hw.power"] == ["first"]
    seen = []

    class Export(Callback):
        def on_train_start(self, *args: Any) -> None:
            seen.append(mon.measurements())

    mon._sources = (ConstantPower(watts=WATTS, uid="second"),)
    trainer(tmp_path, mon, Export()).fit(Net(), data())
    assert {m.attributes["hw.id"] for m in seen[0] if m.name == "hw.energy"} >= {"first"}
    assert [m for m in seen[0] if m.name == "hw.power"] == []
    assert [m.attributes["hw.id"] for m in mon.measurements() if m.name == "hw.power"] == ["second"]


def test_a_prometheus_file_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    mon = monitor(prometheus=tmp_path / "nowhere" / "estdgm.prom")
    with pytest.warns(UserWarning, match="Prometheus file .*nowhere.* cannot be written") as caught:
        trainer(tmp_path, mon).fit(Net(), data())
    assert len([w for w in caught if "Prometheus" in str(w.message)]) == 1
    assert mon.summary()["steps"] == 8
