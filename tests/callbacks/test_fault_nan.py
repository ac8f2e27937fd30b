"""A few steps of NaN losses: the run goes on where it is protected and stops clearly where not; masks stay exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from helpers import fault_jobs
from helpers.exact import differences
from helpers.fault_jobs import STEPS, checkpoints
from helpers.models import MLP, NO_VALIDATION_LOADER, assert_final
from lightning_estdgm import DGMCallback, SparseCheckpointIO

pytestmark = [
    pytest.mark.filterwarnings(NO_VALIDATION_LOADER),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:step .* a gradient was NaN or infinite:RuntimeWarning"),
]

# models.SCHEDULE: masks change before steps 5, 10 and 15; steps 3, 4, 8, 9, 13 and 14 are observed.
BURSTS = {
    "inside a window": [8],
    "a whole window": [8, 9],
    "outside windows": [6, 7],
    "into a window": [6, 7, 8],
    "in the frozen tail": [17, 18],
}


class Bursting(MLP):
    """Its loss is NaN in some batches; `cure` is what it does about that."""

    def __init__(self, burst: list[int], cure: str) -> None:
        super().__init__(scheduler="onecycle")
        self.burst, self.cure = burst, cure

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        if batch_idx in self.burst:
            loss = loss * float("nan")
        return None if self.cure == "skip" and loss.isnan() else loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.cure == "zero":
            for parameter in self.parameters():
                parameter.grad.nan_to_num_(0.0)


class Watch(pl.Callback):
    """Notes the window's samples after each batch, and that weights outside the masks are zero all along."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self.callback: DGMCallback | None = None
        self.module: Any = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        (self.callback,) = (x for x in trainer.callbacks if isinstance(x, DGMCallback))
        self.module = pl_module
        layers = self.callback.state_dict()["layers"]
        self.samples += [(layers["net.0"]["window"] or {"samples": 0})["samples"]]
        for name, mask in self.callback.masks().items():
            weight = pl_module.get_submodule(name).weight
            over_weights = mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
            assert torch.count_nonzero(weight[~over_weights]) == 0


def train(folder: Path, burst: list[int], cure: str, **settings: Any) -> tuple[dict[str, Any], Watch]:
    watch = Watch()
    end = fault_jobs.train(folder, watch, make=lambda: Bursting(burst, cure), **settings)
    return end, watch


def samples(left_out: set[int]) -> list[int]:
    """What the window holds after each batch, told from the schedule: emptied by the update after it."""
    held, waiting, after = 0, False, []
    for step in range(STEPS):
        held += (step in (3, 4, 8, 9, 13, 14) or waiting) and step not in left_out
        due = step + 1 in (5, 10, 15) or waiting
        waiting = due and held == 0
        if due and held:
            held = 0
        after.append(held)
    return after


@pytest.mark.parametrize("burst", BURSTS)
def test_run_that_zeroes_bad_gradients_goes_on(burst: str, tmp_path: Path) -> None:
    end, watch = train(tmp_path, BURSTS[burst], "zero")
    assert watch.samples == samples(set(BURSTS[burst]))
    assert end["global_step"] == end["dgm"]["steps"] == STEPS
    assert_final(watch.module, watch.callback)


def test_resume_in_the_middle_of_a_burst(tmp_path: Path) -> None:
    burst = [6, 7, 8]
    straight, _ = train(tmp_path, burst, "zero")
    assert 8 in checkpoints(tmp_path)
    resumed, _ = train(tmp_path, burst, "zero", ckpt=checkpoints(tmp_path)[8])
    assert differences(resumed, straight) == []


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
@pytest.mark.parametrize("burst", ["inside a window", "outside windows"])
def test_run_that_skips_bad_losses_goes_on(burst: str, tmp_path: Path) -> None:
    """A step without gradients is none: the schedule waits for as many real ones."""
    end, watch = train(tmp_path, BURSTS[burst], "skip")
    assert end["dgm"]["steps"] == STEPS - len(BURSTS[burst])
    assert max(watch.samples) == 1
    masked = [d for d in watch.callback.decisions() if d.masked]
    for name, mask in watch.callback.masks().items():
        (decision,) = (d for d in masked if d.name == name)
        assert int(mask.sum()) == round(decision.density * mask.numel())


def test_steps_skipped_by_a_scaler_are_left_out(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    end, _ = train(tmp_path, [8], "none", plugins=(MixedPrecision("16-mixed", "cpu", scaler),))
    assert scaler.get_scale() == 2.0**9  # the burst was seen and the step skipped
    assert end["dgm"]["steps"] == STEPS - 1
    assert all(x.isfinite().all() for x in end["weights"].values())


@pytest.mark.parametrize("burst", [[6], [9]], ids=["before a window", "inside a window"])
def test_unprotected_run_stops_at_the_next_update_and_resumes_from_before(burst: list[int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the run has diverged: layer 'net\.0' holds NaN weights"):
        train(tmp_path / "burst", burst, "none")
    saved = checkpoints(tmp_path / "burst")
    assert max(saved) == 8  # the update is due after step 9
    states = {step: SparseCheckpointIO().load_checkpoint(path)["state_dict"] for step, path in saved.items()}
    good = [step for step, state in states.items() if all(x.isfinite().all() for x in state.values())]
    assert good == ([4] if burst == [6] else [4, 8])
    straight, _ = train(tmp_path / "straight", [], "none")
    resumed, _ = train(tmp_path / "burst", [], "none", ckpt=saved[max(good)])
    assert differences(resumed, straight) == []
