"""The end of a run against what was asked for: said on screen, in `run_summary` and in energy.json."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, EarlyStopping, ModelCheckpoint
from torch import nn

from helpers.models import NO_VALIDATION_LOADER, SCHEDULE, Batches, TinyMLP, assert_final, make_trainer
from lightning_estdgm import DGMCallback, DGMConfig, EnergyMonitor, EstDgm, Units

pytestmark = pytest.mark.filterwarnings(NO_VALIDATION_LOADER)

STEPS, EPOCH = 20, 4  # of helpers.models.SCHEDULE
NOT_EMPTY = "ignore:Checkpoint directory .* exists and is not empty"


class Scored(TinyMLP):
    """Logs a loss that is chosen by the test, from the steps done."""

    def __init__(self, score: Any) -> None:
        super().__init__()
        self.score = score

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", float(self.score(self.trainer)))


def callback(**settings: Any) -> DGMCallback:
    return DGMCallback(DGMConfig(SCHEDULE, Units(size=1), backend="dense", **settings))


def fit(score: Any, *callbacks: pl.Callback, **trainer: Any) -> pl.Trainer:
    checkpoint = trainer.pop("ckpt_path", None)
    made = make_trainer(*callbacks, **{"max_epochs": STEPS // EPOCH} | trainer)
    made.fit(Scored(score), TinyMLP.batches(EPOCH), TinyMLP.batches(1), ckpt_path=checkpoint)
    return made


def density_of(path: str, dgm: DGMCallback) -> Any:
    """Return the share of the masked weights that are not zero in a checkpoint."""
    weights = torch.load(path, weights_only=True)["state_dict"]
    masked = [weights[f"{name}.weight"] for name in dgm.masks()]
    return pytest.approx(sum(int((w != 0).sum()) for w in masked) / sum(w.numel() for w in masked))


def test_a_run_that_early_stopping_ends_in_exploration_says_so(tmp_path: Path) -> None:
    dgm, monitor = callback(), EnergyMonitor(["cpu-estimate"])
    stop = EarlyStopping("val_loss", patience=1)
    message = r"ended at position 8 of 20 of the schedule, in consolidation, at density 0\.30; asked for was 0\.1"
    with pytest.warns(UserWarning, match=message):
        fit(lambda trainer: 1.0, dgm, monitor, stop, default_root_dir=tmp_path)
    assert dgm.run_summary()["ended_as_asked"] is False
    (written,) = tmp_path.rglob("energy.json")
    assert json.loads(written.read_text())["method"]["ended_as_asked"] is False


def test_a_density_that_a_pattern_does_not_meet_is_not_taken_for_a_run_cut_short() -> None:
    """Constant fan-in keeps 1 of 16 inputs of each row, and 1.6 were asked for."""
    dgm = DGMCallback.from_preset("srigl", 0.1, update_every=5)
    with pytest.warns(UserWarning, match=r"ended at position 20 of 20 .* asked for was 0\.1.* as small as these"):
        fit(lambda trainer: 1.0, dgm)
    assert dgm.run_summary()["ended_as_asked"] is False


class NeverFinite(TinyMLP):
    """Loses every gradient after the first, and leaves such steps out."""

    def on_after_backward(self) -> None:
        if self.trainer.global_step:
            for weight in self.parameters():
                weight.grad.fill_(torch.inf)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.trainer.global_step:
            for weight in self.parameters():
                weight.grad.zero_()


@pytest.mark.filterwarnings("ignore:.*a gradient was NaN or infinite:RuntimeWarning")
def test_a_run_whose_gradients_were_never_finite_is_told_so() -> None:
    message = r"ended at position 20 of 20 .* at density 0\.70; .* no step since had finite gradients"
    with pytest.warns(UserWarning, match=message):
        make_trainer(callback(), max_epochs=STEPS // EPOCH).fit(NeverFinite(), TinyMLP.batches(EPOCH))


def test_a_run_that_ends_as_asked_says_nothing() -> None:
    dgm = callback()
    fit(lambda trainer: 1.0, dgm)
    assert dgm.run_summary()["ended_as_asked"] is True
    assert dgm.run_summary()["best_checkpoints"] == []


def test_a_best_checkpoint_of_a_dense_phase_is_named_with_its_density(tmp_path: Path) -> None:
    dgm = callback()
    best = ModelCheckpoint(tmp_path, monitor="val_loss", mode="min")
    with pytest.warns(UserWarning, match=r"the best checkpoint by 'val_loss', .*\.ckpt, was saved in exploration, at"):
        fit(lambda trainer: trainer.global_step, dgm, best, enable_checkpointing=True)
    (found,) = dgm.run_summary()["best_checkpoints"]
    assert found["path"] == best.best_model_path
    assert (found["monitor"], found["phase"]) == ("val_loss", "exploration")
    assert found["density"] == density_of(best.best_model_path, dgm)


def test_a_best_checkpoint_at_the_final_density_is_listed_without_a_warning(tmp_path: Path) -> None:
    dgm = callback()
    fit(
        lambda trainer: -trainer.global_step,
        dgm,
        ModelCheckpoint(tmp_path, monitor="val_loss"),
        enable_checkpointing=True,
    )
    (found,) = dgm.run_summary()["best_checkpoints"]
    assert found["density"] == pytest.approx(dgm.density)


def test_a_best_checkpoint_that_is_written_anew_under_one_name_has_its_own_density(tmp_path: Path) -> None:
    dgm, best = callback(), ModelCheckpoint(tmp_path, "best", monitor="val_loss")
    fit(lambda trainer: -trainer.global_step, dgm, best, enable_checkpointing=True)
    assert best.best_model_path == str(tmp_path / "best.ckpt")
    (found,) = dgm.run_summary()["best_checkpoints"]
    assert (found["density"], found["phase"]) == (density_of(best.best_model_path, dgm), "refinement")


@pytest.mark.filterwarnings(NOT_EMPTY)
@pytest.mark.parametrize("resumed", ["the best file", "a later file"])
def test_a_best_checkpoint_of_before_a_resume_keeps_its_density(tmp_path: Path, resumed: str) -> None:
    def go(path: str | None = None) -> tuple[DGMCallback, ModelCheckpoint, ModelCheckpoint]:
        dgm, best = callback(), ModelCheckpoint(tmp_path, monitor="val_loss")
        later = ModelCheckpoint(tmp_path, "later", every_n_train_steps=3 * EPOCH)
        with pytest.warns(UserWarning, match=r"the best checkpoint by 'val_loss', .* was saved in exploration, at"):
            fit(lambda trainer: trainer.global_step, dgm, best, later, enable_checkpointing=True, ckpt_path=path)
        return dgm, best, later

    _, begun, later = go()
    dgm, best, _ = go(begun.best_model_path if resumed == "the best file" else later.best_model_path)
    assert best.best_model_path == begun.best_model_path
    (found,) = dgm.run_summary()["best_checkpoints"]
    assert (found["density"], found["phase"]) == (density_of(best.best_model_path, dgm), "exploration")


def fit_twice(tmp_path: Path, first: list[pl.Callback], dgm: DGMCallback) -> ModelCheckpoint:
    """Run two fits of one Trainer; the best file is of the first."""
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = fit(lambda trainer: trainer.global_step, *first, best, enable_checkpointing=True)
    trainer.callbacks = [dgm, best]
    trainer.fit_loop.max_epochs *= 2
    trainer.fit(trainer.lightning_module, TinyMLP.batches(EPOCH), TinyMLP.batches(1))
    return best


@pytest.mark.filterwarnings(NOT_EMPTY, "ignore:the best checkpoint by 'val_loss', .* was saved in exploration")
def test_a_best_checkpoint_of_an_earlier_fit_keeps_its_density(tmp_path: Path) -> None:
    dgm = callback()
    best = fit_twice(tmp_path, [dgm], dgm)
    (found,) = dgm.run_summary()["best_checkpoints"]
    assert (found["density"], found["phase"]) == (density_of(best.best_model_path, dgm), "exploration")


@pytest.mark.filterwarnings(NOT_EMPTY)
def test_a_best_checkpoint_of_a_fit_without_the_callback_has_no_known_density(tmp_path: Path) -> None:
    dgm = callback()
    with pytest.warns(UserWarning, match=r"best checkpoint by 'val_loss', .* was saved before this fit, and at what"):
        best = fit_twice(tmp_path, [], dgm)
    unknown = {"path": best.best_model_path, "monitor": "val_loss", "density": None, "phase": None}
    assert dgm.run_summary()["best_checkpoints"] == [unknown]


def test_density_and_phase_can_be_monitored_and_name_files(tmp_path: Path) -> None:
    dgm = callback()
    sparsest = ModelCheckpoint(
        tmp_path, "{step}-{dgm/density:.2f}", monitor="dgm/density", mode="min", auto_insert_metric_name=False
    )
    trainer = fit(lambda trainer: 1.0, dgm, sparsest, enable_checkpointing=True)
    assert Path(sparsest.best_model_path).name == f"16-{float(sparsest.best_model_score):.2f}.ckpt"
    assert float(trainer.callback_metrics["dgm/density"]) == pytest.approx(dgm.density)
    assert float(trainer.callback_metrics["dgm/phase"]) == 2.0


def test_the_best_at_the_final_density_by_the_documented_pattern(tmp_path: Path) -> None:
    """As docs/guides/checkpoints.md has it: a loss that only counts once the density is the final one."""

    def final_loss(trainer: pl.Trainer) -> float:
        density = float(trainer.callback_metrics.get("dgm/density", 1.0))
        return trainer.global_step if density < 0.11 else float("inf")

    dgm, best = callback(), ModelCheckpoint(tmp_path, monitor="val_loss")
    fit(final_loss, dgm, best, enable_checkpointing=True)
    (found,) = dgm.run_summary()["best_checkpoints"]
    assert found["density"] == pytest.approx(dgm.density)


class Critic(pl.LightningModule):
    """A critic that steps in every batch and a generator that steps in every fifth."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.critic = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
        self.densities: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, critic = self.optimizers()
        critic.zero_grad()
        self.manual_backward((self.critic(self.generator(batch).detach()) - self.critic(batch)).mean().square())
        critic.step()
        if batch_idx % 5 == 4:
            generator.zero_grad()
            self.manual_backward(-self.critic(self.generator(batch)).mean())
            generator.step()

    def on_train_batch_end(self, *args: Any) -> None:
        self.densities.append(self.trainer.callbacks[0].density)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.01) for part in (self.generator, self.critic)]


