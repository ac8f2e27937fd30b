"""Weights that the user's code writes to between steps: masked again before they are computed with, saved or kept."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.models import NO_VALIDATION_LOADER, TinyMLP, make_trainer
from helpers.runs import SCHEDULE
from lightning_estdgm import DGMCallback, DGMConfig, DGMController, Units

pytestmark = pytest.mark.filterwarnings(NO_VALIDATION_LOADER)
SAID = "something wrote to its inactive weights through `.data`"


def add_uncounted(weight: torch.Tensor) -> None:
    weight.data.add_(1e-3)


@torch.no_grad()
def add_counted(weight: torch.Tensor) -> None:
    weight.add_(1e-3)


def write_a_row(weight: torch.Tensor) -> None:
    weight.data[-1] = 0.1


class Writes(pl.Callback):
    """Writes to all weights in a hook of the Trainer."""

    def __init__(self, hook: str, write: Callable[[torch.Tensor], None]) -> None:
        setattr(self, hook, self._write)
        self.write = write

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        for weight in pl_module.parameters():
            self.write(weight)


class Watch(pl.Callback):
    """Counts nonzero weights outside the masks in each forward."""

    def __init__(self, dgm: DGMCallback) -> None:
        self.dgm, self.outside = dgm, list[int]()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        if trainer.global_step:
            self.outside.append(outside(dict(pl_module.named_parameters()), self.dgm))


def outside(weights: dict[str, torch.Tensor], dgm: DGMCallback) -> int:
    return sum(int(torch.count_nonzero(weights[f"{name}.weight"][~mask])) for name, mask in dgm.masks().items())


def fit(hook: str, write: Callable[[torch.Tensor], None], *more: pl.Callback, **trainer: Any) -> tuple[Any, list[int]]:
    torch.manual_seed(0)
    module, dgm = TinyMLP(), DGMCallback(DGMConfig(schedule=SCHEDULE, units=Units(size=1), backend="dense"))
    watch = Watch(dgm)
    made = make_trainer(dgm, Writes(hook, write), watch, *more, max_epochs=5, **trainer)
    made.fit(module, TinyMLP.batches(8), TinyMLP.batches(2))
    assert outside(dict(module.named_parameters()), dgm) == 0
    return dgm, watch.outside


@pytest.mark.parametrize("write", [add_uncounted, add_counted])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end", "on_validation_end"])
def test_what_is_written_between_batches_is_never_computed_with(
    hook: str, write: Callable[[torch.Tensor], None]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dgm, seen = fit(hook, write)
    assert not any(seen)
    assert len(seen) > 30
    assert dgm.run_summary()["ended_as_asked"]
    said = [str(w.message) for w in caught if SAID in str(w.message)]
    assert len(said) == (write is add_uncounted)


@pytest.mark.filterwarnings(f"ignore:.*{SAID}:RuntimeWarning")
def test_what_is_written_to_a_part_of_a_weight_stays_for_an_epoch_at_most() -> None:
    """The places that are looked at are not among what is written."""
    _, seen = fit("on_train_epoch_end", write_a_row)
    assert not any(seen)


def test_loaded_weights_are_whole_until_their_masks_are_loaded() -> None:
    def run(seed: int) -> tuple[torch.nn.Module, DGMController]:
        torch.manual_seed(seed)
        config = DGMConfig(schedule=SCHEDULE, units=Units(size=1), backend="dense", seed=seed)
        net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        return net, DGMController(net, torch.optim.Adam(net.parameters()), config, total_steps=40, audit=False)

    (first, its), (second, other) = run(0), run(1)
    with its, other:
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)
        other.load_state_dict(its.state_dict())
        other.mask_weights(every=True)
        torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("write", [add_uncounted, add_counted])
@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.filterwarnings(f"ignore:.*{SAID}:RuntimeWarning")
def test_files_hold_no_more_than_the_masks(
    tmp_path: Path, write: Callable[[torch.Tensor], None], weights_only: bool
) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_weights_only=weights_only, save_on_train_epoch_end=True, save_last=True)
    dgm, _ = fit("on_train_epoch_end", write, checkpoint, enable_checkpointing=True)
    saved = torch.load(checkpoint.last_model_path, weights_only=True)["state_dict"]
    assert outside(saved, dgm) == 0
    assert any(bool(saved[f"{name}.weight"].any()) for name in dgm.masks())
