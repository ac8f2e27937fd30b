"""``storage="packed"`` under DDP on two ranks: the numbers of dense storage, buckets that follow, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from helpers import distributed_jobs as jobs
from helpers.models import MLP, SCHEDULE, make_trainer
from lightning_estdgm import DGMCallback, DGMConfig, DGMController, Units
from lightning_estdgm.method._update_rule import UpdateRule

STEPS = 20
ROUNDING = 1e-12
WRAPPERS = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "many buckets": {"bucket_cap_mb": 0.001},
}


def config(storage: str, grow: str = "consistency") -> DGMConfig:
    rule, backend = UpdateRule(grow=grow), "auto" if storage == "packed" else "dense"
    return DGMConfig(SCHEDULE, units=Units(size=4), update_rule=rule, storage=storage, backend=backend)


def loop(storage: str, grow: str, accumulate: int, wrapper: dict[str, Any]) -> dict[str, Any]:
    """Train by a plain loop; each rank has other initial weights, and batches of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 4)).double()
    wrapped = DistributedDataParallel(model, **wrapper)
    optimizer = torch.optim.AdamW(wrapped.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(dist.get_rank())
    sizes = []
    with DGMController(
        wrapped, optimizer, config(storage, grow), total_steps=STEPS, audit=False, group=dist.group.WORLD
    ) as dgm:
        for _ in range(STEPS):
            optimizer.zero_grad()
            for _ in range(accumulate):
                x = torch.randn(8, 32, generator=generator, dtype=torch.float64)
                F.mse_loss(wrapped(x), x[:, :4].sin()).backward()
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
            sizes.append(sum(p.numel() for p in wrapped.parameters()))
        return {"weights": model.state_dict(), "masks": dgm.masks(), "sizes": sizes, "state": optimizer.state_dict()}


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    pairs = [(one["weights"][name], other["weights"][name]) for name in one["weights"]]
    states = one["state"]["state"], other["state"]["state"]
    pairs += [
        (torch.as_tensor(x), torch.as_tensor(states[1][i][k])) for i in states[0] for k, x in states[0][i].items()
    ]
    return max((a - b).abs().max().item() for a, b in pairs)


def by_grad() -> str:
    """Train with gradients that are averaged over the ranks by hand; return what ended it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 4)).double()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    parameters = list(model.parameters())
    with DGMController(
        model, optimizer, config("packed"), total_steps=STEPS, audit=False, group=dist.group.WORLD
    ) as dgm:
        for _ in range(STEPS):
            loss = model(torch.randn(8, 32, dtype=torch.float64)).square().mean()
            for parameter, slope in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                dist.all_reduce(slope)
                parameter.grad = slope / 2
            dgm.mask_gradients()
            optimizer.step()
            try:
                dgm.advance()
            except ValueError as error:
                return str(error)
    return ""


def test_gradients_that_no_backward_adds_end_the_run_on_every_rank() -> None:
    for said in jobs.run(by_grad, 2):
        assert "has not observed the gradients of 2 layers (0, 2)" in said


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_ranks_train_as_with_dense_storage(wrapper: dict[str, Any]) -> None:
    dense, packed = (jobs.run(loop, 2, storage, "consistency", 1, wrapper) for storage in ("dense", "packed"))
    for rank in (0, 1):
        assert largest_difference(dense[rank], packed[rank]) < ROUNDING
        assert all(torch.equal(dense[rank]["masks"][n], packed[rank]["masks"][n]) for n in dense[rank]["masks"])
    assert largest_difference(packed[0], packed[1]) == 0.0
    assert packed[0]["sizes"][-1] < 0.3 * packed[0]["sizes"][0]
    assert dense[0]["sizes"][-1] == dense[0]["sizes"][0]


@pytest.mark.parametrize(("grow", "accumulate"), [("random", 1), ("gradient", 2)])
def test_other_rules_and_micro_batches(grow: str, accumulate: int) -> None:
    dense, packed = (jobs.run(loop, 2, storage, grow, accumulate, {}) for storage in ("dense", "packed"))
    assert largest_difference(dense[0], packed[0]) < ROUNDING
    assert largest_difference(packed[0], packed[1]) == 0.0


class Save(pl.Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(folder: Path | None, ckpt: Path | None, strategy: Any) -> dict[str, Any]:
    torch.set_num_threads(1)
    pl.seed_everything(0 if ckpt is None else 1, verbose=False)
    module, callback = MLP(32), DGMCallback(config("packed"))
    extra = [] if folder is None else [Save(folder / "at.ckpt", 10)]
    trainer = make_trainer(callback, *extra, devices=2, strategy=strategy, max_steps=STEPS)
    trainer.fit(module, MLP.batches(STEPS, 32), ckpt_path=ckpt)
    shapes = [tuple(p.shape) for p in module.parameters()]
    return {"weights": module.state_dict(), "masks": callback.masks(), "shapes": shapes, "density": callback.density}


def test_a_fit_of_two_ranks(tmp_path: Path) -> None:
    ranks = jobs.run(fit, 2, tmp_path, None, "ddp")
    assert ranks[0]["density"] == pytest.approx(0.1, abs=0.02)
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][name])
    for index, name in ((0, "net.0"), (2, "net.2")):
        assert ranks[0]["shapes"][index] == (int(ranks[0]["masks"][name].sum()), 4, 4)
    saved = torch.load(tmp_path / "at.ckpt", weights_only=True)
    assert saved["state_dict"]["net.0.weight"].shape == (32, 32)
    again = jobs.run(fit, 2, None, tmp_path / "at.ckpt", "ddp")
    assert torch.equal(again[0]["weights"]["net.0.weight"], again[1]["weights"]["net.0.weight"])
    assert again[0]["density"] == pytest.approx(0.1, abs=0.02)


def test_a_static_graph_is_refused_by_name() -> None:
    with pytest.raises(jobs.JobError, match="static_graph=True does not take: leave it out, or use storage='dense'"):
        jobs.run(loop, 2, "packed", "random", 1, {"static_graph": True})


def hook(state: Any, bucket: Any) -> Any:
    raise AssertionError("never called")


def test_a_hook_on_ddp_is_refused_by_name() -> None:
    trainer = make_trainer(strategy=DDPStrategy(ddp_comm_hook=hook))
    with pytest.raises(ValueError, match="ddp_comm_hook: leave the hook out, or use storage='dense'"):
        DGMCallback(config("packed")).setup(trainer, MLP(32), "fit")
