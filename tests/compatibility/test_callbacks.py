"""Lightning's callbacks, loggers and plugins beside ours, as real runs: every invariant of a masked run holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from helpers.compatibility import outcome_of
from helpers.lightning_callbacks import CHECKED, REFUSED, ROWS, cells
from helpers.models import NO_VALIDATION_LOADER, ResumableLoader, TinyMLP, assert_final, make_trainer, weight_masks
from helpers.runs import EPOCH_STEPS, SCHEDULE, STEPS, SaveAt, differences, load
from lightning_estdgm import DGMCallback, DGMConfig, EnergyMonitor

pytestmark = [
    pytest.mark.filterwarnings(NO_VALIDATION_LOADER),
    pytest.mark.filterwarnings("ignore:Be aware .*add the following callbacks"),
    pytest.mark.filterwarnings("ignore:the best checkpoint by"),
    pytest.mark.filterwarnings("ignore:the run ended at position"),
    pytest.mark.filterwarnings("ignore:.*`lr_scheduler.step..` before `optimizer.step"),
    pytest.mark.filterwarnings("ignore:You have turned on `Trainer.detect_anomaly"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
    pytest.mark.filterwarnings("ignore:.fit.ckpt_path=.last.. is set, but there is no last checkpoint"),
    pytest.mark.filterwarnings("ignore:When using the `ThroughputMonitor`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*mid-run and stay dense"),
    pytest.mark.filterwarnings("ignore:Final phase max_transition_epoch"),
]
BATCHES, STOP = EPOCH_STEPS, 21


class Outside(pl.Callback):
    """Counts nonzero weights outside the masks after every step."""

    def __init__(self, dgm: DGMCallback) -> None:
        self.dgm, self.nonzero, self.steps = dgm, 0, 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.steps += 1
        for weight, mask in weight_masks(pl_module, self.dgm).values():
            self.nonzero += int(torch.count_nonzero(weight[~mask]))


class Fails(pl.Callback):
    """Breaks the run off after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("out of luck")


def fit(name: str, folder: Path, *extra: pl.Callback, ckpt: Path | None = None) -> tuple[Any, ...]:
    pl.seed_everything(0, verbose=False)
    row, dgm = ROWS[name], DGMCallback(DGMConfig(schedule=SCHEDULE))
    module = row.module()
    outside, energy = Outside(dgm), EnergyMonitor(["cpu-estimate"])
    theirs = row.callbacks(folder)
    settings = {"max_epochs": STEPS // BATCHES, "default_root_dir": folder, "log_every_n_steps": 1} | row.trainer(
        folder
    )
    if "Accumulation" in name:  # longer, so that it makes as many steps: 3 epochs of 8, and 4 of 4
        settings["max_epochs"] = 7
    checkpoints = any(isinstance(c, pl.callbacks.Checkpoint) for c in theirs)
    trainer = make_trainer(dgm, energy, outside, *theirs, *extra, enable_checkpointing=checkpoints, **settings)
    trainer.fit(module, ResumableLoader(TinyMLP.batches(BATCHES)), ckpt_path=ckpt)
    return module, dgm, trainer, outside


@pytest.mark.parametrize("name", ROWS)
def test_every_invariant_holds(name: str, tmp_path: Path, record: Callable[[str, str, Sequence[str]], None]) -> None:
    if ROWS[name].library:
        pytest.importorskip(ROWS[name].library)
    row, path, folder = ROWS[name], tmp_path / "saved.ckpt", tmp_path / "straight"
    keys = list(row.module().state_dict())
    module, dgm, trainer, outside = fit(name, folder, SaveAt("on_train_batch_end", STOP, path))
    assert outside.steps >= STEPS == dgm.controller.steps
    assert outside.nonzero == 0
    assert_final(module, dgm)
    assert list(module.state_dict()) == keys
    assert len(list(folder.rglob("energy.json"))) == 1
    if row.fails_at is not None:
        with pytest.raises(RuntimeError, match="out of luck"):
            fit(name, tmp_path / "failed", Fails(row.fails_at))
        (left,) = (tmp_path / "failed").glob(row.leaves[0])
        saved, regular = load(left), load(path)
        for part in ("state_dict", "optimizer_states"):
            assert differences(saved[part], regular[part]) == [], part
        assert differences(*(file["callbacks"]["DGMCallback"] for file in (saved, regular))) == []
    else:
        assert all(list(folder.glob(glob)) for glob in row.leaves)
    assert all(name in next(folder.rglob("metrics.csv")).read_text() for name in row.logs)
    if CHECKED[3] not in row.not_checked:
        resumed, other, resumed_trainer, outside = fit(name, tmp_path / "resumed", ckpt=path)
        assert outside.nonzero == 0
        assert differences(module.state_dict(), resumed.state_dict()) == []
        assert differences(dgm.state_dict(), other.state_dict()) == []
        ends = [[optimizer.state_dict() for optimizer in t.optimizers] for t in (trainer, resumed_trainer)]
        assert differences(*ends) == []
    record("callbacks", name, cells(row, outcome_of(module, dgm)))


@pytest.mark.parametrize("name", REFUSED)
def test_a_second_masker_is_refused(name: str, record: Callable[[str, str, Sequence[str]], None]) -> None:
    dgm = DGMCallback(DGMConfig(schedule=SCHEDULE))
    pruning = getattr(pl.callbacks, name)("l1_unstructured", amount=0.5)
    message = f"{name} prunes the weights that DGMCallback masks.*leave one out, or give {name}'s part"
    with pytest.raises(ValueError, match=message):
        make_trainer(dgm, pruning, max_epochs=5).fit(TinyMLP(), TinyMLP.batches(BATCHES))
    record("callbacks", name, ("none", "the refusal", f"refused: {REFUSED[name]}"))
