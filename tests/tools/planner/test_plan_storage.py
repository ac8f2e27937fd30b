"""Memory by storage and schedule: the formulas against tensors, and what fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from lightning_estdgm.cli import app
from lightning_estdgm.sparse import BlockTopology
from lightning_estdgm.sparse._packed_linear import gather
from lightning_estdgm.tools.planner._gpt_sizes import GPT_SIZES, CountedGpt, gpt
from lightning_estdgm.tools.planner._memory import dense_bytes, memory_bytes
from lightning_estdgm.tools.planner._planned_model import inspect_model
from lightning_estdgm.tools.planner._setup import TrainingSetup
from lightning_estdgm.tools.planner._storage import (
    GPU_BYTES,
    largest_gpt,
    packed_bytes,
    storage_plans,
    storage_table,
)

ALONE = TrainingSetup(gpus=1)
PARTS = "weights, gradients, optimizer state"


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_a_packed_training_holds_what_is_calculated(block_size: int) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    setup = TrainingSetup(gpus=1, block_size=block_size, distribution="uniform", density=0.25)
    planned = inspect_model(model, setup)
    stored, lists = list(model[4].parameters()) + [layer.bias for layer in (model[0], model[2])], 0
    generator = torch.Generator().manual_seed(0)
    for layer in (model[0], model[2]):
        rows, columns = (size // block_size for size in layer.weight.shape)
        order = torch.rand(rows * columns, generator=generator).argsort()
        mask = (order < rows * columns // 4).view(rows, columns)
        topology = BlockTopology.from_mask(mask, block_size, compact=True)
        stored.append(nn.Parameter(gather(layer.weight.detach(), topology)))
        by_age = torch.arange(topology.nnz, dtype=torch.int32)
        tensors = (topology.row_ptr, topology.col_idx, topology.col_ptr, topology.row_idx, by_age)
        lists += sum(tensor.nbytes for tensor in tensors) + mask.numel() * (2 + 4)
    optimizer = torch.optim.AdamW(stored)
    for parameter in stored:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = sum(tensor.nbytes for tensor in (*stored, *(p.grad for p in stored if p.grad is not None), *states))
    found = packed_bytes(planned, setup, 0.25)
    assert found[PARTS] == held
    assert found["masks, index lists, window"] == lists
    assert found["one layer at a time"] == 64 * 128 * 4


def test_schedules_cost_what_their_highest_density_does() -> None:
    plans = {(plan.storage, plan.schedule): plan for plan in storage_plans(0.1)}
    assert {name: plan.highest for (_, name), plan in plans.items()} == pytest.approx(
        {"any": 0.1, "constant": 0.1, "sparse-to-denser": 0.1, "low-density": 0.15, "cycle": 0.7}
    )
    assert plans["packed", "sparse-to-denser"].start == 0.05
    assert plans["packed", "cycle"].end == 0.1
    assert plans["packed", "cycle"].mean == pytest.approx(0.24, abs=0.01)
    rows = {(row["storage"], row["schedule"]): row for row in storage_table(inspect_model(gpt(1.3e9), ALONE), ALONE)}
    order = [rows["packed", name]["against_dense"] for name in ("constant", "low-density", "cycle")]
    assert order == sorted(order)
    assert rows["packed", "constant"]["against_dense"] == rows["packed", "sparse-to-denser"]["against_dense"]
    assert rows["packed", "cycle"]["against_dense"] > 0.6 > 0.2 > rows["packed", "constant"]["against_dense"]
    assert rows["dense", "any"]["against_dense"] > 1.0
    for row in rows.values():
        assert sum(row["end_bytes"].values()) <= sum(row["peak_bytes"].values())
        for name, room in GPU_BYTES.items():
            assert row["fits"][name] is (sum(row["peak_bytes"].values()) <= room)


def test_ddp_has_buckets_of_what_is_stored() -> None:
    planned = inspect_model(gpt(125e6), ALONE)
    alone, ddp = (packed_bytes(planned, TrainingSetup(gpus=gpus), 0.1)[PARTS] for gpus in (1, 8))
    assert ddp == pytest.approx(alone * 5 / 4)


@pytest.mark.parametrize("index", [0, 1, 4])
@pytest.mark.parametrize("room", [3e9, 24e9])
def test_the_largest_gpt_fits_and_one_block_more_does_not(index: int, room: float) -> None:
    plan = storage_plans(0.1)[index]
    largest = largest_gpt(plan, ALONE, room)
    shapes = {}
    for published, width in GPT_SIZES.values():
        for layers in range(1, 2 * published + 1):
            shapes[layers * (12 * width**2 + 4 * width) + (50_257 + 2048 + 2) * width] = layers, width
    layers, width = shapes[largest]

    def held(layers: int) -> float:
        return sum(plan.bytes_at(plan.highest, inspect_model(CountedGpt.on_meta(layers, width), ALONE), ALONE).values())

    assert held(layers) <= room < held(layers + 1)
    assert largest_gpt(plan, ALONE, 1e6) == 0


def test_dense_storage_is_that_of_the_other_tables() -> None:
    planned = inspect_model(gpt(125e6), ALONE)
    held = memory_bytes(planned, ALONE, "ddp")
    row = storage_table(planned, ALONE)[0]
    assert row["peak_bytes"] == row["end_bytes"]
    assert sum(row["peak_bytes"].values()) == pytest.approx(sum(held.values()))
    assert row["against_dense"] == pytest.approx(sum(held.values()) / dense_bytes(held))


def test_the_command_says_bytes_by_storage_schedule_and_what_fits(tmp_path: Path) -> None:
    arguments = ["plan", "--params", "1.3e9", "--gpus", "1", "--strategy", "ddp", "--json", str(tmp_path / "plan.json")]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "plan.json").read_text())["storage"]
    assert [row["schedule"] for row in rows] == ["any", "constant", "sparse-to-denser", "low-density", "cycle"]
    for row in rows:
        (line,) = (line for line in done.output.splitlines() if f" {row['schedule']} " in line)
        assert f"{row['against_dense']:.2f}" in line
        for name in GPU_BYTES:
            assert f"{row['largest_gpt'][name] / 1e9:.1f}B" in line
