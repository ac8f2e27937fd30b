"""Epochs that are longer or shorter than the Trainer says at the start: the schedule ends with the run all the same."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from helpers.models import NO_VALIDATION_LOADER, ResumableLoader, TinyMLP, assert_final, make_trainer
from helpers.runs import SaveAt, differences, end_of
from lightning_estdgm import DGMCallback, DGMConfig, Units

pytestmark = [
    pytest.mark.filterwarnings(NO_VALIDATION_LOADER),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before"),
]


class Changing(pl.LightningDataModule):
    """A loader that has another number of batches in each epoch."""

    def __init__(self, batches: Callable[[int], int]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        return ResumableLoader(TinyMLP.batches(self.batches(self.trainer.current_epoch)))


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Data without a length."""

    def __init__(self, batches: int) -> None:
        self.loader = TinyMLP.batches(batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.loader)


class Last(pl.Callback):
    """Positions after each batch."""

    def __init__(self, dgm: DGMCallback) -> None:
        self.dgm = dgm
        self.positions: list[int] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.positions.append(self.dgm.controller.position)  # type: ignore[union-attr]


def fit(
    data: Any, *extra: pl.Callback, ckpt: Path | None = None, total_steps: int | None = None, **trainer: Any
) -> tuple[TinyMLP, DGMCallback, pl.Trainer, list[int]]:
    pl.seed_everything(0, verbose=False)
    module, dgm = TinyMLP(), DGMCallback(total_steps=total_steps)
    last = Last(dgm)
    made = make_trainer(dgm, last, *extra, **{"max_steps": -1} | trainer)
    made.fit(module, data, ckpt_path=ckpt)
    return module, dgm, made, last.positions


def assert_ends_with_the_run(dgm: DGMCallback, positions: list[int]) -> None:
    total = dgm.schedule.total_steps
    assert positions[-1] == total
    assert positions[-2] < total  # and not before
    assert dgm.run_summary()["ended_as_asked"]


LENGTHS: dict[str, Callable[[int], int]] = {
    "shorter": lambda epoch: 16 if epoch < 2 else 8,
    "longer": lambda epoch: 8 if epoch < 2 else 24,
    "every epoch": lambda epoch: 8 + epoch,
}


@pytest.mark.parametrize("name", LENGTHS)
def test_loaders_whose_length_changes(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        module, dgm, _, positions = fit(Changing(LENGTHS[name]), max_epochs=8, reload_dataloaders_every_n_epochs=1)
    assert len(positions) == sum(map(LENGTHS[name], range(8)))
    assert_ends_with_the_run(dgm, positions)
    assert_final(module, dgm)
    said = [r.message for r in caplog.records if "were expected" in r.message]
    assert len(said) == (7 if name == "every epoch" else 1)
    assert said[0].startswith(f"DGMCallback: an epoch has {LENGTHS[name](1 if len(said) > 1 else 2)} batches now, and")


@pytest.mark.parametrize("name", LENGTHS)
def test_they_are_resumed_exactly_in_mid_epoch(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_epochs": 8, "reload_dataloaders_every_n_epochs": 1}
    straight = end_of(
        *fit(Changing(LENGTHS[name]), SaveAt("on_train_batch_end", 37, tmp_path / "a.ckpt"), **settings)[:3]
    )
    resumed = end_of(*fit(Changing(LENGTHS[name]), ckpt=tmp_path / "a.ckpt", **settings)[:3])
    assert not differences(straight, resumed)


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("limits", [{"max_epochs": 9}, {"max_epochs": 9, "max_steps": 800}])
def test_data_that_ends_before_the_limit_of_batches(limits: dict[str, int], together: int) -> None:
    loader: Any = DataLoader(Stream(16), batch_size=None)
    module, dgm, _, positions = fit(loader, limit_train_batches=100, accumulate_grad_batches=together, **limits)
    assert positions[-1] == dgm.schedule.total_steps
    assert_final(module, dgm)


@pytest.mark.parametrize("together", [1, 3])
def test_a_loader_without_a_length_that_max_epochs_ends_before_max_steps(
    together: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader: Any = DataLoader(Stream(16), batch_size=None)
    settings: dict[str, Any] = {"max_epochs": 4, "max_steps": 200, "accumulate_grad_batches": together}
    save = SaveAt("on_train_epoch_end", 2 * math.ceil(16 / together), tmp_path / "saved.ckpt")
    with caplog.at_level(logging.INFO):
        module, dgm, _, positions = fit(loader, save, **settings)
    assert positions[-1] == dgm.schedule.total_steps == 200
    assert_final(module, dgm)
    assert "an epoch has 16 batches now, and their number was not known" in caplog.text
    _, dgm, _, positions = fit(loader, ckpt=tmp_path / "saved.ckpt", **settings)
    assert positions[-1] == 200


def test_a_length_that_the_user_gave_stands() -> None:
    settings: dict[str, Any] = {"max_epochs": 8, "reload_dataloaders_every_n_epochs": 1}
    _, dgm, _, positions = fit(Changing(LENGTHS["shorter"]), total_steps=70, **settings)
    assert dgm.schedule.total_steps == 70
    assert positions == list(range(1, 81))


def test_accumulation_that_the_users_code_changes() -> None:
    class Accumulates(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            trainer.accumulate_grad_batches = 1 if trainer.current_epoch < 2 else 4

    dgm = DGMCallback(DGMConfig(units=Units(size=1), backend="dense"))
    trainer = make_trainer(Accumulates(), dgm, max_epochs=6)
    trainer.fit(TinyMLP(), TinyMLP.batches(16))
    assert dgm.controller is not None
    assert (trainer.global_step, dgm.controller.steps) == (48, 48)
    assert dgm.controller.position == dgm.schedule.total_steps == 96
    assert dgm.density == pytest.approx(0.1, rel=0.05)


class MakesData(TinyMLP):
    """Makes its data, and what limits the run, in its own hook."""

    def on_fit_start(self) -> None:
        self.asked: list[str] = []
        self.made = TinyMLP.batches(16)
        self.trainer.limit_train_batches = 4

    def train_dataloader(self) -> Any:
        self.asked.append("train")
        return self.made


def test_data_and_limits_that_the_module_makes_as_the_fit_starts() -> None:
    module, dgm = MakesData(), DGMCallback(DGMConfig(units=Units(size=1), backend="dense"))
    trainer = make_trainer(dgm, max_epochs=5)
    trainer.fit(module)
    assert (trainer.global_step, dgm.schedule.total_steps) == (20, 20)
    assert module.asked == ["train"]
    assert "on_fit_start" not in vars(module)
