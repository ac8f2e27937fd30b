"""`estdgm bench energy` pairs runs; what it measures is no test's business."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lightning_estdgm.cli import app
from lightning_estdgm.tools.bench._energy import EnergyBenchConfig, _interval_of_median

SMALL = EnergyBenchConfig(width=32, layers=1, batch_size=2, context=16, steps=10, pairs=2)


def test_the_command_pairs_runs_and_writes_its_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_estdgm.tools.bench._energy.EnergyBenchConfig", lambda **knobs: SMALL)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["bench", "energy", "--json", "energy-bench.json"])
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "energy-bench.json").read_text())
    assert content["environment"]["cpu"]
    assert content["config"]["pairs"] == 2
    assert content["sources"]
    assert content["plain_step_s"] > 0
    assert content["monitored_step_s"] > 0
    assert content["overhead"] > -1
    assert content["overhead_95"] is None
    assert os.listdir(tmp_path) == ["energy-bench.json"]


def test_the_interval_of_a_median() -> None:
    assert _interval_of_median([0.0] * 5) is None
    assert _interval_of_median([float(i) for i in range(100)]) == [40.0, 59.0]
