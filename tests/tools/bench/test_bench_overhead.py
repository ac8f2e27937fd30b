"""The overhead benchmark runs and says what it measured; how fast anything is, is no test's business."""

import json

from typer.testing import CliRunner

from lightning_estdgm.cli import app
from lightning_estdgm.tools.bench._overhead import OverheadConfig, measure_overhead


def test_overhead_times_one_whole_interval_with_one_update():
    config = OverheadConfig(width=32, layers=1, batch_size=2, context=16, update_every=20, rounds=2)
    result = measure_overhead(config)
    low, high = result["overhead_range"]
    assert low <= result["overhead"] <= high
    assert result["dense_step_s"] > 0
    assert result["updates"] == 1
    assert result["observed_steps"] == 8


def test_overhead_command_writes_its_json_with_the_machine(tmp_path, monkeypatch):
    small = OverheadConfig(width=32, layers=1, batch_size=2, context=16, update_every=20, rounds=1)
    monkeypatch.setattr("lightning_estdgm.tools.bench._overhead.OverheadConfig", lambda **knobs: small)
    result = CliRunner().invoke(app, ["bench", "overhead", "--json", str(tmp_path / "overhead.json")])
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "overhead.json").read_text())
    assert content["environment"]["cpu"]
    assert content["config"]["width"] == 32
    assert "overhead" in content
