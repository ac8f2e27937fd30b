"""Weights that are loaded in mid-run: said where the masks cut them, and masked as any others."""

import copy
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from helpers.models import NO_VALIDATION_LOADER, TinyMLP, assert_final, make_trainer, weight_masks
from helpers.runs import SCHEDULE
from lightning_estdgm import DGMCallback, DGMConfig, Units

pytestmark = pytest.mark.filterwarnings(NO_VALIDATION_LOADER)
SAID = "weights were loaded in mid-run"


class Loads(pl.Callback):
    """Keeps the model and optimizer of one step and loads them before another, as a restored best checkpoint."""

    def __init__(self, keep: int, load: int) -> None:
        self.keep, self.load = keep, load

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self.keep:
            self.kept = copy.deepcopy((pl_module.state_dict(), trainer.optimizers[0].state_dict()))
        if trainer.global_step == self.load:
            pl_module.load_state_dict(self.kept[0])
            trainer.optimizers[0].load_state_dict(self.kept[1])


class Swaps(pl.Callback):
    """Validates with an average that is loaded for it, and loads the weights back."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.average = copy.deepcopy(pl_module.state_dict())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        for name, value in pl_module.state_dict().items():
            self.average[name].lerp_(value, 0.1)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.weights = copy.deepcopy(pl_module.state_dict())
        pl_module.load_state_dict(self.average)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.load_state_dict(self.weights)


def fit(*callbacks: pl.Callback, inactive: str = "zero", validates: bool = False) -> tuple[TinyMLP, DGMCallback, str]:
    torch.manual_seed(0)
    config = DGMConfig(schedule=SCHEDULE, units=Units(size=1), backend="dense", inactive=inactive)
    module, dgm = TinyMLP(), DGMCallback(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(dgm, *callbacks, max_epochs=5)
        trainer.fit(module, TinyMLP.batches(8), TinyMLP.batches(2) if validates else None)
    assert not any(layer._load_state_dict_post_hooks for layer in module.modules())
    return module, dgm, "; ".join(str(w.message) for w in caught if SAID in str(w.message))


def test_weights_of_an_earlier_step_are_masked_and_it_is_said() -> None:
    module, dgm, said = fit(Loads(keep=10, load=30))
    assert "in 2 layers (net.0, net.2) they are not zero outside the masks" in said
    assert "ckpt_path=" in said
    assert_final(module, dgm)
    assert all(not weight[~mask].any() for weight, mask in weight_masks(module, dgm).values())


@pytest.mark.parametrize(
    ("callback", "inactive"),
    [(Loads(30, 30), "zero"), (Loads(10, 30), "frozen"), (Swaps(), "zero")],
    ids=["of this step", "nothing is cut", "swapped for validation"],
)
def test_nothing_is_said_where_nothing_is_lost(callback: pl.Callback, inactive: str) -> None:
    assert fit(callback, inactive=inactive, validates=isinstance(callback, Swaps))[2] == ""


class RestoresBest(Loads):
    """Loads the weights of an early step at the end, as the best ones."""

    def __init__(self) -> None:
        super().__init__(keep=10, load=-1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.load_state_dict(self.kept[0])


class PutsAverageIn(Swaps):
    """Leaves an average that it writes by hand at the end."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.weights = copy.deepcopy(pl_module.state_dict())
        write(pl_module, self.average)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        write(pl_module, self.average)


def write(module: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(values[name])


def fitted(callbacks: list[pl.Callback], module: TinyMLP | None = None) -> TinyMLP:
    torch.manual_seed(0)
    module = module or TinyMLP()
    trainer = make_trainer(*callbacks, max_epochs=5, num_sanity_val_steps=0)
    trainer.fit(module, TinyMLP.batches(8), TinyMLP.batches(2))
    return module


def single_weights() -> DGMCallback:
    return DGMCallback(DGMConfig(schedule=SCHEDULE, units=Units(size=1), backend="dense"))


def outside(module: Any, dgm: DGMCallback) -> int:
    return sum(int(weight[~mask].count_nonzero()) for weight, mask in weight_masks(module, dgm).values())


@pytest.mark.parametrize("other_first", [True, False])
def test_weights_that_are_loaded_at_the_end_stay_and_it_is_said(other_first: bool) -> None:
    dgm, best = single_weights(), RestoresBest()
    callbacks = [best, dgm] if other_first else [dgm, best]
    with pytest.warns(UserWarning, match=r"ends with weights outside the masks in 2 layers \(net.0, net.2\)"):
        module = fitted(callbacks)
    assert all(torch.equal(value, best.kept[0][name]) for name, value in module.named_parameters())
    assert dgm.run_summary()["ended_as_asked"] is False


def test_an_average_that_is_left_at_the_end_is_said() -> None:
    dgm = single_weights()
    with pytest.warns(UserWarning, match="ends with weights outside the masks"):
        module = fitted([dgm, PutsAverageIn()])
    assert outside(module, dgm) > 0
    dgm = single_weights()
    module = fitted([PutsAverageIn(), dgm])  # before ours, it is masked as all that is written is
    assert outside(module, dgm) == 0
    assert dgm.run_summary()["ended_as_asked"] is True


@pytest.mark.parametrize("other_first", [True, False])
@pytest.mark.filterwarnings("ignore:.*ends with weights outside the masks")
def test_an_average_is_masked_while_it_validates(other_first: bool) -> None:
    class Counts(TinyMLP):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.seen = [*getattr(self, "seen", []), outside(self, dgm)]

    dgm = single_weights()
    callbacks = [PutsAverageIn(), dgm] if other_first else [dgm, PutsAverageIn()]
    module = fitted(callbacks, Counts())
    assert module.seen == [0] * 10


def test_a_checkpoint_of_other_weights_than_those_of_its_masks_is_said(tmp_path: Any) -> None:
    keep = Loads(keep=10, load=-1)
    torch.manual_seed(0)
    module, trainer = TinyMLP(), make_trainer(single_weights(), keep, max_epochs=5)
    trainer.fit(module, TinyMLP.batches(8))
    module.load_state_dict(keep.kept[0])  # as trainer.test(ckpt_path="best") does
    trainer.save_checkpoint(tmp_path / "mixed.ckpt")
    with pytest.warns(UserWarning, match=r"weights are not zero outside its masks in 2 layers \(net.0, net.2\)"):
        make_trainer(single_weights(), max_epochs=6).fit(
            TinyMLP(), TinyMLP.batches(8), ckpt_path=tmp_path / "mixed.ckpt", weights_only=True
        )
