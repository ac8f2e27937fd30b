"""Resuming with another length: the run goes on at its share of the schedule, and ends with it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from helpers.models import GAN, NO_VALIDATION_LOADER, Batches, ResumableLoader, TinyMLP, assert_final, make_trainer
from helpers.runs import SCHEDULE, SaveAt, differences, end_of, load
from lightning_estdgm import DGMCallback, DGMConfig

pytestmark = [
    pytest.mark.filterwarnings(NO_VALIDATION_LOADER),
    pytest.mark.filterwarnings("ignore:Be aware .*add the following callbacks"),
    pytest.mark.filterwarnings("ignore:the run ended at position"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before"),
]


class Positions(pl.Callback):
    """Position in the schedule and density, before the first batch and after each."""

    def __init__(self, dgm: DGMCallback) -> None:
        self.dgm = dgm
        self.seen: list[int] = []
        self.steps = -1
        self.densities: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        if not self.seen:
            self.on_train_batch_end()

    def on_train_batch_end(self, *args: Any) -> None:
        if self.dgm.controller.steps == self.steps:
            return
        self.steps = self.dgm.controller.steps
        self.seen.append(self.dgm.controller.position)
        self.densities.append(self.dgm.density)


def fit(
    batches: int,
    *extra: pl.Callback,
    ckpt: Path | None = None,
    cls: Any = TinyMLP,
    config: Any = None,
    stateful: bool = False,
    **trainer: Any,
) -> tuple[Any, DGMCallback, pl.Trainer, Positions]:
    pl.seed_everything(0, verbose=False)
    module, dgm = cls(), DGMCallback(config, total_steps=trainer.pop("total_steps", None))
    positions = Positions(dgm)
    made = make_trainer(
        dgm,
        positions,
        *extra,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in extra),
        **{"max_epochs": -1} | trainer,
    )
    loader = TinyMLP.batches(batches)
    made.fit(module, ResumableLoader(loader) if stateful else loader, ckpt_path=ckpt)
    return module, dgm, made, positions


def saved(path: Path, batches: int, step: int, hook: str = "on_train_batch_end", **settings: Any) -> dict[str, Any]:
    """Save the checkpoint of a run at a step; return its state of DGMCallback."""
    fit(batches, SaveAt(hook, step, path), **settings)
    return load(path)["callbacks"]["DGMCallback"]


# name: (settings of the run, batches, step of the checkpoint), (settings of the resumed run, batches)
LENGTHS: dict[str, tuple[dict[str, Any], int, int, dict[str, Any], int]] = {
    "more epochs": ({"max_epochs": 5}, 8, 16, {"max_epochs": 12}, 8),
    "fewer epochs": ({"max_epochs": 10}, 8, 16, {"max_epochs": 4}, 8),
    "more steps": ({"max_steps": 40}, 8, 13, {"max_steps": 100}, 8),
    "fewer steps": ({"max_steps": 100}, 8, 13, {"max_steps": 40}, 8),
    "more batches": ({"max_epochs": 5}, 8, 16, {"max_epochs": 5}, 20),
    "fewer batches": ({"max_epochs": 5}, 16, 32, {"max_epochs": 5}, 8),
    "more batches, in mid-epoch": ({"max_epochs": 5}, 8, 20, {"max_epochs": 5}, 20),
    "fewer batches, in mid-epoch": ({"max_epochs": 5}, 16, 36, {"max_epochs": 5}, 8),
    "accumulation": ({"max_epochs": 5}, 8, 16, {"max_epochs": 5, "accumulate_grad_batches": 3}, 8),
    "accumulation, in mid-epoch": ({"max_epochs": 5}, 8, 21, {"max_epochs": 5, "accumulate_grad_batches": 3}, 8),
    "no accumulation": ({"max_epochs": 5, "accumulate_grad_batches": 2}, 16, 19, {"max_epochs": 5}, 16),
    "as long, in other epochs": ({"max_epochs": 10}, 8, 40, {"max_epochs": 20}, 4),
    "total_steps": ({"total_steps": 40, "max_steps": 40}, 8, 13, {"total_steps": 80, "max_steps": 80}, 8),
    "another limit": ({"max_epochs": 5}, 8, 16, {"max_steps": 60}, 8),
}


@pytest.mark.parametrize("before_the_step", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_a_run_of_another_length_goes_on_at_its_share(tmp_path, caplog, name, before_the_step):
    first, batches, step, second, other_batches = LENGTHS[name]
    hook = "on_train_epoch_end" if step % batches == 0 else "on_train_batch_end"
    hook = "on_before_zero_grad" if before_the_step else hook
    path = tmp_path / "saved.ckpt"
    state = saved(path, batches, step, hook, **first)
    length = state["total_steps"]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        module, dgm, _, positions = fit(other_batches, ckpt=path, **second)
    said = [record.message for record in caplog.records if "the checkpoint is of a run of" in record.message]
    assert len(said) == 1
    assert f"a run of {length} steps" in said[0]
    assert f"total_steps={length}" in said[0]
    assert positions.seen[0] == state["position"] + state["stepped"]  # where it was
    assert dgm.schedule.total_steps == length
    assert dgm.controller.position == length  # the schedule ends with the run, not before and not after
    most = -(-(length - positions.seen[0]) // (len(positions.seen) - 1))
    assert max(b - a for a, b in zip(positions.seen, positions.seen[1:], strict=False)) <= most
    assert positions.densities == sorted(positions.densities, reverse=True)
    assert_final(module, dgm)


def test_a_run_that_is_past_its_new_length_goes_on_at_a_position_a_step(tmp_path, caplog):
    path = tmp_path / "saved.ckpt"
    saved(path, 8, 24, max_steps=40)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        module, dgm, _, positions = fit(8, ckpt=path, total_steps=20, max_steps=60)
    (said,) = [record.message for record in caplog.records if "the checkpoint is of a run of" in record.message]
    assert (
        "this one has 20. It goes on where 60% of the schedule are done, and the rest of it goes on a position" in said
    )
    assert "since so many steps are done already. DGMCallback(total_steps=40)" in said
    assert positions.seen == [*range(24, 61)]
    assert_final(module, dgm)


def test_a_run_of_the_same_length_says_nothing(tmp_path, caplog):
    saved(tmp_path / "saved.ckpt", 8, 13, max_steps=40)
    with caplog.at_level(logging.INFO):
        fit(8, ckpt=tmp_path / "saved.ckpt", max_steps=40)
    assert "the checkpoint is of a run" not in caplog.text


@pytest.mark.parametrize("step", [18, 21, 26, 33, 47])
def test_a_lengthened_run_is_resumed_exactly(tmp_path, step):
    """Also inside a window (26), and where a position lasts for several steps."""
    config = DGMConfig(schedule=SCHEDULE)
    saved(tmp_path / "first.ckpt", 8, 13, max_steps=40, config=config, stateful=True)
    save = SaveAt("on_train_batch_end", step, tmp_path / "second.ckpt")
    straight = end_of(*fit(8, save, ckpt=tmp_path / "first.ckpt", max_steps=70, config=config, stateful=True)[:3])
    resumed = end_of(*fit(8, ckpt=tmp_path / "second.ckpt", max_steps=70, config=config, stateful=True)[:3])
    assert differences(straight, resumed) == []


@pytest.mark.parametrize("more", [{"max_epochs": 8}, {"max_steps": 60}])
def test_a_finished_run_goes_on_with_its_masks(tmp_path, caplog, more):
    path = tmp_path / "saved.ckpt"
    _, before, _, _ = fit(8, SaveAt("on_train_epoch_end", 40, path), max_epochs=5)
    with caplog.at_level(logging.INFO):
        module, dgm, trainer, _ = fit(8, ckpt=path, **more)
    assert "the schedule has ended, so the masks stay as they are" in caplog.text
    assert dgm.controller.steps == trainer.global_step > 40
    masks = dgm.masks()
    assert all(torch.equal(masks[name], mask) for name, mask in before.masks().items())
    assert_final(module, dgm)


def test_fewer_epochs_than_are_done_change_nothing(tmp_path):
    path = tmp_path / "saved.ckpt"
    saved(path, 8, 24, "on_train_epoch_end", max_epochs=5)
    weights = load(path)["state_dict"]
    module, dgm, trainer, _ = fit(8, ckpt=path, max_epochs=2)
    assert trainer.global_step == dgm.controller.steps == 24
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    assert dgm.controller.position == 24
    assert dgm.phase == "refinement"


def test_several_optimizers_go_on_at_their_share(tmp_path):
    path = tmp_path / "saved.ckpt"
    state = saved(path, 8, 26, cls=GAN, max_steps=80)
    _, dgm, trainer, positions = fit(8, ckpt=path, cls=GAN, max_steps=160)
    assert positions.seen[0] == state["position"] + state["stepped"]
    assert dgm.controller.position == dgm.schedule.total_steps == 40
    assert trainer.global_step == 160


def test_manual_optimization_by_epochs_goes_on_at_its_share(tmp_path):
    path = tmp_path / "saved.ckpt"
    state = saved(path, 8, 32, cls=GAN, max_epochs=5)
    _, dgm, _, positions = fit(8, ckpt=path, cls=GAN, max_epochs=9)
    assert positions.seen[0] == state["position"] + state["stepped"]
    assert dgm.controller.position == dgm.schedule.total_steps == 40


def test_accumulation_that_changes_with_the_epochs(tmp_path):
    path = tmp_path / "saved.ckpt"
    saved(path, 8, 16, max_epochs=5)
    _, dgm, _, _ = fit(8, GradientAccumulationScheduler({0: 1, 3: 4}), ckpt=path, max_epochs=6)
    assert dgm.controller.steps == 16 + 8 + 3 * 2
    assert dgm.controller.position == dgm.schedule.total_steps == 40


def test_phases_given_in_steps_keep_their_share(tmp_path):
    path, config = tmp_path / "saved.ckpt", DGMConfig(schedule=SCHEDULE)
    saved(path, 8, 13, max_steps=40, config=config)
    module, dgm, _, positions = fit(8, ckpt=path, max_steps=90, config=config)
    assert positions.seen[0] == 13
    assert dgm.controller.position == 40
    assert_final(module, dgm)


class StopAt(pl.Callback):
    """Ends the run after a step, as `EarlyStopping` does at a validation in mid-epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


