"""Steps of the Trainer in which no masked weight moves: the schedule ends with the run all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from helpers.models import NO_VALIDATION_LOADER, ResumableLoader, TinyMLP, assert_final, make_trainer
from helpers.runs import EPOCH_STEPS, SCHEDULE, STEPS, SaveAt, differences, end_of
from lightning_estdgm import DGMCallback, DGMConfig

pytestmark = [
    pytest.mark.filterwarnings(NO_VALIDATION_LOADER),
    pytest.mark.filterwarnings("ignore:.*returned `None`"),
]


class NoLoss(TinyMLP):
    """Has no loss in every third batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


class OwnAccumulation(TinyMLP):
    """Steps in every other batch, by its own `optimizer_step`."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2 == 0:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class DroppedLayers(TinyMLP):
    """Only its head trains in most batches, as where residual branches are dropped at random."""

    def loss(self, batch: Any) -> Any:
        if self.global_step % 4:
            return self.net[-1].bias.square().sum()
        return super().loss(batch)


def fit(cls: Any, *extra: pl.Callback, ckpt: Path | None = None, **settings: Any) -> tuple[Any, DGMCallback, Any]:
    pl.seed_everything(0, verbose=False)
    module, dgm = cls(), DGMCallback(DGMConfig(schedule=SCHEDULE), **settings)
    trainer = make_trainer(dgm, *extra, max_epochs=STEPS // EPOCH_STEPS)
    trainer.fit(module, ResumableLoader(cls.batches(EPOCH_STEPS)), ckpt_path=ckpt)
    return module, dgm, trainer


@pytest.mark.parametrize("settings", [{}, {"total_steps": STEPS}], ids=["by epochs", "length given"])
@pytest.mark.parametrize("cls", [NoLoss, OwnAccumulation, DroppedLayers])
def test_the_schedule_ends_with_the_run(cls: Any, settings: dict[str, Any]) -> None:
    module, dgm, trainer = fit(cls, **settings)
    assert trainer.global_step == STEPS
    assert dgm.controller.steps < STEPS
    assert STEPS - 4 <= dgm.controller.position <= STEPS
    assert_final(module, dgm)
    assert dgm.run_summary()["ended_as_asked"] is True


@pytest.mark.parametrize("at", [8, 9, 11, 26])
@pytest.mark.parametrize("cls", [NoLoss, OwnAccumulation])
def test_a_resumed_run_equals_the_straight_one(tmp_path: Path, cls: Any, at: int) -> None:
    path = tmp_path / "at.ckpt"
    straight = end_of(*fit(cls, SaveAt("on_train_batch_end", at, path)))
    assert differences(end_of(*fit(cls, ckpt=path)), straight) == []


@pytest.mark.filterwarnings("ignore:the run ended at position 7 of 16")  # of the last fit, which has half of the steps
def test_a_second_fit_of_the_same_trainer_counts_its_own_steps_also_when_resumed(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    module, dgm = NoLoss(), DGMCallback(total_steps=16)
    trainer = make_trainer(dgm, max_epochs=2)
    trainer.fit(module, ResumableLoader(NoLoss.batches(EPOCH_STEPS)))
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, ResumableLoader(NoLoss.batches(EPOCH_STEPS)))
    assert (dgm.controller.position, dgm.schedule.total_steps) == (15, 16)  # the last batch has no loss
    trainer.fit_loop.max_epochs = 5
    path = tmp_path / "at.ckpt"
    trainer.callbacks.append(SaveAt("on_train_batch_end", 36, path))
    trainer.fit(module, ResumableLoader(NoLoss.batches(EPOCH_STEPS)))
    state = torch.load(path, weights_only=True)["callbacks"]["DGMCallback"]
    twin = DGMCallback(total_steps=16)
    seen: list[int] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(twin.controller.position)

    make_trainer(twin, Look(), max_epochs=5).fit(NoLoss(), ResumableLoader(NoLoss.batches(EPOCH_STEPS)), ckpt_path=path)
    assert state["position"] <= seen[0] <= state["position"] + 2
