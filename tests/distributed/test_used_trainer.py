"""A Trainer that has fitted once, and fits again from a checkpoint that FSDP2 loads later than other strategies do."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from helpers import distributed_jobs as jobs
from helpers.distributed_cases import differences
from helpers.models import ResumableLoader
from lightning_estdgm import DGMCallback, DGMConfig, EstDgm, Phase, Units

STEPS, SAVED = 20, 7
SCHEDULE = EstDgm(
    Phase(0.7, 0.6, 5), Phase(0.3, 0.3, 5), Phase(0.2, 0.1, 10), update_every=5, observe_steps=2, freeze=0.5
)


class Net(pl.LightningModule):
    def configure_model(self) -> None:
        if hasattr(self, "layers"):
            return
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
        fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]

    def training_step(self, x: Tensor, _: int) -> Tensor:
        return (self.layers(x) - x.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Save(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        path = self.folder / f"{trainer.global_step}.ckpt"
        if trainer.global_step in (SAVED, STEPS) and not path.exists():
            trainer.save_checkpoint(path)


def make(folder: Path) -> tuple[pl.Trainer, DGMCallback]:
    dgm = DGMCallback(DGMConfig(SCHEDULE, units=Units(size=1)))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"),
        max_steps=STEPS,
        max_epochs=1,
        use_distributed_sampler=False,
        callbacks=[dgm, Save(folder)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return trainer, dgm


def fits(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what each of several fits came to."""
    warnings.simplefilter("ignore")
    x = torch.randn(STEPS, 4, 16, generator=torch.Generator().manual_seed(1))

    def fit(trainer: pl.Trainer, dgm: DGMCallback, model: Net, checkpoint: Path | None = None) -> dict[str, Any]:
        trainer.fit(model, ResumableLoader(list(x)), ckpt_path=checkpoint)
        weights = {name: weight.full_tensor() for name, weight in model.state_dict().items()}
        return {"masks": dgm.masks(), "weights": weights, "density": dgm.density, "summary": dgm.run_summary()}

    model, used = Net(), make(folder)
    return {
        "straight": fit(*used, model),
        "nothing left": fit(*used, model),
        "again from step 7": fit(*used, model, folder / f"{SAVED}.ckpt"),
        "finished before": fit(*make(folder), Net(), folder / f"{STEPS}.ckpt"),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return jobs.run(fits, 2, tmp_path_factory.mktemp("used"))


@pytest.mark.parametrize("name", ["nothing left", "again from step 7", "finished before"])
def test_every_later_fit_comes_to_the_end_of_the_first(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    for rank in ranks:
        assert rank["straight"]["density"] == pytest.approx(0.1, rel=0.05)
        assert rank["straight"]["summary"]["ended_as_asked"]
        assert differences(rank["straight"], rank[name]) == []