def test_with_a_critic_that_steps_more_often_the_schedule_spans_the_run() -> None:
    dgm, module = DGMCallback(DGMConfig(EstDgm(), Units(size=1), backend="dense")), Critic()
    trainer = make_trainer(dgm, max_steps=600, max_epochs=-1)
    trainer.fit(module, Batches(torch.randn(4, 16) for _ in range(1000)))
    batches = len(module.densities)
    assert batches == 500  # five of the critic and one of the generator are six steps
    # consolidation begins at 0.15 of the run, refinement at 0.50
    assert module.densities[int(0.13 * batches)] > 0.5
    assert 0.15 < module.densities[int(0.45 * batches)] < 0.35
    assert module.densities[-1] == pytest.approx(0.10, abs=0.01)


class Embedded(TinyMLP):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3)
        self.experts = nn.Parameter(torch.randn(2, 3, 5))


def test_weights_in_no_known_layer_are_counted_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    module = Embedded()
    make_trainer(callback(), max_epochs=1).fit(module, TinyMLP.batches(STEPS))
    text = " ".join(capsys.readouterr().out.split())
    total = sum(p.numel() for p in module.parameters())
    assert f"{21 + 30} of {total} trainable weights are in no linear or convolution layer, and stay dense:" in text
    assert "table.weight" in text
    assert "experts" in text


