"""Optimizers that are made in mid-run under a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from helpers.models import NO_VALIDATION_LOADER, TinyMLP, assert_final, leftovers, make_trainer
from helpers.runs import SCHEDULE, STEPS
from lightning_estdgm import DGMCallback, DGMConfig

pytestmark = [pytest.mark.filterwarnings(NO_VALIDATION_LOADER)]


class NewOptimizer(pl.Callback):
    """Has the Trainer make its optimizers anew before a step, or steps by one that the Trainer does not know."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 13:
            trainer.strategy.setup_optimizers(trainer)


def test_a_trainers_new_optimizer_is_taken_over(caplog: Any) -> None:
    pl.seed_everything(0, verbose=False)
    module, callback = TinyMLP(), DGMCallback(DGMConfig(schedule=SCHEDULE))
    trainer = make_trainer(NewOptimizer(), callback, max_epochs=5)
    with caplog.at_level("INFO"):
        trainer.fit(module, TinyMLP.batches(8))
    assert callback.controller.steps == STEPS
    assert_final(module, callback)
    assert "has other optimizers than before" in caplog.text
    assert len(callback.controller._hooks.optimizers) == 1
    assert leftovers(module, trainer) == []


def test_an_optimizer_that_the_trainer_does_not_know_is_taken_over() -> None:
    class Own(TinyMLP):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.own: Any = None

        def training_step(self, batch: Any, batch_idx: int) -> None:
            if self.own is None or (self.trainer.current_epoch == 2 and batch_idx == 3):
                self.own = torch.optim.AdamW(self.parameters(), 1e-2)
            self.own.zero_grad()
            self.manual_backward(self.loss(batch))
            self.own.step()

    pl.seed_everything(0, verbose=False)
    module, callback = Own(), DGMCallback(DGMConfig(schedule=SCHEDULE))
    make_trainer(callback, max_epochs=5).fit(module, TinyMLP.batches(8))
    assert callback.controller.steps == STEPS
    assert_final(module, callback)


class ByHand(TinyMLP):
    """Steps by hand in every so many batches, by Lightning's optimizer or the plain one."""

    automatic_optimization = False

    def __init__(self, plain: bool, every: int = 1) -> None:
        super().__init__()
        self.plain, self.every = plain, every

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=not self.plain)
        if batch_idx % self.every == 0:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


@pytest.mark.parametrize("limits", [{}, {"max_steps": 1000}], ids=["by epochs", "and by steps"])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("plain", [False, True], ids=["Lightning's", "plain"])
def test_manual_steps_move_the_schedule_to_its_end(plain: bool, every: int, limits: dict[str, int]) -> None:
    pl.seed_everything(0, verbose=False)
    module, callback = ByHand(plain, every), DGMCallback(DGMConfig(schedule=SCHEDULE))
    trainer = make_trainer(callback, max_epochs=5, **limits)
    trainer.fit(module, TinyMLP.batches(8))
    assert trainer.global_step == (0 if plain else STEPS // every)
    assert callback.controller.steps == STEPS // every
    assert callback.controller.position >= STEPS - every + 1
    assert callback.controller.density == callback.controller.final_density
    assert_final(module, callback)


@pytest.mark.filterwarnings("ignore:the run ended at position 16 of 40")
def test_a_resumed_run_of_steps_that_the_trainer_does_not_count_keeps_its_length(tmp_path: Path) -> None:
    class Stops(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.should_stop = True

    def fit(*more: pl.Callback, ckpt: Path | None = None) -> tuple[pl.Trainer, DGMCallback]:
        pl.seed_everything(0, verbose=False)
        callback = DGMCallback(DGMConfig(schedule=SCHEDULE))
        trainer = make_trainer(callback, *more, max_epochs=10, max_steps=STEPS)
        trainer.fit(ByHand(plain=True), TinyMLP.batches(8), ckpt_path=ckpt)
        return trainer, callback

    trainer, stopped = fit(Stops())
    assert stopped.controller.position == 16
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    _, resumed = fit(ckpt=tmp_path / "stopped.ckpt")
    assert resumed.controller.pace.last == STEPS
    assert resumed.controller.density == resumed.controller.final_density
