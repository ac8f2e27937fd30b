"""Limits of the formulas for memory, traffic and mask work."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_estdgm.tools.planner._gpt_sizes import gpt
from lightning_estdgm.tools.planner._mask_work import update_cost
from lightning_estdgm.tools.planner._memory import memory_bytes
from lightning_estdgm.tools.planner._planned_model import inspect_model
from lightning_estdgm.tools.planner._setup import STRATEGIES, TrainingSetup
from lightning_estdgm.tools.planner._traffic import traffic_bytes


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_gpu_sends_nothing(strategy: str) -> None:
    setup = TrainingSetup(gpus=1, tensor_parallel=1)
    model = inspect_model(gpt(125e6), setup, strategy)
    assert traffic_bytes(model, setup, strategy) == {}
    cost = update_cost(model, setup, strategy)
    assert [cost[name] for name in cost if name.startswith("sent")] == [0.0] * 3
    held = memory_bytes(model, setup, strategy)
    assert held["gathered"] == held["DDP's buckets"] == 0.0
    assert held["weights"] == 4.0 * model.parameters


def test_more_gpus_hold_less_each_and_send_no_less() -> None:
    module = gpt(1.3e9)
    eight, many = TrainingSetup(gpus=8), TrainingSetup(gpus=64)
    for strategy in ("fsdp2", "2d"):
        held = [memory_bytes(inspect_model(module, s, strategy), s, strategy) for s in (eight, many)]
        assert held[1]["optimizer state"] == held[0]["optimizer state"] / 8
        assert held[1]["observation window"] < held[0]["observation window"]
    sent = [traffic_bytes(inspect_model(module, s), s, "ddp")["ring, dense"] for s in (eight, many)]
    assert sent == pytest.approx([2 * 7 / 8 * 4 * 1_315_280_896, 2 * 63 / 64 * 4 * 1_315_280_896])


def test_a_dense_mask_saves_no_traffic() -> None:
    setup = TrainingSetup(density=1.0)
    model = inspect_model(gpt(125e6), setup)
    sent = traffic_bytes(model, setup, "ddp")
    assert sent["all-reduce, active units"] == sent["all-reduce, dense"] == sent["all-reduce, mean"]
    assert update_cost(model, setup, "ddp")["FLOPs of observing"] == 0.0


def test_low_precision_and_optimizers_without_state_hold_less() -> None:
    def held(**settings: Any) -> dict[str, float]:
        setup = TrainingSetup(**settings)
        return memory_bytes(inspect_model(gpt(125e6), setup), setup, "ddp")

    full = held()
    assert held(precision="bf16-mixed") == full
    low = held(precision="bf16-true")
    assert low["weights"] == full["weights"] / 2
    assert low["observation window"] == full["observation window"]
    assert held(optimizer="sgd")["optimizer state"] == 0.0
    assert held(optimizer="sgd-momentum")["optimizer state"] == full["optimizer state"] / 2


def test_wrong_types_are_named() -> None:
    with pytest.raises(TypeError, match=r"gpus must be an int, got 8\.0"):
        TrainingSetup(gpus=8.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strategy must be one of"):
        memory_bytes(inspect_model(gpt(125e6), TrainingSetup()), TrainingSetup(), "zero")
