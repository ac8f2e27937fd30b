"""The benchmark commands run and say what they measured; how fast anything is, is no test's business."""

import json

import pytest
from typer.testing import CliRunner

from lightning_estdgm.bench.kernels import KernelsConfig, measure_kernels
from lightning_estdgm.bench.overhead import OverheadConfig, measure_overhead
from lightning_estdgm.cli import app


def test_overhead_times_one_whole_interval_with_one_update():
    config = OverheadConfig(width=32, layers=1, batch_size=2, context=16, update_every=20, rounds=2)
    result = measure_overhead(config)
    low, high = result["overhead_range"]
    assert low <= result["overhead"] <= high
    assert result["dense_step_s"] > 0
    assert result["updates"] == 1
    assert result["observed_steps"] == 8


def test_kernel_rows_cover_the_grid():
    config = KernelsConfig(
        shapes=((8, 64, 32),), block_sizes=(16, 32), densities=(0.5, 1.0), dtypes=("float32",), rounds=1
    )
    rows = list(measure_kernels(config))
    assert {(row["block_size"], row["density"]) for row in rows} == {(16, 0.5), (16, 1.0), (32, 0.5), (32, 1.0)}
    for row in rows:
        assert row["speedup"] == pytest.approx(row["dense_s"] / row["sparse_s"])
        assert row["efficiency"] == pytest.approx(row["speedup"] * row["density"])


def test_overhead_command_writes_its_json_with_the_machine(tmp_path, monkeypatch):
    small = OverheadConfig(width=32, layers=1, batch_size=2, context=16, update_every=20, rounds=1)
    monkeypatch.setattr("lightning_estdgm.bench.overhead.OverheadConfig", lambda **knobs: small)
    result = CliRunner().invoke(app, ["bench", "overhead", "--json", str(tmp_path / "overhead.json")])
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "overhead.json").read_text())
    assert content["environment"]["cpu"]
    assert content["config"]["width"] == 32
    assert "overhead" in content
