"""Lightning's own callbacks and tools beside ours: averages of weights stay masked; tuners leave all as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from helpers.models import (
    MLP,
    NO_VALIDATION_LOADER,
    ConvNet,
    ResumableLoader,
    TinyMLP,
    assert_final,
    make_trainer,
    weight_masks,
)
from helpers.runs import EPOCH_STEPS, SCHEDULE, STEPS, SaveAt, differences, end_of, load
from lightning_estdgm import DGMCallback, DGMConfig, DGMController, EstDgm

pytestmark = [
    pytest.mark.filterwarnings(NO_VALIDATION_LOADER),
    pytest.mark.filterwarnings("ignore:Be aware .*add the following callbacks.*ModelCheckpoint"),
]


class Normed(MLP):
    """Blocks with a sparse operator, and buffers that are averaged too."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(128))


AVERAGES: dict[str, Callable[[], pl.Callback]] = {
    "WeightAveraging": WeightAveraging,
    "EMA": lambda: EMAWeightAveraging(decay=0.9),
    "EMA, late and rare": lambda: EMAWeightAveraging(decay=0.5, update_every_n_steps=7, update_starting_at_step=10),
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=0.3),
}


def inactive(module: nn.Module, dgm: DGMCallback) -> int:
    """How many weights outside the masks are not zero."""
    return sum(int(torch.count_nonzero(weight[~mask])) for weight, mask in weight_masks(module, dgm).values())


