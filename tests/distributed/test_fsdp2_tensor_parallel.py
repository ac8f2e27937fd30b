"""Tensor parallelism, alone and under FSDP2: masks as on one device; spread layers compute dense and say so."""

from typing import Any

import pytest
import torch
from torch import nn

from helpers import distributed_jobs as jobs
from helpers.distributed_cases import all_runs, assert_as_on_one_device
from helpers.distributed_sharded import BLOCK_LAYERS, TENSOR_PARALLEL
from lightning_estdgm.engine._controller import DGMController

RANKS = {"tensor parallel": 2, "FSDP2 and tensor parallel": 4}


@pytest.fixture(scope="module", params=TENSOR_PARALLEL)
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return jobs.run(all_runs, RANKS[request.param], request.param, ("single weights", "cpu operators"))


@pytest.mark.parametrize("name", ["single weights", "cpu operators"])
def test_masks_and_weights_are_those_of_one_device(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert_as_on_one_device(rank[name], name)


def test_spread_layers_compute_dense_and_say_why(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        run = rank["cpu operators"]
        assert all(run["backends"][name] == "dense" for name in BLOCK_LAYERS)
        assert run["calls"] == {}
        assert run["counters"]["flops_executed_ratio"] == 1.0
        for name in BLOCK_LAYERS:
            assert "its weight stays spread in the forward (tensor parallelism)" in run["why"][name]


def test_each_rank_holds_its_box(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["cpu operators"]["local"] == {
            "wide": 128 * 128 // len(ranks),
            "straddling": 144 * 128 // len(ranks),
        }


def uneven_twice() -> str:
    """Rows cut by both: 6 rows for 2 x 2 ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shards", "parallel"))
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    local = torch.zeros(2 if mesh.get_coordinate()[0] == 0 and mesh.get_coordinate()[1] == 0 else 1, 4)
    net[0].weight = nn.Parameter(
        DTensor.from_local(local, mesh, (Shard(0), Shard(0)), run_check=False, shape=torch.Size((6, 4)), stride=(4, 1))
    )
    try:
        DGMController(net, torch.optim.SGD(net.parameters(), 0.1), total_steps=30, audit=False)
    except ValueError as error:
        return str(error)
    return ""


def test_two_cuts_of_one_dimension_that_do_not_come_out_even_are_refused() -> None:
    for error in jobs.run(uneven_twice, 4):
        assert error.startswith("layer '0': the weight of a Linear of shape (6, 4) is split 4 ways along dimension 0")
        assert "expected a size divisible by 4, got 6" in error
