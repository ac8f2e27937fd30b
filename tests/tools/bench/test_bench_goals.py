"""Goals are checked against rows, and the default grids hold their shapes."""

import torch

from lightning_estdgm.tools.bench._goals import goals_columns, kernel_goals
from lightning_estdgm.tools.bench.kernels._kernels_config import KernelsConfig, quick_kernels
from lightning_estdgm.tools.bench.kernels._rows import product_row, row


def goal_row(block_size, density, efficiency, backend="triton", **changes):
    shape = {"tokens": 8192, "out_features": 4096, "in_features": 4096} | changes
    product = product_row(1.0, density / efficiency, 1e9, density, 0.0, False)
    products = dict.fromkeys(("Y", "dX", "dW"), product)
    seconds = (1.0, density / efficiency)
    return row("linear", shape, torch.bfloat16, block_size, density, backend, seconds, products)


def test_goals_of_an_h100_are_checked_product_by_product():
    rows = [goal_row(128, 0.25, 0.9), goal_row(128, 0.125, 0.8), goal_row(32, 0.125, 0.13), goal_row(16, 0.125, 1)]
    rows.append(goal_row(64, 0.25, 0.9, backend="torch BSR"))  # a peer reaches none of our goals
    goals = kernel_goals(rows, "NVIDIA H100 80GB HBM3")
    assert [(g["goal"], g["reached"]) for g in goals] == [(0.85, True)] * 3 + [(0.85, False)] * 3 + [(1.0, True)]
    assert "not reached: -6%" in [line[-1] for line in goals_columns(goals)[1]]
    assert kernel_goals(rows, "NVIDIA A100") == []
    small = goal_row(64, 0.25, 0.71, tokens=2048, out_features=1024, in_features=1024)
    assert [(g["goal"], g["reached"]) for g in kernel_goals([small], None)] == [(0.7, True)]


def test_defaults_of_a_gpu_hold_the_shapes_of_the_goals():
    for config in (KernelsConfig(device="cuda"), quick_kernels("cuda")):
        assert {(8192, 4096, 4096), (8192, 2048, 2048)} <= set(config.shapes)
        assert "bfloat16" in config.dtypes
        assert {32, 64, 128} <= set(config.block_sizes)
        assert {0.125, 0.25} <= set(config.densities)
