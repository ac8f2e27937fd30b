"""FSDP1 with real Trainers over gloo processes: as on one device, and resumed as if never stopped."""

from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from helpers import distributed_jobs as jobs
from helpers.distributed_cases import (
    CHECKPOINTS,
    SPOILED,
    all_runs,
    assert_as_on_one_device,
    assert_holds_its_part_only,
    assert_resumed_equals_straight,
)
from helpers.distributed_sharded import BLOCK_LAYERS, CPUFSDPStrategy
from lightning_estdgm.config import DGMConfig, Units
from lightning_estdgm.distributed.adapters._protocol import adapter_for
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.method._schedules import EstDgm

RANKS = 4
NAMES = ("plain", "cpu operators", "accumulation", "NaN on one rank")
NEEDED = "use_orig_params=False: leave FSDPStrategy's default, or set use_orig_params=True"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of one job saw: the whole model is one flat parameter, so most ranks hold nothing of a layer."""
    return jobs.run(all_runs, RANKS, "FSDP1", NAMES, tmp_path_factory.mktemp("fsdp1"))


@pytest.mark.parametrize("name", NAMES)
def test_masks_and_weights_are_those_of_one_device(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert_as_on_one_device(rank[name], name)


def test_ranks_hold_stretches_that_begin_anywhere_and_often_nothing(ranks: list[dict[str, Any]]) -> None:
    local = {name: [rank["plain"]["local"][name] for rank in ranks] for name in (*BLOCK_LAYERS, "uneven", "qkv")}
    assert 0 < local["wide"][1] < 128 * 128
    assert local["wide"][0] % 128 != 0  # cut inside a row
    assert local["wide"][2:] == [0, 0]
    assert local["uneven"] == [0, 0, 0, 13 * 144]
    assert sum(local["qkv"]) == 39 * 13
    assert_holds_its_part_only(ranks)


@pytest.mark.parametrize("when", CHECKPOINTS)
def test_resumed_equals_straight(ranks: list[dict[str, Any]], when: str) -> None:
    for rank in ranks:
        assert_resumed_equals_straight(rank, when)


def test_sparse_operators_really_run(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        run = rank["cpu operators"]
        assert {n: b for n, b in run["backends"].items() if b != "dense"} == dict.fromkeys(BLOCK_LAYERS, "cpu")
        assert run["calls"] == {"linear": 57, "grad_input": 19, "grad_weight": 26}  # the first step is dense


def test_a_nan_that_one_rank_holds_drops_the_sample_on_all(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name, samples in (("NaN on one rank", 0), ("plain", 1)):
            seen = {step: set(counts) for step, _, _, counts in rank[name]["steps"]}
            assert [seen[step + 1] for step in SPOILED] == [{samples}] * 2


@pytest.mark.parametrize("strategy", ["FSDP1, layer by layer", "FSDP1, hybrid"])
def test_other_ways_to_wrap(strategy: str) -> None:
    ranks = jobs.run(all_runs, RANKS, strategy, ("plain",))
    for rank in ranks:
        assert_as_on_one_device(rank["plain"], "plain")
    local = [rank["plain"]["local"] for rank in ranks]
    assert sum(x["wide"] for x in local) == 128 * 128 * (2 if "hybrid" in strategy else 1)
    assert (local[1] == local[3]) == ("hybrid" in strategy)


# --------------------------------------------------------------------------- plain loops


def train_five_numbers(use_orig_params: bool) -> dict[str, Any]:
    """Five parameters over four ranks: the last one holds none of them."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Tanh(), nn.Linear(2, 1))
    model: Any = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = DGMConfig(EstDgm(update_every=3, observe_steps=1), units=Units(size=1), backend="dense")
    try:
        dgm = DGMController(model, optimizer, config, total_steps=12, audit=False)
    except ValueError as error:
        return {"error": str(error)}
    with dgm:
        for step in range(6):
            optimizer.zero_grad()
            if step != 2:  # a step without a backward is none, on no rank
                model(torch.ones(4, 1)).square().mean().backward()
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
        held = sum(p.numel() for p in model.parameters())
        return {"steps": dgm.steps, "updates": dgm.updates, "held": held, "masks": dgm.masks(), "density": dgm.density}


def test_a_rank_that_holds_nothing_at_all_counts_steps_with_the_others() -> None:
    ranks = jobs.run(train_five_numbers, RANKS, True)
    assert [rank["held"] for rank in ranks] == [2, 2, 1, 0]
    for rank in ranks:
        assert (rank["steps"], rank["updates"]) == (5, ranks[0]["updates"])
        assert torch.equal(rank["masks"]["0"], ranks[0]["masks"]["0"])
        assert rank["density"] == 0.5
    assert ranks[0]["updates"] >= 1


def test_weights_that_are_no_parameters_are_refused() -> None:
    for rank in jobs.run(train_five_numbers, 2, False):
        assert rank["error"].startswith("layer '0': FSDP keeps a layer's weight as a parameter only with")
        assert NEEDED in rank["error"]


def test_the_setting_is_refused_before_the_model_is_wrapped() -> None:
    for strategy in (FSDPStrategy(use_orig_params=False), CPUFSDPStrategy(use_orig_params=False)):
        adapter = adapter_for(strategy)
        assert adapter.name == "fsdp1"
        with pytest.raises(ValueError, match=NEEDED):
            adapter.check(strategy)
    adapter_for(FSDPStrategy()).check(FSDPStrategy())
