"""The benchmark of mask updates over ranks: it runs, and counts bytes; how fast anything is, is no test's business."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers import distributed_jobs as jobs
from lightning_estdgm.cli import app
from lightning_estdgm.tools.bench._distributed import DistributedConfig, measure_distributed, measure_on_this_rank

SMALL = DistributedConfig(width=32, layers=1, batch_size=2, context=16, update_every=20, intervals=2)


def test_both_ways_are_timed_over_whole_intervals_and_the_hook_sends_less() -> None:
    for result in jobs.run(measure_on_this_rank, 2, SMALL):
        dense, packed = result["dense all-reduce"], result["active units only"]
        for row in (dense, packed):
            assert row["updates"] == 2
            assert row["step_s"] > 0
            assert row["update_share"] == pytest.approx(row["update_s"] / (20 * row["step_s"]))
        assert dense["density"] == packed["density"]
        assert dense["bytes_per_step"]["mean"] == packed["bytes_per_step"]["dense"]
        # Of 40 steps 16 are observed, and the others send what is active.
        sent = packed["bytes_per_step"]
        assert sent["last"] == sent["dense"]
        assert 16 / 40 < sent["mean"] / sent["dense"] < 0.9


def test_the_command_starts_its_ranks_and_writes_its_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lightning_estdgm.tools.bench._distributed.measure_distributed", lambda _: measure_distributed(SMALL)
    )
    result = CliRunner().invoke(app, ["bench", "distributed", "--json", str(tmp_path / "d.json")])
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "d.json").read_text())
    assert content["environment"]["cpu"]
    assert content["config"]["ranks"] == 2
    assert content["active units only"]["updates"] == 2
    assert "update's share" in result.output
