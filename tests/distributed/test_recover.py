"""Masks recovered from weights that lie over two ranks: those of the whole weights, the same on every rank."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from helpers import distributed_jobs as jobs
from helpers.models import MLP, SCHEDULE, TinyMLP, make_trainer
from lightning_estdgm import DGMCallback, DGMConfig
from lightning_estdgm.method._update_rule import UpdateRule

STEP = 8


class ShardedMLP(MLP):
    def configure_model(self) -> None:
        shard(self)


class ShardedTinyMLP(TinyMLP):
    def configure_model(self) -> None:
        shard(self)


def shard(module: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = module.device_mesh["data_parallel"]
    if not hasattr(module.net[0].weight, "to_local"):
        for layer in module.net[::2]:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)


KINDS: dict[str, tuple[Any, Any]] = {
    "DDP, single weights": (TinyMLP, lambda: "ddp"),
    "FSDP2, single weights": (ShardedTinyMLP, lambda: ModelParallelStrategy(save_distributed_checkpoint=False)),
    "FSDP2, blocks": (ShardedMLP, lambda: ModelParallelStrategy(save_distributed_checkpoint=False)),
}


ORIGINS = ("dense", "masked")


class Save(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == STEP:
            trainer.save_checkpoint(self.path)
        if trainer.global_step == STEP + 1:
            trainer.save_checkpoint(later(self.path))


def later(path: Path) -> Path:
    return path.with_suffix(".later")


class Look(pl.Callback):
    """Looks at the start, where zeros show the masks, or after the first step, which is dense where there are none."""

    def __init__(self, origin: str) -> None:
        self.origin = origin

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.origin == "masked":
            self.look(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if self.origin == "dense" and trainer.global_step == STEP + 1:
            self.look(trainer, pl_module)

    def look(self, trainer: pl.Trainer, pl_module: Any) -> None:
        dgm = trainer.callbacks[0]  # type: ignore[attr-defined]
        (optimizer,) = trainer.optimizers
        self.seen = {
            "masks": dgm.masks(),
            "steps": (dgm.controller.steps, dgm.controller.position),
            "recovered": dgm.controller.recovered,
            "moments": {n: whole(optimizer.state[p]["exp_avg"]) for n, p in pl_module.named_parameters()},
            "weights": {n: whole(p) for n, p in pl_module.named_parameters()},
        }


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def fit(kind: str, *callbacks: pl.Callback, ckpt: Path | None = None) -> list[str]:
    """Train on two ranks, and return what was warned of."""
    cls, strategy = KINDS[kind]
    pl.seed_everything(0, verbose=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer = make_trainer(*callbacks, max_steps=20, max_epochs=-1, devices=2, strategy=strategy())
        trainer.fit(cls(), cls.batches(20), ckpt_path=ckpt)
    return [str(warning.message) for warning in told]


CONFIG = DGMConfig(SCHEDULE, update_rule=UpdateRule(keep="magnitude"), backend="dense")


def recover(kind: str, origin: str, path: Path) -> dict[str, Any]:
    dgm = [DGMCallback(CONFIG)]
    fit(kind, *(dgm if origin == "masked" else []), Save(path))
    if torch.distributed.get_rank() == 0:
        checkpoint = torch.load(path, weights_only=True)
        assert ("DGMCallback" in checkpoint["callbacks"]) == (origin == "masked")
        checkpoint["callbacks"].pop("DGMCallback", None)
        torch.save(checkpoint, path)
    torch.distributed.barrier()
    dgm, look = [DGMCallback(CONFIG)], Look(origin)
    told = fit(kind, *dgm, look, ckpt=path)
    return look.seen | {
        "told": sum("holds no state of DGMCallback" in message for message in told),
        "density": (dgm[0].density, dgm[0].schedule(19).density),
    }


def recover_all(folder: Path) -> dict[str, Any]:
    return {
        f"{kind}, {origin}": recover(kind, origin, folder / f"{kind}-{origin}.ckpt")
        for kind in KINDS
        for origin in ORIGINS
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recover")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return jobs.run(recover_all, 2, folder)


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("kind", KINDS)
def test_recovered_masks_are_the_largest_units_of_the_whole_weights(
    ranks: list[dict[str, Any]], folder: Path, kind: str, origin: str
) -> None:
    path = folder / f"{kind}-{origin}.ckpt"
    saved = torch.load(path if origin == "masked" else later(path), weights_only=True)["state_dict"]
    for rank, job in enumerate(ranks):
        found = job[f"{kind}, {origin}"]
        assert found["steps"] == ((STEP, STEP) if origin == "masked" else (STEP + 1, STEP + 1))
        assert found["told"] == (rank == 0)
        assert ("as many zeros" if origin == "masked" else "no layer holds zeros") in found["recovered"]
        assert found["masks"].keys() == {"net.0", "net.2"}
        for name, mask in found["masks"].items():
            weight = saved[f"{name}.weight"]
            block = weight.shape[0] // mask.shape[0]
            assert block == (1 if "single" in kind else 16)
            norms = weight.unflatten(1, (-1, block)).unflatten(0, (-1, block)).square().sum((1, 3))
            near = 0.0 if origin == "masked" else 0.02 * block  # after another batch's step: the loader begins anew
            assert norms[mask].min() > norms[~mask].max() - near
            kept = mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
            assert torch.count_nonzero(found["weights"][f"{name}.weight"][~kept]) == 0
            torch.testing.assert_close(found["weights"][f"{name}.weight"], weight.where(kept, 0.0), rtol=0, atol=near)
            moment = found["moments"][f"{name}.weight"]
            assert torch.count_nonzero(moment[~kept]) == 0
            assert torch.count_nonzero(moment[kept]) > 0.5 * kept.sum()
        sizes = [(mask.sum() / mask.numel()).item() for mask in found["masks"].values()]
        assert sum(sizes) / 2 == pytest.approx(0.3, abs=0.01)
        assert found["density"][0] == pytest.approx(found["density"][1], abs=0.01)
