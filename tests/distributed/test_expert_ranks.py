"""Stacked experts over two processes: the same masks under DDP, and dense with the reason where they are sharded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from helpers import distributed_jobs as jobs
from helpers.controller_runs import constant
from helpers.expert_models import BmmExperts, adapter
from lightning_estdgm.config import DGMConfig, Selection, Units
from lightning_estdgm.distributed import ActiveUnits, active_units_hook
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.modules._candidates import find_candidates

STEPS = 12


def compressed(size: int, hook: bool) -> tuple[dict[str, Tensor], int, set[str]]:
    """Weights of a run under DDP, numbers of bytes that were handed to all-reduce, and what computed the experts."""
    torch.manual_seed(0)
    model = BmmExperts(width=32, hidden=64)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    data = torch.Generator().manual_seed(dist.get_rank())
    config = DGMConfig(
        constant(0.3),
        units=Units(size=size),
        selection=Selection(experts=[adapter("bmm")]),
        backend="cpu" if size > 1 else "auto",
    )
    with DGMController(wrapped, optimizer, config, total_steps=STEPS, group=dist.group.WORLD, audit=False) as dgm:
        units = ActiveUnits(dgm.masked_weights, lambda: dgm.observing)
        if hook:
            wrapped.register_comm_hook(units, active_units_hook)
        for _ in range(STEPS):
            optimizer.zero_grad()
            wrapped(torch.randn(8, 32, generator=data)).square().mean().backward()
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
        assert dgm.updates > 0
        backends = {d.backend for d in dgm.decisions()}
    return {name: p.detach() for name, p in model.named_parameters()}, units.bytes, backends


def trained() -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Masks, weights and number of updates of a run under DDP whose ranks see other data."""
    torch.manual_seed(0)
    model = BmmExperts()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), 1e-2)
    data = torch.Generator().manual_seed(dist.get_rank())
    config = DGMConfig(constant(0.3), units=Units(size=1))
    with DGMController(wrapped, optimizer, config, total_steps=STEPS, group=dist.group.WORLD, audit=False) as dgm:
        first = dgm.masks()
        for _ in range(STEPS):
            optimizer.zero_grad()
            wrapped(torch.randn(8, 16, generator=data)).square().mean().backward()
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
        moved = sum(not torch.equal(first[name], mask) for name, mask in dgm.masks().items())
        return dgm.masks(), {name: p.detach() for name, p in model.named_parameters()}, moved


def sharded() -> dict[str, tuple[bool, str]]:
    """Verdicts on a model whose experts FSDP2 spreads over the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(16, 16), BmmExperts(), nn.Linear(16, 2))
    fully_shard(model[1], mesh=init_device_mesh("cpu", (2,)))
    return {c.name: (c.masked, c.why) for c in find_candidates(model)}


@pytest.mark.parametrize("size", [1, 16])
def test_gradients_of_active_units_are_all_that_experts_have_to_send(size: int) -> None:
    plain = jobs.run(compressed, 2, size, False)
    packed = jobs.run(compressed, 2, size, True)
    for (weights, _, _), (others, sent, backends) in zip(plain, packed, strict=True):
        assert backends == {"cpu" if size > 1 else "dense"}
        for name, weight in weights.items():
            assert torch.equal(weight, others[name]), name
        whole = 4 * sum(weight.numel() for weight in weights.values()) * STEPS
        assert 0 < sent < 0.8 * whole  # whole ones while gradients are observed


def test_ranks_come_to_the_same_masks_of_experts() -> None:
    (masks, weights, moved), (others, other_weights, _) = jobs.run(trained, 2)
    assert set(masks) == {"module.w1", "module.w2"}
    assert moved == 2
    assert all(torch.equal(mask, others[name]) for name, mask in masks.items())
    assert all(torch.equal(weight, other_weights[name]) for name, weight in weights.items())


def test_sharded_experts_stay_dense_and_say_so() -> None:
    why = "stacked experts are not masked where they are sharded over ranks: use DDP"
    for verdicts in jobs.run(sharded, 2):
        assert verdicts == {"0": (True, ""), "1.w1": (False, why), "1.w2": (False, why), "2": (False, "output head")}
