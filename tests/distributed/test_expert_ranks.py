"""Stacked experts over several processes: the same masks under DDP, and sharded ones train as on one device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from helpers import distributed_jobs as jobs
from helpers.controller_runs import SCHEDULE, constant
from helpers.expert_models import ADAPTERS, BmmExperts, adapter
from lightning_estdgm.config import DGMConfig, Selection, Units
from lightning_estdgm.distributed import ActiveUnits, active_units_hook
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.modules._candidates import clean_name, find_candidates

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


def shard_by(strategy: str, model: nn.Module) -> nn.Module:
    """Spread a model over the ranks: its experts by themselves, and the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    if strategy == "FSDP1":
        model[1] = FullyShardedDataParallel(model[1], use_orig_params=True, device_id=torch.device("cpu"))
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (model[1], model):
        fully_shard(part, mesh=mesh)
    return model


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole weights, by names free of wrappers' parts."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if not isinstance(model, FullyShardedDataParallel):
        full = {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in model.named_parameters()}
        return {name: p.detach().clone() for name, p in full.items()}
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {clean_name(name): p.detach().clone() for name, p in model.named_parameters()}


def spread(strategy: str, size: int, inactive: str, name: str = "bmm") -> dict[str, object]:
    """What comes of a run over the ranks, each with its part of the batch; of one rank, without a strategy."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if strategy else (1, 0)
    torch.manual_seed(0)
    experts = ADAPTERS[name][0](experts=5, width=32, hidden=64)
    model: nn.Module = nn.Sequential(nn.Linear(32, 32), experts, nn.Linear(32, 32)).double()
    model = shard_by(strategy, model) if strategy else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    config = DGMConfig(
        SCHEDULE,
        units=Units(size=size),
        selection=Selection(exclude=["0"], experts=[adapter(name)]),
        inactive=inactive,  # type: ignore[arg-type]
        backend="cpu" if size > 1 else "auto",
    )
    with DGMController(
        model, optimizer, config, total_steps=40, group=dist.group.WORLD if strategy else None, audit=False
    ) as dgm:
        first = dgm.masks()
        data = torch.Generator().manual_seed(1)
        for _ in range(14):
            optimizer.zero_grad()
            batch = torch.randn(4, 10, 32, generator=data, dtype=torch.float64)
            mine = batch[rank::ranks] if strategy else batch
            (sum((model(x).reshape(10, 32) - x.sin()).square().mean() for x in mine) / len(mine)).backward()
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
        stacks = [c for c in dgm.candidates if c.kind.experts]
        return {
            "masks": dgm.masks(),
            "moved": sum(not torch.equal(first[name], mask) for name, mask in dgm.masks().items()),
            "backends": {d.name: d.backend for d in dgm.decisions() if d.masked},
            "weights": whole_weights(model),
            "held": {c.name: c.shard.local(c.weight).numel() for c in stacks},
            "shapes": {c.name: c.stored_shape for c in stacks},
        }


@pytest.mark.parametrize(("size", "inactive"), [(1, "zero"), (16, "zero"), (16, "frozen")])
@pytest.mark.parametrize("strategy", ["FSDP1", "FSDP2"])
def test_sharded_experts_train_as_on_one_device(strategy: str, size: int, inactive: str) -> None:
    alone = spread("", size, inactive)
    ranks = jobs.run(spread, 4, strategy, size, inactive)
    assert alone["moved"] == 2
    for rank in ranks:
        assert rank["backends"] == {"1.w1": "cpu" if size > 1 else "dense", "1.w2": "cpu" if size > 1 else "dense"}
        assert rank["shapes"] == {"1.w1": (5, 32, 64), "1.w2": (5, 64, 32)}
        for name, mask in alone["masks"].items():
            assert torch.equal(rank["masks"][name], mask), name
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight)
    held = [[rank["held"][name] for rank in ranks] for name in ("1.w1", "1.w2")]
    assert [sum(parts) for parts in held] == [5 * 32 * 64] * 2
    assert all(len(set(parts)) > 1 for parts in held)


def audited(strategy: str, name: str) -> tuple[dict[str, str], dict[str, int]]:
    """What the first step shows of sharded experts: how their module computes them, and their rows."""
    torch.manual_seed(0)
    model = shard_by(strategy, nn.Sequential(nn.Linear(32, 32), ADAPTERS[name][0](experts=5, width=32, hidden=64)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    config = DGMConfig(
        SCHEDULE, Units(size=16), selection=Selection(exclude=[is_linear], experts=[adapter(name)]), backend="cpu"
    )
    with DGMController(model, optimizer, config, total_steps=40, group=dist.group.WORLD) as dgm:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(10, 32)).square().mean().backward()
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
        assert {d.backend for d in dgm.decisions() if d.masked} == {"cpu"}
        return dgm._dispatch._forms, {n: rows for n, rows in dgm._dispatch.positions.items() if n.startswith("1.")}


def is_linear(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


@pytest.mark.parametrize("name", ["bmm", "sorted"])
@pytest.mark.parametrize("strategy", ["FSDP1", "FSDP2"])
def test_adapters_of_sharded_experts_are_compared_in_the_first_step(strategy: str, name: str) -> None:
    form = {"bmm": "batched", "sorted": "grouped"}[name]
    for forms, positions in jobs.run(audited, 2, strategy, name):
        assert list(forms.values()) == [form, form]
        assert {n: positions[n] for n in forms} == dict.fromkeys(forms, 10)


def cut() -> dict[str, str]:
    """Reasons of a model whose experts FSDP2 cuts along their rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    model = nn.Sequential(nn.Linear(16, 16), BmmExperts(), nn.Linear(16, 2))
    fully_shard(model[1], mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=lambda p: Shard(p.dim() - 1))
    return {c.name: c.why for c in find_candidates(model)}


def test_experts_that_are_cut_stay_dense_and_say_so() -> None:
    why = "its experts are cut in themselves: split the parameter along its first dimension"
    for reasons in jobs.run(cut, 2):
        assert reasons == {"0": "", "1.w1": why, "1.w2": why, "2": "output head"}


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
