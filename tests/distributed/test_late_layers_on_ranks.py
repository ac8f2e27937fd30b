"""Layers that begin to train in mid-run are taken in on all ranks alike, if they are the same on all of them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from helpers import distributed_jobs as jobs
from helpers.runs import differences
from lightning_estdgm import DGMCallback, DGMConfig, DGMController, EstDgm, Phase, Units

SCHEDULE = EstDgm(
    Phase(0.7, 0.6, 15), Phase(0.3, 0.3, 15), Phase(0.2, 0.1, 30), update_every=5, observe_steps=2, freeze=0.5
)
STEPS, LATE = 60, 23
CONFIG = DGMConfig(SCHEDULE, units=Units(size=1), backend="dense")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.branch = nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 16)
        self.frozen, self.head = nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor, use_branch: bool) -> torch.Tensor:
        h = self.frozen(self.body(x))
        return self.head(h + self.branch(h).relu() if use_branch else h)


def train(frozen: str) -> dict[str, Any]:
    """Train with a layer that is frozen ``"before"`` or ``"after"`` DDP is made, and thaws at step 23."""
    rank = dist.get_rank()
    net = Net()
    net.frozen.requires_grad_(frozen != "before")
    ddp = DistributedDataParallel(net, find_unused_parameters=True)
    net.frozen.requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(rank))
    with DGMController(ddp, optimizer, CONFIG, total_steps=STEPS, group=dist.group.WORLD) as dgm:
        for step in range(STEPS):
            net.frozen.requires_grad_(step >= LATE)
            optimizer.zero_grad()
            ddp(x, step >= LATE and (rank == 1 or step >= LATE + 1)).square().mean().backward()
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
        return {
            "masks": {name.removeprefix("module."): mask for name, mask in dgm.masks().items()},
            "weights": net.state_dict(),
            "density": (dgm.density, dgm.final_density),
            "late": dgm.late_layers(),
            "why": {d.name.removeprefix("module."): d.why for d in dgm.decisions()},
        }


def test_ranks_take_in_the_same_late_layers() -> None:
    first, second = jobs.run(train, 2, "after")
    assert differences(first, second) == []
    assert first["masks"].keys() == {"body.0", "branch", "frozen"}
    assert first["density"][0] == first["density"][1]
    assert first["late"] == []
    assert all("as it began to train" in first["why"][name] for name in ("branch", "frozen"))
    for name, mask in first["masks"].items():
        assert not first["weights"][f"{name}.weight"][~mask].count_nonzero()


def test_what_ddp_does_not_average_stays_dense_with_the_reason() -> None:
    first, second = jobs.run(train, 2, "before")
    assert not torch.equal(first["weights"]["frozen.weight"], second["weights"]["frozen.weight"]), "torch's own"
    assert differences(first["masks"], second["masks"]) == []
    assert first["masks"].keys() == {"body.0", "branch"}
    assert first["density"][0] == first["density"][1]
    assert first["late"] == second["late"] == ["module.frozen"]
    assert "its weights differ between ranks: DDP was made while it was frozen" in first["why"]["frozen"]


def train_sharded() -> tuple[list[str], str, str]:
    """Return the names of late layers, and a frozen layer's reason before and after it thaws."""
    net = Net()
    net.frozen.requires_grad_(False)
    for layer in (net.body, net.frozen, net):
        fully_shard(layer)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(dist.get_rank()))
    with DGMController(net, optimizer, CONFIG, total_steps=STEPS, group=dist.group.WORLD) as dgm:
        whys = []
        for step in range(STEPS):
            net.frozen.requires_grad_(step >= LATE)
            if step in (LATE, STEPS - 1):
                whys.append(next(d.why for d in dgm.decisions() if d.name == "frozen"))
            optimizer.zero_grad()
            net(x, True).square().mean().backward()
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
        return dgm.late_layers(), *whys


def test_what_is_sharded_stays_dense_with_the_reason() -> None:
    for late, before, after in jobs.run(train_sharded, 2):
        assert late == ["frozen"]
        assert before == after
        assert "took no gradient when the run began, and sharded weights are not taken in later" in after


def train_frozen() -> str:
    """Return the error of a run whose every layer is frozen and sharded."""
    net = Net().requires_grad_(False)
    norm = nn.LayerNorm(16)
    model = nn.Sequential(net, norm)
    fully_shard(model)
    optimizer = torch.optim.Adam(norm.parameters(), 1e-2)
    with pytest.raises(ValueError, match="no layer to mask") as error:
        DGMController(model, optimizer, CONFIG, total_steps=STEPS, group=dist.group.WORLD)
    return str(error.value)