@pytest.mark.parametrize("cls", [TinyMLP, GAN])
def test_a_run_that_was_stopped_in_mid_epoch_ends_with_its_schedule(tmp_path, caplog, cls):
    """Lightning goes on with the next epoch, so steps are missing that the schedule counts on."""
    path, optimizers = tmp_path / "saved.ckpt", 2 if cls is GAN else 1
    _, first, trainer, _ = fit(8, StopAt(13 * optimizers), cls=cls, max_epochs=5)
    trainer.save_checkpoint(path)
    with caplog.at_level(logging.INFO):
        module, dgm, trainer, positions = fit(8, ckpt=path, cls=cls, max_epochs=5)
    assert positions.seen[0] == first.controller.position == 13
    assert trainer.global_step == (13 + 3 * 8) * optimizers
    assert dgm.controller.position == dgm.schedule.total_steps == 40
    assert positions.seen[-2] < 40
    assert "the Trainer has 24 steps left to do, and the schedule 27" in caplog.text
    assert_final(module, dgm)


# ------------------------------------------------------------------ a fit with nothing left to do


def test_a_second_fit_with_nothing_left_changes_nothing(caplog):
    module, dgm, trainer, _ = fit(8, max_epochs=3)
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    masks, summary = dgm.masks(), dgm.run_summary()
    with caplog.at_level(logging.INFO):
        trainer.fit(module, ResumableLoader(TinyMLP.batches(8)))
    assert "nothing left to train" in caplog.text
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    assert all(torch.equal(mask, masks[name]) for name, mask in dgm.masks().items())
    assert dgm.run_summary() == summary
    assert dgm.controller.steps == 24


@pytest.mark.parametrize("settings", [{"max_epochs": 0}, {"max_steps": 0}, {"max_epochs": 2, "limit_train_batches": 0}])
def test_a_first_fit_with_nothing_to_do_masks_nothing(settings):
    pl.seed_everything(0, verbose=False)
    module, dgm = TinyMLP(), DGMCallback()
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    make_trainer(dgm, **settings).fit(module, Batches(TinyMLP.batches(8)))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    assert dgm.density == 1.0
    assert dgm.run_summary()["density"] is None


def test_a_finished_run_resumed_with_nothing_left_tells_its_end(tmp_path):
    path = tmp_path / "saved.ckpt"
    _, before, _, _ = fit(8, SaveAt("on_train_epoch_end", 40, path), max_epochs=5)
    module, dgm, _, _ = fit(8, ckpt=path, max_epochs=5)
    assert {k: v for k, v in dgm.run_summary().items() if k != "backends"} == {
        k: v for k, v in before.run_summary().items() if k != "backends"
    }
    assert_final(module, dgm)