class Look(pl.Callback):
    """Counts nonzero inactive weights wherever an average can be seen, and keeps the plain average of weights."""

    def __init__(self, dgm: DGMCallback) -> None:
        self.dgm = dgm
        self.outside: dict[str, int] = {}
        self.validated = 0

    def _count(self, where: str, module: nn.Module) -> None:
        self.outside[where] = self.outside.get(where, 0) + inactive(module, self.dgm)

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.validated += 1
            self._count("validation", pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self._count("training", pl_module)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            average = getattr(callback, "_average_model", None)
            if average is not None:
                self._count("average", getattr(average, "module", average))


def fit(
    cls: Any,
    average: pl.Callback,
    *extra: pl.Callback,
    ours_first: bool = True,
    ckpt: Path | None = None,
    **trainer: Any,
) -> tuple[Any, DGMCallback, pl.Trainer, Look]:
    pl.seed_everything(0, verbose=False)
    module, dgm = cls(), DGMCallback(DGMConfig(schedule=SCHEDULE).merged(**trainer.pop("config", {})))
    look = Look(dgm)
    callbacks = (dgm, average) if ours_first else (average, dgm)
    made = make_trainer(*callbacks, look, *extra, **{"max_epochs": STEPS // EPOCH_STEPS} | trainer)
    made.fit(module, ResumableLoader(cls.batches(EPOCH_STEPS)), cls.batches(2), ckpt_path=ckpt)
    return module, dgm, made, look


# --------------------------------------------------------------------------- averages of weights


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "ours last"])
@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("cls", [TinyMLP, Normed, ConvNet])
@pytest.mark.filterwarnings("ignore:.*`lr_scheduler.step..` before `optimizer.step")
def test_averages_are_zero_outside_the_masks(cls: Any, name: str, ours_first: bool) -> None:
    module, dgm, trainer, look = fit(cls, AVERAGES[name](), ours_first=ours_first)
    assert dgm.controller.steps == STEPS == dgm.schedule.total_steps
    assert look.validated == (2 * 6 if name == "SWA" and cls is not TinyMLP else 2 * 5)
    assert look.outside == {"training": 0, "average": 0, "validation": 0}
    assert inactive(module, dgm) == 0
    assert_final(module, dgm)
    # For batch statistics SWA adds an epoch, which Lightning counts as a step although it has no backward.
    assert trainer.global_step == STEPS + (name == "SWA" and cls is not TinyMLP)


@pytest.mark.parametrize("name", AVERAGES)
def test_average_is_the_average_of_the_weights_inside_the_masks(name: str) -> None:
    """Recomputed here; and it is not the last weights, nor masked without us."""
    kept: list[dict[str, Tensor]] = []

    class Keep(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            kept.append({k: v.detach().clone() for k, v in pl_module.named_parameters()})

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            kept.append({k: v.detach().clone() for k, v in pl_module.named_parameters()})

    module, dgm, _, _ = fit(TinyMLP, AVERAGES[name](), Keep())
    first_last_every, decay = {
        "WeightAveraging": ((1, STEPS + 1, 1), None),
        "EMA": ((1, STEPS + 1, 1), 0.9),
        "EMA, late and rare": ((15, STEPS + 1, 7), 0.5),
        "SWA": ((0, STEPS, EPOCH_STEPS), None),
    }[name]
    averaged = [kept[step] for step in range(*first_last_every)]
    masks = {id(weight): mask for weight, mask in weight_masks(module, dgm).values()}
    for key, weight in module.named_parameters():
        expected = averaged[0][key]
        for n, later in enumerate(averaged[1:], start=2):
            share = 1.0 / n if decay is None else 1.0 - decay
            expected = expected + share * (later[key] - expected)
        # Those that were inactive for a time have lost what the average held of them before.
        always = torch.stack([weights[key] != 0 for weights in kept[1:]]).all(0)
        torch.testing.assert_close(weight[always], expected[always], rtol=1e-4, atol=1e-6)
        assert always.sum() > 0.05 * always.numel()
        assert not torch.equal(weight, kept[-1][key])
        if id(weight) in masks:
            assert torch.count_nonzero(expected[~masks[id(weight)]]) > 0, "there was something to mask"


def swalr_keeps_a_function() -> bool:
    return "anneal_func" in SWALR(torch.optim.SGD([torch.ones(1)]), 0.1).state_dict()


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("step", [14, 24])
def test_resumed_average_equals_straight(name: str, step: int, tmp_path: Path) -> None:
    if name == "SWA" and step > EPOCH_STEPS and swalr_keeps_a_function():
        pytest.skip(
            "SWALR of torch 2.6 keeps a function in its state, which torch does not load with weights_only=True"
        )
    save = SaveAt("on_train_batch_end", step, tmp_path / "saved.ckpt")
    module, dgm, trainer, _ = fit(TinyMLP, AVERAGES[name](), save)
    end = end_of(module, dgm, trainer)
    again, dgm, trainer, look = fit(TinyMLP, AVERAGES[name](), ckpt=save.path)
    # Resumed by Lightning, SWA's own scheduler has other counts, with or without us.
    assert (differences(end, end_of(again, dgm, trainer)) == []) == (name != "SWA")
    assert set(look.outside.values()) == {0}


def test_checkpoint_of_an_average_is_masked_and_resumes_without_the_average(tmp_path: Path) -> None:
    """`EMAWeightAveraging` saves the average as the weights, and the weights beside them."""
    save = SaveAt("on_train_batch_end", 20, tmp_path / "saved.ckpt")
    fit(Normed, AVERAGES["EMA"](), save)
    checkpoint = load(save.path)
    state = checkpoint["callbacks"]["DGMCallback"]["layers"]
    plain = Normed()
    for weights in (checkpoint["state_dict"], checkpoint["current_model_state"]):
        plain.load_state_dict(weights)
        dgm = DGMCallback(DGMConfig(schedule=SCHEDULE))
        trainer = make_trainer(dgm, max_steps=STEPS, max_epochs=-1)
        look = Look(dgm)
        look.on_train_start = lambda t, m, look=look: look._count("restored", m)
        trainer.callbacks.append(look)
        torch.save(checkpoint | {"state_dict": weights}, tmp_path / "one.ckpt")
        with pytest.warns(UserWarning, match="Please add the following callbacks: .*EMAWeightAveraging"):
            trainer.fit(Normed(), ResumableLoader(Normed.batches(EPOCH_STEPS)), ckpt_path=tmp_path / "one.ckpt")
        assert look.outside["restored"] == 0
    assert len(state) == 2


def test_frozen_weights_are_averaged_as_they_are() -> None:
    module, dgm, _, look = fit(TinyMLP, AVERAGES["EMA"](), config={"inactive": "frozen"})
    assert inactive(module, dgm) > 0
    assert look.outside["average"] > 0


def test_an_average_of_torch_is_masked_by_the_controller() -> None:
    """As docs/guides/resume.md shows it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), device=torch.device("cpu"))
    with DGMController(model, optimizer, DGMConfig(schedule=SCHEDULE), total_steps=STEPS) as dgm:
        for x, y in TinyMLP.batches(STEPS):
            optimizer.zero_grad()
            (model(x).squeeze(1) - y).square().mean().backward()
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
            average.update_parameters(model)
        masks = dgm.masks()
        weights = {name: average.module.get_parameter(f"{name}.weight") for name in masks}
        assert all(torch.count_nonzero(weights[name][~mask]) > 0 for name, mask in masks.items())
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        dgm.mask_copy_(average.module)
        assert all(torch.equal(weights[name], before[name].where(mask, 0.0)) for name, mask in masks.items())
        with pytest.raises(ValueError, match=r"a layer '0' of shape \(32, 16\), got no such layer in AveragedModel"):
            dgm.mask_copy_(average)
        other = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        kept = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(ValueError, match=r"'2' of shape \(16, 32\), got a weight of shape \(8, 32\)"):
            dgm.mask_copy_(other)
        assert differences(dict(other.state_dict()), kept) == [], "a refused copy is left alone"


class Longer(pl.Callback):
    """Changes the run's length in `setup`, as the FinetuningScheduler of another library."""

    def setup(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        trainer.fit_loop.max_epochs = 5


@pytest.mark.parametrize("swa", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_the_length_is_that_which_other_callbacks_give_the_run(first: bool, swa: bool) -> None:
    dgm = DGMCallback(DGMConfig(schedule=SCHEDULE))
    callbacks = [dgm, Longer()] if first else [Longer(), dgm]
    average = [StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=0.5)] if swa else []  # adds an epoch
    module = Normed()
    make_trainer(*average, *callbacks, max_epochs=2).fit(module, ResumableLoader(module.batches(EPOCH_STEPS)))
    assert dgm.schedule.total_steps == STEPS
    assert dgm.controller.steps - STEPS in ([0, 1] if swa else [0])
    assert dgm.phase == "refinement"


# --------------------------------------------------------------------------- tuners


class Tuned(TinyMLP):
    """Has a rate and a batch size to tune."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 1e-3, 2
        self.seen: list[tuple[float, int]] = []
        self.zeros: list[float] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        self.seen.append((float(self.trainer.optimizers[0].param_groups[0]["lr"]), len(batch[0])))
        self.zeros.append((self.net[0].weight == 0).float().mean().item())
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> DataLoader[Any]:
        xs, ys = (torch.cat(part) for part in zip(*TinyMLP.batches(20), strict=True))
        return DataLoader(TensorDataset(xs, ys), batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return TinyMLP.batches(2)


def tuned_trainer(*callbacks: pl.Callback, folder: Path) -> pl.Trainer:
    return make_trainer(*callbacks, max_steps=STEPS, max_epochs=-1, default_root_dir=folder)


def tune(kind: str, trainer: pl.Trainer, module: Tuned) -> None:
    if kind == "lr_find":
        Tuner(trainer).lr_find(module, num_training=30, min_lr=1e-4, max_lr=1e-2)
    else:
        Tuner(trainer).scale_batch_size(module, max_trials=3, steps_per_trial=2, init_val=2)


@pytest.mark.parametrize("kind", ["lr_find", "scale_batch_size"])
def test_fit_after_a_tuner_equals_one_with_its_result_from_the_start(kind: str, tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    module, dgm = Tuned(), DGMCallback(DGMConfig(schedule=SCHEDULE))
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = tuned_trainer(dgm, folder=tmp_path)
    tune(kind, trainer, module)
    assert differences(dict(module.state_dict()), weights) == []
    assert {type(layer).__name__ for layer in module.net} == {"Linear", "GELU"}
    assert dgm.controller is None
    assert not list(tmp_path.glob(".*.ckpt"))
    assert (module.lr, module.batch_size) != (1e-3, 2)
    assert len(module.seen) >= 6
    assert max(module.zeros) == 0.0, "the tuner's steps are dense"
    module.seen.clear()
    trainer.fit(module)

    pl.seed_everything(0, verbose=False)
    fresh, other = Tuned(), DGMCallback(DGMConfig(schedule=SCHEDULE))
    fresh.lr, fresh.batch_size = module.lr, module.batch_size
    plain = tuned_trainer(other, folder=tmp_path)
    plain.fit(fresh)
    assert module.seen == fresh.seen
    assert differences(end_of(module, dgm, trainer), end_of(fresh, other, plain)) == []
    assert_final(module, dgm)


FINDERS: dict[str, Callable[[], pl.Callback]] = {
    "lr_find": lambda: LearningRateFinder(num_training_steps=30, min_lr=1e-4, max_lr=1e-2),
    "scale_batch_size": lambda: BatchSizeFinder(max_trials=3, steps_per_trial=2, init_val=2),
}


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "ours last"])
@pytest.mark.parametrize("again", [False, True], ids=["fresh", "after another fit"])
@pytest.mark.parametrize("kind", FINDERS)
def test_finder_callbacks_leave_masks_weights_and_counters(
    kind: str, again: bool, ours_first: bool, tmp_path: Path
) -> None:
    """They train before our `on_fit_start`, and put back what they saved."""
    dgm, finder = DGMCallback(DGMConfig(schedule=SCHEDULE)), FINDERS[kind]()
    if again:
        tuned_trainer(dgm, folder=tmp_path).fit(Tuned())
    pl.seed_everything(0, verbose=False)
    module = Tuned()
    steps: list[int] = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            steps.extend([dgm.controller.steps, dgm.controller.position, trainer.global_step])
            assert inactive(pl_module, dgm) == 0
            assert dgm.density == 1.0
            assert len(pl_module.zeros) >= 6
            assert max(pl_module.zeros) == 0.0, "Lightning puts such callbacks first: their steps are dense"
            pl_module.seen.clear()

    trainer = tuned_trainer(*((dgm, finder) if ours_first else (finder, dgm)), Watch(), folder=tmp_path)
    trainer.fit(module)
    assert steps == [0, 0, 0]

    pl.seed_everything(0, verbose=False)
    fresh, other = Tuned(), DGMCallback(DGMConfig(schedule=SCHEDULE))
    fresh.lr, fresh.batch_size = module.lr, module.batch_size
    plain = tuned_trainer(other, folder=tmp_path)
    plain.fit(fresh)
    assert module.seen == fresh.seen
    assert differences(end_of(module, dgm, trainer), end_of(fresh, other, plain)) == []
    assert_final(module, dgm)


# --------------------------------------------------------------------------- tuners in mid-run


class FineTuneLearningRateFinder(LearningRateFinder):
    """As in Lightning's documentation: searches at the start of some epochs."""

    def __init__(self, milestones: tuple[int, ...], **settings: Any) -> None:
        super().__init__(early_stop_threshold=None, **{"num_training_steps": 9, "update_attr": False} | settings)
        self.milestones = milestones

    def on_fit_start(self, *args: Any) -> None:
        return

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch in self.milestones:
            self.lr_find(trainer, pl_module)


class FineTuneBatchSizeFinder(BatchSizeFinder):
    """As in Lightning's documentation, at the first epoch: later ones are cut short by lightning 2.6.6 itself."""

    def on_fit_start(self, *args: Any) -> None:
        return

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            self.scale_batch_size(trainer, pl_module)


class Watched(Tuned):
    """Counts the nonzero inactive weights that its forwards see."""

    def __init__(self, dgm: DGMCallback) -> None:
        super().__init__()
        self.dgm, self.outside = dgm, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.dgm.density < 1.0 and self.dgm.config.inactive == "zero":
            self.outside += inactive(self, self.dgm)
        return super().training_step(batch, batch_idx)


class Unvalidated(Watched):
    """With validation, `lr_find` of lightning 2.6.6 makes no step in later epochs."""

    val_dataloader = pl.LightningModule.val_dataloader


def fit_in_epochs(
    cls: type[Watched], *callbacks: pl.Callback, folder: Path, batch_size: int = 16, **config: Any
) -> tuple[Any, ...]:
    """Fit four epochs of 160 samples; with batches of 16 they begin in open windows, of 3 steps before each 4th."""
    pl.seed_everything(0, verbose=False)
    dgm = DGMCallback(DGMConfig(schedule=SCHEDULE).merged(**config))
    module = cls(dgm)
    module.batch_size = batch_size
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = make_trainer(*callbacks, dgm, max_epochs=4, default_root_dir=folder, enable_checkpointing=saves)
    trainer.fit(module)
    assert module.outside == 0
    return module, dgm, trainer


@pytest.mark.parametrize("milestones", [(0,), (1,), (0, 1, 2)])
@pytest.mark.parametrize("config", [{}, {"storage": "packed"}, {"inactive": "frozen"}], ids=str)
def test_rate_finder_in_mid_run_leaves_the_run_as_it_was(
    config: dict[str, Any], milestones: tuple[int, ...], tmp_path: Path
) -> None:
    finder = FineTuneLearningRateFinder(milestones)
    module, dgm, trainer = fit_in_epochs(Unvalidated, finder, folder=tmp_path, **config)
    fresh, other, plain = fit_in_epochs(Unvalidated, folder=tmp_path, **config)
    assert len(module.seen) == len(fresh.seen) + 9 * len(milestones)
    assert dgm.controller.steps == STEPS
    assert differences(end_of(module, dgm, trainer), end_of(fresh, other, plain)) == []
    assert dgm.run_summary() == other.run_summary()
    assert dgm.run_summary()["ended_as_asked"]


@pytest.mark.filterwarnings("ignore:the best checkpoint by .*, was saved in exploration")
def test_rate_finder_in_mid_run_leaves_what_is_known_of_the_best_checkpoint(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="train_loss", mode="max", save_on_train_epoch_end=True)
    _, dgm, _ = fit_in_epochs(Unvalidated, FineTuneLearningRateFinder((2, 3)), best, folder=tmp_path)
    (found,) = dgm.run_summary()["best_checkpoints"]
    assert "step=10" in found["path"]
    assert found["phase"] == "exploration"


def test_rate_that_is_found_in_mid_run_is_gone_on_with(tmp_path: Path) -> None:
    class Set(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.optimizers[0].param_groups[0]["lr"] = module.lr

    finder = FineTuneLearningRateFinder((1,), update_attr=True, num_training_steps=25, min_lr=1e-4, max_lr=1e-2)
    module, dgm, trainer = fit_in_epochs(Unvalidated, finder, folder=tmp_path)
    assert module.lr != 1e-3
    fresh, other, plain = fit_in_epochs(Unvalidated, Set(), folder=tmp_path)
    assert differences(end_of(module, dgm, trainer), end_of(fresh, other, plain)) == []


@pytest.mark.parametrize("first", [True, False])
def test_finder_of_a_second_fit_of_a_trainer_is_no_resume(first: bool, tmp_path: Path) -> None:
    """What it restores is at the step of the fit before, and holds no state of ours."""

    def fit_twice(*callbacks: pl.Callback) -> tuple[Any, ...]:
        module, dgm, trainer = fit_in_epochs(Unvalidated, folder=tmp_path)
        trainer.callbacks = [*callbacks, dgm] if first else [dgm, *callbacks]  # type: ignore[attr-defined]
        trainer.fit_loop.max_epochs = 8
        trainer.fit(module)
        return module, dgm, trainer

    finder = LearningRateFinder(num_training_steps=9, early_stop_threshold=None, update_attr=False)
    module, dgm, trainer = fit_twice(finder)
    fresh, other, plain = fit_twice()
    assert len(module.seen) == len(fresh.seen) + 9
    assert dgm.controller.steps == STEPS == dgm.schedule.total_steps
    assert differences(end_of(module, dgm, trainer), end_of(fresh, other, plain)) == []


@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize("size", [4, 16, 64])
def test_batch_size_finder_in_mid_run(size: int, storage: str, tmp_path: Path) -> None:
    """It goes on as a run of that batch size from the start, and the schedule follows the epochs' new length."""
    finder = FineTuneBatchSizeFinder(max_trials=1, steps_per_trial=2, init_val=size)
    config = {"storage": storage, "schedule": EstDgm(update_every=4, observe_steps=2)}
    module, dgm, trainer = fit_in_epochs(Watched, finder, folder=tmp_path, **config)
    fresh, other, plain = fit_in_epochs(Watched, folder=tmp_path, batch_size=size, **config)
    assert module.batch_size == size
    assert trainer.global_step == plain.global_step == dgm.controller.steps
    assert dgm.density == other.density
    assert dgm.run_summary()["ended_as_asked"]
    if size == 16:
        assert differences(end_of(module, dgm, trainer), end_of(fresh, other, plain)) == []