def test_frozen_and_sharded_layers_alone_are_refused() -> None:
    for error in jobs.run(train_frozen, 2):
        assert "'0.frozen': 'its weight took no gradient" in error
        assert "sharded weights are not taken in later: thaw it before the fit" in error


def wrap(net: nn.Module, how: str) -> nn.Module:
    if how == "FSDP2":
        return fully_shard(net, reshard_after_forward=False)
    settings = {"sharding_strategy": ShardingStrategy[how], "device_id": torch.device("cpu")}
    return FullyShardedDataParallel(net, use_orig_params=True, **settings)


def look_for_replaced(how: str) -> dict[str, list[str]]:
    """Return the names of replaced layers before and after forwards and steps, and after one was replaced."""
    net = Net()
    model = wrap(net, how)
    x, optimizer = torch.randn(4, 16), torch.optim.Adam(model.parameters(), 1e-2)
    found = {}
    with DGMController(model, optimizer, CONFIG, total_steps=STEPS, group=dist.group.WORLD) as dgm:
        for step in range(2):
            with torch.no_grad():
                model(x, True)  # which leaves weights gathered
            found[f"gathered, {step}"] = dgm.note_unmasked_layers()
            model(x, True).square().mean().backward()
            found[f"backward, {step}"] = dgm.note_unmasked_layers()
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
            found[f"stepped, {step}"] = dgm.note_unmasked_layers()
        net.branch = nn.Linear(16, 16)
        return found | {"replaced": dgm.note_unmasked_layers()}


@pytest.mark.parametrize("how", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "FSDP2"])
def test_gathered_weights_are_not_taken_for_others(how: str) -> None:
    for found in jobs.run(look_for_replaced, 2, how):
        assert found.pop("replaced") == ["branch"]
        assert set(map(tuple, found.values())) == {()}


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.middle, self.head = nn.Linear(32, 32), nn.Linear(32, 1)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        (x,) = batch
        return (self.head(self.middle(self.backbone(x)).relu()) - x.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-2)


class AfterDDP(BackboneFinetuning):
    """Freezes once DDP is made, which so averages what is thawed."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None: ...

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.freeze_before_training(pl_module)
        trainer.strategy.setup_optimizers(trainer)  # without the frozen ones
        super().on_fit_start(trainer, pl_module)


def fit(kind: type[BackboneFinetuning]) -> dict[str, Any]:
    x = torch.randn(120, 16, generator=torch.Generator().manual_seed(1))
    model, dgm = Module(), DGMCallback(CONFIG)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=True),
        max_epochs=4,
        callbacks=[kind(unfreeze_backbone_at_epoch=1), dgm],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(x), batch_size=4))
    assert trainer.global_step == STEPS
    return {
        "masks": dgm.masks(),
        "weights": {name: weight.clone() for name, weight in model.state_dict().items()},
        "density": (dgm.density, dgm.controller.final_density if dgm.controller else 0.0),
        "why": {d.name: d.why for d in dgm.decisions()},
        "thawed": dgm.run_summary()["thawed_and_dense"],
    }


@pytest.mark.filterwarnings("ignore")
def test_a_finetuned_backbone_is_taken_in_where_ranks_train_it_together() -> None:
    first, second = jobs.run(fit, 2, AfterDDP)
    assert differences(first, second) == []
    assert first["masks"].keys() == {"backbone.0", "backbone.2", "middle"}
    assert first["density"][0] == first["density"][1]
    assert first["thawed"] == []
    for name, mask in first["masks"].items():
        assert not first["weights"][f"{name}.weight"][~mask].count_nonzero()


def test_a_finetuned_backbone_that_lightning_trains_apart_is_named() -> None:
    first, second = jobs.run(fit, 2, BackboneFinetuning)
    assert not torch.equal(first["weights"]["backbone.0.weight"], second["weights"]["backbone.0.weight"]), "lightning's"
    assert first["masks"].keys() == second["masks"].keys() == {"middle"}
    assert first["thawed"] == ["backbone.0", "backbone.2"]
    assert "its weights differ between ranks: DDP was made while it was frozen" in first["why"]["backbone.0"]
