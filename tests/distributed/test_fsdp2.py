"""FSDP2 and HSDP with real Trainers over four gloo processes: as on one device, and resumed as if never stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn import functional as F

from helpers import distributed_jobs as jobs
from helpers.distributed_cases import (
    CHECKPOINTS,
    SETTINGS,
    SPOILED,
    all_runs,
    assert_as_on_one_device,
    assert_holds_its_part_only,
    assert_resumed_equals_straight,
    assert_same_masks,
    on_one_device,
)
from helpers.distributed_sharded import BLOCK_LAYERS, WEIGHT_LAYERS, train
from lightning_estdgm.config import DGMConfig, Units
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.modules._candidates import find_candidates
from lightning_estdgm.modules._swap import restore_dense_, sparsify_

RANKS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp2")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each rank of one job saw."""
    return jobs.run(all_runs, RANKS, "FSDP2", tuple(SETTINGS), folder)


@pytest.mark.parametrize("name", SETTINGS)
def test_masks_and_weights_are_those_of_one_device(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert_as_on_one_device(rank[name], name)


def test_the_layers_are_cut_as_awkwardly_as_they_should_be(ranks: list[dict[str, Any]]) -> None:
    local = {name: [rank["plain"]["local"][name] for rank in ranks] for name in (*BLOCK_LAYERS, *WEIGHT_LAYERS)}
    assert local["straddling"] == [36 * 128] * 4  # rows 36, 72 and 108 lie inside blocks of 16
    assert local["uneven"] == [4 * 144, 4 * 144, 4 * 144, 1 * 144]
    assert local["qkv"] == [10 * 13, 10 * 13, 10 * 13, 9 * 13]  # parts of 13 rows
    assert local["few_rows"][3] == local["conv"][3] == 0


def test_no_rank_holds_more_than_its_part(ranks: list[dict[str, Any]]) -> None:
    assert_holds_its_part_only(ranks)


@pytest.mark.parametrize("when", CHECKPOINTS)
def test_resumed_equals_straight(ranks: list[dict[str, Any]], when: str) -> None:
    for rank in ranks:
        assert_resumed_equals_straight(rank, when)


def test_sparse_operators_really_run(ranks: list[dict[str, Any]]) -> None:
    """The gathered weight of the forward feeds them: two layers, 19 steps, and weight gradients outside windows."""
    observed = 6
    for rank in ranks:
        for name, backend in (("plain", "reference"), ("cpu operators", "cpu")):
            run = rank[name]
            assert {n: b for n, b in run["backends"].items() if b != "dense"} == dict.fromkeys(BLOCK_LAYERS, backend)
            assert run["calls"]["grad_input"] == 19  # the first layer's input needs no gradient
            assert run["calls"]["linear"] == 38 + (19 if backend == "cpu" else 0)  # its grad_input calls it
            assert run["calls"]["grad_weight"] == 2 * (19 - observed)
        assert rank["cpu operators"]["counters"]["flops_executed_ratio"] < 0.7
        assert set(rank["single weights"]["backends"].values()) == {"dense"}
        assert "no sparse operator for single weights of a sharded weight" in rank["single weights"]["why"]["wide"]


def test_a_nan_that_one_rank_holds_drops_the_sample_on_all(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        spoiled, plain = (
            {step: set(samples) for step, _, _, samples in rank[name]["steps"]} for name in ("NaN on one rank", "plain")
        )
        for step in SPOILED:
            assert plain[step + 1] == {1}
            assert spoiled[step + 1] == {0}


def test_a_checkpoint_resumes_on_another_number_of_ranks(folder: Path, ranks: list[dict[str, Any]]) -> None:
    """Saved by four ranks inside an observation window, which is cut anew for two."""
    two = jobs.run(train, 2, "FSDP2", resume=folder / f"{CHECKPOINTS['inside a window']}.ckpt", seed=1)
    straight = ranks[0]["plain"]
    for rank in two:
        assert rank["local"] != straight["local"]
        assert_same_masks({**rank, "steps": straight["steps"][:4] + rank["steps"]}, straight)
        for key, weight in straight["weights"].items():
            torch.testing.assert_close(rank["weights"][key], weight, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("ranks")  # they save it
def test_the_window_of_the_checkpoint_matters(folder: Path) -> None:
    """A control: without what was observed before the stop, the masks come out different."""
    step = CHECKPOINTS["inside a window"]
    record = jobs.run(train, 2, "FSDP2", resume=folder / f"{step}.ckpt", forget_window=True)[0]
    expected = on_one_device("plain")
    assert any(not torch.equal(record["masks"][name], mask) for name, mask in expected["masks"].items())


def test_a_sharded_checkpoint_that_torch_joins_is_as_sparse_as_the_masks(
    folder: Path, ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    """lightning 2.6.6's own ``consolidate_checkpoint`` ends in a KeyError for checkpoints of ModelParallelStrategy."""
    step = CHECKPOINTS["mid-epoch"]
    dcp_to_torch_save(folder / f"{step}.ckpt", tmp_path / "whole.ckpt")
    weights = torch.load(tmp_path / "whole.ckpt", weights_only=True)["state_dict"]
    masks, decisions = ranks[0]["plain"]["masks at"][step], ranks[0]["plain"]["decisions"]
    single = {name: mask for name, mask in masks.items() if decisions[name][2] == 1}
    assert single
    for name, mask in single.items():
        assert not weights[f"{name}.weight"][~mask].any(), name
        assert weights[f"{name}.weight"][mask].any(), name


def test_checkpoints_in_one_file_resume_too(tmp_path: Path) -> None:
    """``ModelParallelStrategy(save_distributed_checkpoint=False)``."""
    for rank in jobs.run(all_runs, 2, "FSDP2, one file", ("plain",), tmp_path):
        assert (tmp_path / "7.ckpt").is_file()
        assert_resumed_equals_straight(rank, "inside a window")
        assert_resumed_equals_straight(rank, "mid-epoch")


def test_the_state_of_another_rank_than_the_first_is_refused_inside_a_window() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with DGMController(net, optimizer, DGMConfig(units=Units(size=1)), total_steps=30, audit=False) as dgm:
        state = dgm.state_dict()
        state["layers"]["0"]["window"] = {"gradient": None, "norm": None, "samples": 1}
        with pytest.raises(
            ValueError, match=r"layer '0': .* whole on rank 0 only: expected the state that rank 0 saved"
        ):
            dgm.load_state_dict(state)


def test_hybrid_sharding_sums_over_shards_and_not_over_replicas() -> None:
    ranks = jobs.run(all_runs, RANKS, "HSDP", ("plain",))
    for rank in ranks:
        assert_as_on_one_device(rank["plain"], "plain")
    assert ranks[0]["plain"]["local"] == ranks[2]["plain"]["local"]
    assert ranks[0]["plain"]["local"]["few_rows"] == 2 * 39


@pytest.mark.parametrize("strategy", ["FSDP2", "FSDP1"])
def test_a_single_rank_holds_everything(strategy: str) -> None:
    (rank,) = jobs.run(train, 1, strategy)
    assert_as_on_one_device(rank, "plain")


# --------------------------------------------------------------------------- the swap


def swapped_around_fully_shard(swap_first: bool, convolution: bool) -> dict[str, Any]:
    """Swap a layer before or after FSDP2 takes it, use it, and give it back."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 48, 3) if convolution else nn.Linear(32, 48), nn.Linear(48, 2))
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    whole = net[0].weight.detach().clone()
    full = mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
    x, full = (torch.randn(5, 32, 4, 4), full[:, :, None, None]) if convolution else (torch.randn(5, 32), full)
    forward = F.conv2d if convolution else F.linear
    plain = forward(x, whole * full, net[0].bias.detach().clone())
    dense = forward(x, whole, net[0].bias.detach().clone())
    if not swap_first:
        fully_shard(net[0])
    candidate = find_candidates(net)[0]
    assert candidate.has_operator
    sparsify_(candidate, mask, 16, "reference")
    if swap_first:
        fully_shard(net[0])
    y = net[0](x)
    y.sum().backward()
    found = {
        "sparse": torch.allclose(y, plain, atol=1e-6),
        "gradient": net[0].weight.grad.full_tensor(),
        "is FSDP": isinstance(net[0], FSDPModule),
        "keys": list(net.state_dict()),
    }
    restore_dense_(candidate)
    found["dense again"] = torch.equal(net[0](x), dense)
    found["class"] = [cls.__name__ for cls in type(net[0]).__mro__[:3]]
    found["left"] = [name for name in vars(net[0]) if "estdgm" in name]
    return found


@pytest.mark.parametrize("convolution", [False, True], ids=["linear", "convolution"])
@pytest.mark.parametrize("swap_first", [True, False])
def test_the_swap_survives_fully_shard_before_and_after(swap_first: bool, convolution: bool) -> None:
    for rank in jobs.run(swapped_around_fully_shard, 2, swap_first, convolution):
        gradient = rank.pop("gradient")
        blocks = gradient.unflatten(1, (2, 16)).unflatten(0, (3, 16)).abs()
        blocks = blocks.sum((1, 3, *range(4, blocks.dim())))
        assert (blocks > 0).tolist() == [[True, False], [False, True], [True, True]]
        assert rank == {
            "sparse": True,
            "is FSDP": True,
            "keys": ["0.weight", "0.bias", "1.weight", "1.bias"],
            "dense again": True,
            "class": ["FSDPConv2d", "FSDPModule", "Conv2d"] if convolution else ["FSDPLinear", "FSDPModule", "Linear"],
            "left": [],
        }