class Tuned(pl.LightningModule):
    """A backbone that `BackboneFinetuning` freezes at first, and a head."""

    def __init__(self, *head: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Sequential(*(nn.Linear(16, width) for width in head))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.head(self.backbone(batch[0])).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.01)


def tuned(*head: int, thawed: int = 2, dgm: DGMCallback | None = None) -> tuple[Tuned, DGMCallback]:
    dgm, module = dgm or callback(), Tuned(*head)
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=thawed, lambda_func=lambda epoch: 1.0)
    make_trainer(thaw, dgm, max_epochs=STEPS // EPOCH).fit(module, TinyMLP.batches(EPOCH))
    return module, dgm


@pytest.mark.filterwarnings("ignore:the run goes on dense")
@pytest.mark.parametrize("head", [(16, 4), (4,)], ids=["a head of two layers", "a head of one"])
def test_a_backbone_that_is_thawed_in_mid_run_is_masked_from_the_next_update_on(
    head: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        module, dgm = tuned(*head)
    assert "1 layers (backbone.0) have begun to train, and are masked from step" in caplog.text
    assert_final(module, dgm)
    assert dgm.masks().keys() == ({"backbone.0", "head.0"} if len(head) > 1 else {"backbone.0"})
    assert dgm.run_summary()["thawed_and_dense"] == []
    assert dgm.run_summary()["ended_as_asked"] is True


def test_a_backbone_that_is_thawed_after_the_last_update_is_named() -> None:
    with pytest.warns(UserWarning, match=r"1 layers \(backbone\.0\) have begun to train in mid-run and stay dense"):
        _, dgm = tuned(16, 4, thawed=4)
    assert dgm.run_summary()["thawed_and_dense"] == ["backbone.0"]


def test_a_backbone_that_is_thawed_under_packed_storage_is_named_with_the_way_out() -> None:
    dgm = DGMCallback(DGMConfig(SCHEDULE, Units(size=1), storage="packed"))
    with pytest.warns(UserWarning, match=r"1 layers \(backbone\.0\) .*'packed' has masks .* storage='dense' does\. To"):
        tuned(16, 4, dgm=dgm)
    assert dgm.run_summary()["thawed_and_dense"] == ["backbone.0"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_backbone_that_a_resumed_run_leaves_frozen_is_named(tmp_path: Path) -> None:
    """`BackboneFinetuning` of lightning 2.6.6 freezes it again, and thaws it in one epoch only, which is past."""

    def go(folder: str, *callbacks: pl.Callback, checkpoint: Path | None = None) -> Tuned:
        frozen = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0)
        keep = ModelCheckpoint(tmp_path / folder, every_n_train_steps=3 * EPOCH)
        settings = {"max_epochs": STEPS // EPOCH, "enable_checkpointing": True}
        trainer = make_trainer(frozen, keep, *callbacks, callback(), **settings)
        trainer.fit(module := Tuned(16, 4), TinyMLP.batches(EPOCH), ckpt_path=checkpoint, weights_only=False)
        return module

    class Thaw(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.requires_grad_(True)

    go("straight")
    (path,) = (tmp_path / "straight").iterdir()
    with pytest.warns(UserWarning, match=r"1 layers \(backbone\.0\) trained when the checkpoint was saved and take no"):
        resumed = go("resumed", checkpoint=path)
    assert not resumed.backbone[0].weight.requires_grad  # theirs: where this is mended, there is nothing to say
    go("thawed", Thaw(), checkpoint=path)  # a warning is an error


def test_nothing_to_mask_but_what_is_thawed_too_late_is_said_at_both_ends() -> None:
    with (
        pytest.warns(UserWarning, match="nothing was masked in this run"),
        pytest.warns(
            RuntimeWarning, match=r"the run goes on dense.*1 layers \(backbone.0\) are masked once they train"
        ),
        pytest.warns(UserWarning, match="stay dense"),
    ):
        tuned(4, thawed=4)


class NormAlone(pl.LightningModule):
    """Linear layers that are frozen, as under peft's LoHa or IA3, up to a step; a norm trains."""

    def __init__(self, thawed: int, *, held: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)).requires_grad_(False)
        self.net[1].requires_grad_(True)
        self.thawed, self.held = thawed, held

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == self.thawed:
            self.net.requires_grad_(True)
            if not self.held:
                self.trainer.optimizers[0].add_param_group({"params": [*self.net[0].parameters()]})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters() if self.held else self.net[1].parameters(), 0.01)


def norm_alone(thawed: int = -1, *, held: bool) -> tuple[NormAlone, DGMCallback]:
    dgm, module = callback(), NormAlone(thawed, held=held)
    with pytest.warns(RuntimeWarning, match=r"the run goes on dense.*2 layers \(net\.0, net\.2\) are masked once they"):
        make_trainer(dgm, max_epochs=STEPS // EPOCH).fit(module, TinyMLP.batches(EPOCH))
    return module, dgm


@pytest.mark.parametrize("held", [True, False], ids=["held by the optimizer", "not held"])
def test_a_run_whose_every_layer_is_frozen_says_that_nothing_is_masked(
    held: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="nothing was masked in this run"):
        _, dgm = norm_alone(held=held)
    assert dgm.run_summary()["ended_as_asked"] is False
    assert "its weight takes no gradient" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("held", [True, False], ids=["held by the optimizer", "added to it"])
def test_the_first_layer_of_a_run_that_is_thawed_in_mid_run_is_masked(held: bool) -> None:
    module, dgm = norm_alone(7, held=held)
    assert_final(module, dgm)
    assert dgm.masks().keys() == {"net.0"}  # the other is the output head
    assert dgm.run_summary()["ended_as_asked"] is True


class Changing(TinyMLP):
    """Has its layers changed before step 9, in mid-epoch; its optimizer is given what is new."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 9 and (new := self.change(self.net)):
            self.trainer.optimizers[0].add_param_group({"params": new})


def other_layer(net: nn.Sequential) -> list[nn.Parameter]:
    net[2] = nn.Linear(16, 16)
    return [*net[2].parameters()]


def other_parameter(net: nn.Sequential) -> list[nn.Parameter]:
    net[2].weight = nn.Parameter(torch.randn(16, 16))
    return [net[2].weight]


def other_parameter_that_no_optimizer_holds(net: nn.Sequential) -> None:
    net[2].weight = nn.Parameter(torch.randn(16, 16))


def parametrization(net: nn.Sequential) -> list[nn.Parameter]:
    return [*nn.utils.parametrizations.weight_norm(net[2]).parametrizations.weight.parameters()]


def further_layer(net: nn.Sequential) -> list[nn.Parameter]:
    net.insert(0, new := nn.Linear(16, 16))
    return [*new.parameters()]


@pytest.mark.parametrize(
    ("change", "storage", "name"),
    [
        (other_layer, "dense", "net.2"),
        (other_layer, "packed", "net.2"),
        (other_parameter, "dense", "net.2"),
        (other_parameter_that_no_optimizer_holds, "dense", "net.2"),
        (parametrization, "dense", "net.2"),
        (further_layer, "dense", "net.0"),
        (further_layer, "packed", "net.0"),
    ],
)
def test_layers_that_are_replaced_or_put_in_are_named(change: Any, storage: Any, name: str) -> None:
    torch.manual_seed(0)
    dgm = DGMCallback(DGMConfig(SCHEDULE, Units(size=1), storage=storage))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make_trainer(dgm, max_epochs=STEPS // EPOCH).fit(module := Changing(change), TinyMLP.batches(EPOCH))
    said = "\n".join(str(warning.message) for warning in seen)
    assert f"1 layers ({name}) were put in or replaced since the fit began" in said
    assert (f"asked for was 0.10 at the end. Replaced layers are dense: {name}" in said) is (
        change is not further_layer
    )
    assert module.get_submodule(name).weight.count_nonzero() > 0.2 * 16 * 16
    assert dgm.run_summary()["replaced_and_dense"] == [name]
    assert dgm.density == pytest.approx(0.10 if change is further_layer else 0.55, abs=0.01)  # of two layers
    assert dgm.run_summary()["ended_as_asked"] is False


def spectral_norm(net: nn.Sequential) -> None:
    nn.utils.parametrizations.spectral_norm(net[2])


def orthogonal(net: nn.Sequential) -> None:
    nn.utils.parametrizations.orthogonal(net[2], "weight", "cayley")


@pytest.mark.filterwarnings("ignore:.*(replaced|Replaced)")
@pytest.mark.parametrize("change", [spectral_norm, parametrization, orthogonal])
def test_a_sparse_layer_that_is_parametrized_in_mid_run_computes_with_the_whole_new_weight(change: Any) -> None:
    class Compared(Changing):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.trainer.global_step > 9:
                layer, x = self.net[2].eval(), torch.randn(8, 16)  # no power iteration
                wanted = nn.functional.linear(x, layer.weight, layer.bias)
                torch.testing.assert_close(layer(x), wanted, equal_nan=True)  # weight_norm's, of a row without units
                torch.testing.assert_close(copy.deepcopy(layer)(x), wanted, equal_nan=True)
                with pytest.raises(RuntimeError, match="parametrized modules"):  # as torch has it
                    pickle.dumps(layer)
                layer.train()

    dgm, module = DGMCallback(DGMConfig(SCHEDULE, Units(size=1), backend="native")), Compared(change)
    make_trainer(dgm, max_epochs=STEPS // EPOCH).fit(module, TinyMLP.batches(EPOCH))
    assert dgm.run_summary()["replaced_and_dense"] == ["net.2"]
    assert type(module.net[2]).__name__ == "ParametrizedLinear"
    nn.utils.parametrize.remove_parametrizations(module.net[2], "weight")
    assert type(module.net[2]) is nn.Linear


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm")
@pytest.mark.parametrize("change", [spectral_norm, parametrization, lambda net: nn.utils.weight_norm(net[2])])
def test_a_packed_layer_refuses_a_parametrization_with_the_way_out(change: Any) -> None:
    dgm = DGMCallback(DGMConfig(SCHEDULE, Units(size=1), storage="packed"))
    with pytest.raises((AttributeError, RuntimeError), match=r"Register a parametrization.* before the fit"):
        make_trainer(dgm, max_epochs=STEPS // EPOCH).fit(Changing(change), TinyMLP.batches(EPOCH))


def other_head(net: nn.Sequential) -> list[nn.Parameter]:
    net[4] = nn.Linear(16, 1)
    return [*net[4].parameters()]


def frozen_layer(net: nn.Sequential) -> None:
    net.insert(0, nn.Linear(16, 16).requires_grad_(False))


def other_values(net: nn.Sequential) -> None:
    net[2].reset_parameters()


def wrapped(net: nn.Sequential) -> None:
    net[2] = nn.Sequential(net[2])


@pytest.mark.parametrize("change", [other_head, frozen_layer, other_values, wrapped])
def test_other_changes_of_a_model_are_not_taken_for_a_replaced_layer(change: Any) -> None:
    dgm = callback()
    make_trainer(dgm, max_epochs=STEPS // EPOCH).fit(Changing(change), TinyMLP.batches(EPOCH))
    assert dgm.run_summary()["replaced_and_dense"] == []
    assert dgm.run_summary()["ended_as_asked"] is True


def test_an_old_style_spectral_norm_is_not_taken_for_a_frozen_layer(recwarn: Any) -> None:
    class Normed(TinyMLP):
        def __init__(self) -> None:
            super().__init__()
            for _ in range(6):
                self.net.insert(0, nn.utils.spectral_norm(nn.Linear(16, 16)))

    make_trainer(DGMCallback(), max_epochs=1).fit(Normed(), TinyMLP.batches(16))
    assert not [w for w in recwarn if "are frozen" in str(w.message)]
