"""``estdgm bench memory``: what processes hold is counted, and both sides of each goal are printed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from lightning_estdgm.cli import app
from lightning_estdgm.tools.bench import _memory
from lightning_estdgm.tools.bench._memory import (
    MemoryBenchConfig,
    calculated,
    gpt_shape,
    measure_memory,
    memory_columns,
    memory_goals,
    settled,
)
from lightning_estdgm.tools.bench._memory_process import MemoryTask, held_bytes, make_gpt, train

SMALL = MemoryTask("packed", width=64, layers=1, context=16, batch=1, steps=6, update_every=3, block_size=4)


def run(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", "memory", *arguments])


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory, "SPEED", SMALL)
    out = tmp_path / "memory.json"
    done = run(
        "--width", "128", "--layers", "2", "--tokens", "32", "--block-size", "4", "--rounds", "1", "--json", str(out)
    )
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    (row,), (speed,) = found["memory"], found["speed"]
    parameters = sum(p.numel() for p in make_gpt(MemoryTask("without", 128, 2, 32)).parameters())
    assert row["dense"]["parameters"] == row["packed"]["parameters"] == parameters
    assert not row["dense"]["calculated"]
    assert row["dense"]["held"]["weights"] == row["dense"]["held"]["gradients"] == 4 * parameters
    masked = 2 * 12 * 128**2
    stored = parameters - masked + masked // 10
    assert row["packed"]["held"]["weights"] == pytest.approx(4 * stored, rel=0.01)
    assert row["packed"]["held"]["optimizer state"] == pytest.approx(8 * stored, rel=0.01)
    assert row["packed"]["resident_bytes"] - row["packed"]["peak_bytes"] == found["empty_bytes"]
    for arm in ("dense", "packed"):
        assert speed[arm]["seconds"] > 0
        assert 0 < speed[arm]["mask_share"] < 1
    assert [goal["what"].split(",")[0] for goal in found["goals"]] == [
        "weights",
        "peak of the process over an empty one",
        "step over that of dense storage",
        "mask work outside updates",
    ]
    for goal in found["goals"]:
        assert goal["dense"] in done.output
        assert goal["packed"] in done.output


def test_a_size_given_by_weights_is_trained_packed_and_its_losses_are_told(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    done = run("--weights", "1e6", "--tokens", "16", "--steps", "4", "--json", str(out))
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    (row,), (goal,) = found["memory"], found["goals"]
    assert row["dense"]["calculated"]
    assert row["packed"]["parameters"] >= 1e6
    assert row["dense"]["peak_bytes"] == 16 * row["packed"]["parameters"]
    assert row["packed"]["losses"][-1] < row["packed"]["losses"][0]
    assert found["speed"] == []
    for step, loss in enumerate(row["packed"]["losses"], 1):
        assert f"step {step}: loss {loss:.4f}" in done.output
    assert goal["measured"] == row["packed"]["resident_bytes"]
    assert goal["reached"]
    assert f"loss {row['packed']['losses'][0]:.3f} to {row['packed']['losses'][-1]:.3f}" in goal["what"]


def test_a_peak_is_not_that_of_the_process_that_started_it() -> None:
    code = "from lightning_estdgm.tools.bench._peak_memory import peak_resident as peak\n"
    code += "before = peak(); held = b'1' * 2**28; print(before, peak())"
    here = torch.ones(2**28)  # a gibibyte, while the other starts
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < here.nbytes
    assert 0.95 * 2**28 <= after - before < 2**29  # what was freed before, some megabytes, is used again


def test_what_is_held_is_counted() -> None:
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    assert held_bytes(model.parameters(), [optimizer]) == {"weights": 144, "gradients": 0, "optimizer state": 0}
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    assert held_bytes(model.parameters(), [optimizer]) == {
        "weights": 144,
        "gradients": 144,
        "optimizer state": 288 + 2 * 4,
    }


def test_steps_are_told_apart() -> None:
    found = train(replace(SMALL, steps=7))
    assert found["plain"] == [True, False, True, True, False, True]
    assert min(found["mask_seconds"]) > 0
    assert settled(found["plain"]) == [2, 3, 5]
    assert settled([True, True]) == [0, 1]
    without = train(replace(SMALL, arm="without"))
    assert without["plain"] == [True] * 5
    assert set(without["mask_seconds"]) == {0.0}


def test_a_machine_without_room_calculates_the_dense_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory, "available_bytes", lambda: 10**6)
    said: list[str] = []
    found = measure_memory(MemoryBenchConfig(64, 1, 16, block_sizes=(4,), times_steps=False), said.append)
    (row,) = found["memory"]
    assert row["dense"] == calculated(row["packed"]["parameters"])
    assert any("dense training is calculated, not run" in line for line in said)
    assert "(calculated)" in found["goals"][0]["dense"]


def test_goals_hold_both_sides_and_their_direction() -> None:
    def side(held: int, peak: int) -> dict[str, Any]:
        return {"parameters": 1, "held": {"weights": held}, "peak_bytes": peak, "calculated": False}

    found = {
        "config": {"weights": None, "density": 0.1},
        "empty_bytes": 2**29,
        "memory": [{"block_size": 4, "dense": side(1000, 2**31), "packed": side(120, 2**30)}],
        "speed": [
            {
                "block_size": 4,
                "dense": {"seconds": 1.2, "mask_share": 0.06},
                "packed": {"seconds": 1.0, "mask_share": 0.004},
            }
        ],
    }
    goals = memory_goals(found)
    assert [goal["reached"] for goal in goals] == [True, False, True, True]
    assert [goal["measured"] for goal in goals] == pytest.approx([0.12, 0.5, 1.2, 0.004])
    _, cells = memory_columns(found | {"goals": goals})
    assert cells[1][1:] == ["2.00 GiB (run)", "1.00 GiB", "0.5", "at most 0.25", "not reached"]
    assert cells[2][1:] == ["1200 ms", "1000 ms", "1.2", "at least 1.15", "reached"]


def test_a_training_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"packed training failed: [\s\S]*units\.size"):
        measure_memory(
            MemoryBenchConfig(64, 1, 16, block_sizes=(5,), times_steps=False, runs_dense=False), lambda _: None
        )


def test_shapes_hold_at_least_as_many_weights() -> None:
    for weights in (1e6, 3e8, 3e9, 1e11):
        width, layers = gpt_shape(weights)
        assert 12 * width**2 * (layers - 1) < weights <= 12 * width**2 * layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--density", "0"], "density: got 0.0, expected a number in (0, 1]"),
        (["--block-size", "0"], "block_sizes: got (0,), expected sides of units"),
        (["--weights", "10"], "weights: got 10.0, expected at least 1e6, such as 3e9"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", "").split())
