"""Resuming by epochs with another number of ranks, so that epochs have other lengths, over real gloo groups."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from helpers import distributed_jobs as jobs
from helpers.models import TinyMLP, make_trainer
from lightning_estdgm import DGMCallback


class Save(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


class First(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.position = next(c for c in trainer.callbacks if isinstance(c, DGMCallback)).controller.position


def fit(ranks: int, path: Path, resume: bool) -> dict[str, Any]:
    pl.seed_everything(0, verbose=False)
    module, dgm, first = TinyMLP(), DGMCallback(), First()
    x = torch.randn(160, 16, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x, x[:, 0] * x[:, 1]), batch_size=8)
    extra = [] if resume else [Save(path)]
    settings = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
    trainer = make_trainer(dgm, first, *extra, max_epochs=5, **settings)
    trainer.fit(module, loader, ckpt_path=path if resume else None)
    return {
        "first": first.position,
        "last": dgm.controller.position,
        "steps": dgm.controller.steps,
        "density": dgm.density,
        "masks": dgm.masks(),
        "outside": sum(
            int(torch.count_nonzero(module.get_parameter(f"{name}.weight")[~mask]))
            for name, mask in dgm.masks().items()
        ),
    }


@pytest.mark.parametrize(("before", "after", "length", "steps"), [(2, 1, 50, 20 + 3 * 20), (1, 2, 100, 40 + 3 * 10)])
def test_a_run_goes_on_at_its_share(before: int, after: int, length: int, steps: int, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    jobs.run(fit, before, before, path, False)
    ends = jobs.run(fit, after, after, path, True)
    for end in ends:
        assert end["first"] == 2 * length // 5
        assert end["last"] == length
        assert end["steps"] == steps
        assert end["density"] == round(0.1 * 2 * 16 * 16) / (2 * 16 * 16)
        assert end["outside"] == 0
        assert all(torch.equal(mask, ends[0]["masks"][name]) for name, mask in end["masks"].items())
