"""The overhead benchmark runs and says what it measured; how fast anything is, is no test's business."""

import json

import torch
from typer.testing import CliRunner

from lightning_estdgm.cli import app
from lightning_estdgm.recipes.gpt import ByteGPT
from lightning_estdgm.tools.bench._overhead import OverheadConfig, measure_overhead, peak_memory
from lightning_estdgm.tools.bench._peak_memory import allocated


def test_overhead_times_one_whole_interval_with_one_update():
    config = OverheadConfig(width=32, layers=1, batch_size=2, context=16, update_every=20, rounds=2)
    result = measure_overhead(config)
    low, high = result["overhead_range"]
    assert low <= result["overhead"] <= high
    assert result["dense_step_s"] > 0
    assert result["updates"] == 1
    assert result["observed_steps"] == 8
    low, high = result["mask_work_range_s"]
    assert low <= result["mask_work_s"] <= high


def test_overhead_times_steps_with_the_weights_of_several_updates_young():
    config = OverheadConfig(width=32, layers=1, batch_size=2, context=16, update_every=20, young=(1, 6))
    one, six = measure_overhead(config)["young"]
    assert six["updates"] == one["updates"] + 5
    assert all(0 < found["weights"] < 0.15 * 12 * 32**2 for found in (one, six))


def test_peak_memory_of_a_step_is_what_it_allocates():
    held, peak = allocated(lambda: torch.zeros(1000, dtype=torch.uint8).float())
    assert held == 0
    assert 5000 <= peak < 6000
    config = OverheadConfig(width=64, layers=1, batch_size=2, context=16, update_every=20)
    model = ByteGPT(64, 1, heads=8, context=16)
    weights = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for name, p in model.named_parameters() if name.startswith("blocks") and p.dim() == 2)
    peaks = peak_memory(config)
    assert peaks["dense"] > 4 * 4 * weights  # weights, gradients, and two moments
    added = peaks["masked"] - peaks["dense"]
    # Two masks of a byte a weight and indices of the grown weights, joined over layers; no copy of the weights.
    assert 2 * matrices <= added < 4.75 * matrices
    assert peaks["observed"] - peaks["masked"] >= 8 * matrices  # two sums of four bytes


def test_overhead_command_writes_its_json_with_the_machine(tmp_path, monkeypatch):
    small = OverheadConfig(width=32, layers=1, batch_size=2, context=16, update_every=20, rounds=1)
    monkeypatch.setattr("lightning_estdgm.tools.bench._overhead.OverheadConfig", lambda **knobs: small)
    result = CliRunner().invoke(app, ["bench", "overhead", "--json", str(tmp_path / "overhead.json")])
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "overhead.json").read_text())
    assert content["environment"]["cpu"]
    assert content["config"]["width"] == 32
    assert "overhead" in content
