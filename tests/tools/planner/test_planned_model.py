"""The model that a plan counts: its layers, units and densities are those of a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_estdgm import DGMConfig, DGMController
from lightning_estdgm.config import Units
from lightning_estdgm.recipes import ByteGPT
from lightning_estdgm.tools.planner._gpt_sizes import gpt
from lightning_estdgm.tools.planner._memory import memory_bytes
from lightning_estdgm.tools.planner._planned_model import inspect_model
from lightning_estdgm.tools.planner._setup import TrainingSetup


@pytest.mark.parametrize("block_size", ["auto", 1, 16])
@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_layers_units_and_densities_are_those_of_a_run(block_size: Any, distribution: str) -> None:
    """The same model, made and masked by the controller."""
    model = ByteGPT(width=128, layers=2, heads=2, context=16)
    setup = TrainingSetup(density=0.7, block_size=block_size, distribution=distribution)
    planned = inspect_model(model, setup)
    config = DGMConfig(units=Units(size=block_size, distribution=distribution))
    with DGMController(
        model, torch.optim.SGD(model.parameters(), lr=0.1), config, total_steps=1000, audit=False
    ) as dgm:
        decided = dgm.decisions()
    assert [x.name for x in planned.layers] == [d.name for d in decided]
    for layer, decision in zip(planned.layers, decided, strict=True):
        assert layer.shape == decision.shape
        assert layer.weights == math.prod(decision.shape)
        assert layer.block_size == decision.block_size
        assert layer.density == decision.density
    assert planned.masked_weights == sum(math.prod(d.shape) for d in decided if d.masked)


def test_layers_of_a_user_s_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(3, 64, 3),
            nn.Linear(256, 768),
            nn.MultiheadAttention(128, 2),
            nn.Conv2d(128, 256, 3),
            nn.Conv2d(256, 256, 3, groups=4),
            nn.Linear(256, 10),
        )
    found = inspect_model(model, TrainingSetup(density=0.5))
    planned = {layer.name: layer for layer in found.layers}
    names = ("0", "1", "2", "2.out_proj", "3", "4", "5")
    assert [planned[n].block_size for n in names] == [1, 32, 1, 1, 16, 1, 0]
    assert (planned["3"].units, planned["3"].has_operator) == (8 * 16, True)
    assert (planned["4"].has_operator, planned["4"].why) == (False, "grouped convolution: no sparse operator")
    lists = [2 * 24 * 8 + 24 + 8 + 2, 2 * 16 * 8 + 16 + 8 + 2]  # of the linear layer and the convolution
    assert memory_bytes(found, TrainingSetup(gpus=1, density=0.5), "ddp")["block index lists"] == 4 * sum(lists)
    assert planned["2"].parts == 3
    assert planned["5"].why == "output head"
    total = sum(x.weights for x in planned.values() if x.block_size)
    assert sum(x.active_weights for x in planned.values() if x.block_size) == pytest.approx(total / 2, abs=32 * 32)


def test_units_of_the_2d_plan_are_single_weights_but_where_blocks_are_asked_for() -> None:
    model = gpt(125e6)
    assert {x.block_size for x in inspect_model(model, TrainingSetup(), "2d").masked} == {1}
    assert {x.block_size for x in inspect_model(model, TrainingSetup(block_size=16), "2d").masked} == {16}
    assert not any(x.has_operator for x in inspect_model(model, TrainingSetup(block_size=16), "2d").masked)
    assert {x.block_size for x in inspect_model(model, TrainingSetup(tensor_parallel=1), "2d").masked} == {64}
