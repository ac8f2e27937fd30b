"""`DGMCallback()` with its defaults on every kind of model, optimizer, scheduler and precision, in a real Trainer."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F

from helpers import models
from helpers.expert_models import BmmExperts
from helpers.models import (
    GAN,
    MLP,
    NO_VALIDATION_LOADER,
    Batches,
    TinyMLP,
    assert_final,
    assert_masked,
    endless_loader,
    leftovers,
    make_trainer,
    weight_masks,
)
from lightning_estdgm import DGMCallback, DGMConfig
from lightning_estdgm.callbacks._internal.schedule_clock import ScheduleClock
from lightning_estdgm.config import Selection, Units
from lightning_estdgm.method._schedules import Plan, SteppedSchedule
from lightning_estdgm.method._update_rule import UpdateRule
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.autotune._choice import BackendSelector
from lightning_estdgm.sparse.backends._protocol import get_backend

pytestmark = pytest.mark.filterwarnings(NO_VALIDATION_LOADER)

EPOCHS, BATCHES = 4, 12


def fp16(**settings: Any) -> dict[str, Any]:
    """A GradScaler on the CPU."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **settings))]}


@dataclass(frozen=True)
class Case:
    model: str
    optimizer: str = "adamw"
    scheduler: str | None = None
    accumulate: int | dict[int, int] = 1
    trainer: dict[str, Any] | Callable[[], dict[str, Any]] = field(default_factory=dict)
    needs: str | None = None

    @property
    def label(self) -> str:
        settings = "fp16" if callable(self.trainer) else "-".join(map(str, self.trainer.values()))
        parts = (self.model, self.optimizer, self.scheduler, f"acc{self.accumulate}", settings)
        return "-".join(str(p) for p in parts if p)


NORM = {"gradient_clip_val": 0.5}
VALUE = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
CASES = [
    Case("MLP", "sgd", "onecycle", 3, NORM),
    Case("MLP", "adamw_fused", "cosine", 1, {"precision": "bf16-mixed"}),
    Case("MLP", "adamw", None, 3, lambda: fp16() | NORM),
    Case("MLP", "rmsprop", "plateau", {0: 1, 2: 3}, {"precision": "64-true"}),
    Case("TinyMLP", "adagrad", "onecycle", {0: 3, 1: 2}, VALUE),
    Case("TinyMLP", "lbfgs", None, 1),
    Case("TinyMLP", "adafactor", "plateau", 1, {"precision": "bf16-true"}),
    Case("TinyMLP", "adamw_fused", None, 3, fp16),
    Case("ConvNet", "sgd", "cosine", 3, VALUE | {"precision": "bf16-mixed"}),
    Case("ConvNet", "adamw", "onecycle", 1, NORM | {"precision": "64-true"}),
    Case("Encoder", "adamw", "onecycle", 3, NORM | {"precision": "bf16-true"}),
    Case("Encoder", "rmsprop", None, 1, lambda: fp16() | VALUE),
    Case("GPT2", "adamw", "onecycle", 1, NORM | {"precision": "bf16-mixed"}, needs="transformers"),
    Case("GPT2", "adafactor", "cosine", 3, needs="transformers"),
    Case("ViT", "adamw_fused", "plateau", 1, VALUE, needs="transformers"),
    Case("GCN", "adagrad", "cosine", {0: 2, 3: 1}, NORM, needs="torch_geometric"),
]


def run(case: Case, *callbacks: pl.Callback) -> tuple[Any, pl.Trainer]:
    pl.seed_everything(0, verbose=False)
    cls = getattr(models, case.model)
    module = cls(optimizer=case.optimizer, scheduler=case.scheduler)
    settings = dict(case.trainer() if callable(case.trainer) else case.trainer)
    if isinstance(case.accumulate, dict):
        callbacks = (*callbacks, GradientAccumulationScheduler(dict(case.accumulate)))
    else:
        settings["accumulate_grad_batches"] = case.accumulate
    trainer = make_trainer(*callbacks, max_epochs=EPOCHS, **settings)
    batches = cls.batches(BATCHES)
    trainer.fit(module, batches, Batches(batches[:2]))
    return module, trainer


@pytest.mark.filterwarnings("ignore:no mask unit finer than 16 x 16")  # in float16 and float64 none is
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_defaults_work_and_leave_the_users_optimizer_alone(case: Case) -> None:
    if case.needs:
        pytest.importorskip(case.needs)
    plain, plain_trainer = run(case)
    callback = DGMCallback()
    module, trainer = run(case, callback)

    assert_final(module, callback)
    factors = [case.accumulate] * EPOCHS
    if isinstance(case.accumulate, dict):
        factors = [next(k for e, k in sorted(case.accumulate.items())[::-1] if epoch >= e) for epoch in range(EPOCHS)]
    steps = sum(-(-BATCHES // k) for k in factors)
    assert callback.schedule.total_steps == steps
    assert callback.controller.steps == module.optimizer_steps == plain.optimizer_steps == steps == trainer.global_step
    assert callback.schedule(callback.controller.position - 1).phase == "refinement"
    assert module.rates == plain.rates
    assert module.group_keys == plain.group_keys
    assert list(module.state_dict()) == list(plain.state_dict())
    assert [(p.shape, p.dtype) for p in module.parameters()] == [(p.shape, p.dtype) for p in plain.parameters()]
    mine, theirs = trainer.optimizers[0].state_dict(), plain_trainer.optimizers[0].state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert {k: sorted(v) for k, v in mine["state"].items()} == {k: sorted(v) for k, v in theirs["state"].items()}
    for weight, mask in weight_masks(module, callback).values():
        for value in trainer.optimizers[0].state[weight].values():
            if isinstance(value, Tensor) and value.shape == weight.shape:  # such as momentum
                assert torch.count_nonzero(value[~mask]) == 0
    if case.scheduler and case.scheduler != "plateau":
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        assert scheduler.last_epoch == (steps if case.scheduler == "onecycle" else EPOCHS)
    assert 0.1 < callback.flops_ratio < 0.75
    assert callback.controller.explored > callback.density
    assert leftovers(module, trainer) == []


def test_bf16_true_by_the_compiled_operator() -> None:
    """Weights, products and optimizer state in bfloat16: as by the oracle, up to what rounding leaves."""
    topology = BlockTopology.from_mask(torch.ones(2, 2, dtype=torch.bool), 16)
    if reason := get_backend("native").unsupported(torch.device("cpu"), torch.bfloat16, topology):
        pytest.skip(f"native {reason}")
    outputs: dict[str, list[float]] = {}
    for backend in ("native", "reference"):
        pl.seed_everything(0, verbose=False)
        module, callback = (
            MLP(optimizer="adamw"),
            DGMCallback(DGMConfig(units=Units(size=16), update_rule=UpdateRule(keep="magnitude"), backend=backend)),
        )
        kept = outputs[backend] = []
        watch = module.register_forward_hook(lambda _, x, y, kept=kept: kept.append(y.float().norm().item()))
        trainer = make_trainer(callback, max_epochs=2, precision="bf16-true", accumulate_grad_batches=2)
        trainer.fit(module, MLP.batches(BATCHES))
        assert {d.backend for d in callback.decisions() if d.masked} == {backend}
        watch.remove()
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert callback.density < 0.2
        assert_final(module, callback)
        assert leftovers(module, trainer) == []
    assert outputs["native"] == pytest.approx(outputs["reference"], rel=0.05)
    assert outputs["native"][0] != pytest.approx(outputs["native"][-BATCHES], rel=0.05)  # the same batch, later


def as_dense(case: Any, names: Sequence[str]) -> dict[str, float]:
    """Seconds of a machine where nothing is faster than dense."""
    return dict.fromkeys(names, 1.0)


def test_which_layers_are_masked_and_by_what_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BackendSelector.__init__.__kwdefaults__, "measure", as_dense)
    expected = {
        "MLP": {"net.0": 1, "net.2": 1, "net.4": 0},
        "TinyMLP": {"net.0": 1, "net.2": 1, "net.4": 0},
        "ConvNet": {"features.0": 1, "features.3": 1, "head": 0},
        "Encoder": {
            f"encoder.layers.{i}.{name}": 1
            for i in range(2)
            for name in ("self_attn", "self_attn.out_proj", "linear1", "linear2")
        }
        | {"head": 0},
    }
    for name, blocks in expected.items():
        callback = DGMCallback()
        cls = getattr(models, name)
        make_trainer(callback, max_steps=5, max_epochs=-1).fit(cls(), cls.batches(5))
        assert {d.name: d.block_size for d in callback.decisions()} == blocks


def test_hugging_face_and_pyg_layers_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BackendSelector.__init__.__kwdefaults__, "measure", as_dense)
    pytest.importorskip("transformers")
    pytest.importorskip("torch_geometric")
    expected = {
        "GPT2": {"attn.c_attn": 1, "attn.c_proj": 1, "mlp.c_fc": 1, "mlp.c_proj": 1, "lm_head": 0},
        "GCN": {"first.lin": 1, "second.lin": 1, "head.lin": 0},
    }
    for name, blocks in expected.items():
        callback = DGMCallback()
        cls = getattr(models, name)
        make_trainer(callback, max_steps=5, max_epochs=-1).fit(cls(), cls.batches(5))
        found = {d.name.removeprefix("model.").removeprefix("transformer.h.0."): d for d in callback.decisions()}
        assert {d: found[d].block_size for d in found} == blocks
    why = {d.name: d.why for d in callback.decisions()}
    assert "output head" in why["head.lin"]


def test_parameters_outside_every_optimizer_do_not_matter() -> None:
    """A teacher that nobody trains, with gradients on by default, is an ordinary LightningModule."""

    class Distilled(TinyMLP):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))

        def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            with torch.no_grad():
                target = self.teacher(batch[0]).squeeze(-1)
            return F.mse_loss(self(batch[0]).squeeze(-1), target)

        def parameter_groups(self) -> Any:
            return self.net.parameters()

    callback, module = DGMCallback(), Distilled()
    teacher = {k: v.clone() for k, v in module.teacher.state_dict().items()}
    make_trainer(callback, max_steps=8, max_epochs=-1).fit(module, TinyMLP.batches(8))
    assert_final(module, callback)
    assert not any(d.masked for d in callback.decisions() if d.name.startswith("teacher"))
    for name, value in module.teacher.state_dict().items():
        assert torch.equal(value, teacher[name])


# --------------------------------------------------------------------------- fp16


@pytest.mark.filterwarnings("ignore:step .* a gradient was NaN or infinite:RuntimeWarning")
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_fused"])
def test_steps_skipped_by_the_grad_scaler_are_not_counted(optimizer: str) -> None:
    batches = TinyMLP.batches(40)
    for i in (7, 8, 23):  # float16 overflows
        batches[i] = (batches[i][0] * 1e5, batches[i][1])
    callback, module = DGMCallback(), TinyMLP(optimizer=optimizer)
    trainer = make_trainer(callback, max_epochs=1, **fp16(init_scale=1024.0))
    trainer.fit(module, batches)
    assert trainer.global_step == 40
    assert callback.controller.steps == module.optimizer_steps == 37
    assert_final(module, callback)


@pytest.mark.filterwarnings("ignore:step .* a gradient was NaN or infinite:RuntimeWarning")
def test_window_does_not_depend_on_the_grad_scale() -> None:
    """Scores are of unscaled gradients, also where a fused optimizer unscales inside its step."""

    class Look(TinyMLP):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.watched.controller.steps == 3:
                self.window = self.watched.state_dict()["layers"]["net.0"]["window"]["gradient"]

    windows = []
    for optimizer, scale in itertools.product(("adamw", "adamw_fused"), (1.0, 1024.0)):
        pl.seed_everything(0, verbose=False)
        module = Look(optimizer=optimizer)
        module.watched = DGMCallback()
        make_trainer(module.watched, max_epochs=1, **fp16(init_scale=scale)).fit(module, TinyMLP.batches(20))
        windows.append(module.window)
    assert windows[0].abs().max() > 0
    for window in windows[1:]:
        torch.testing.assert_close(window, windows[0], rtol=1e-2, atol=1e-3)


# --------------------------------------------------------------------------- manual optimization


@pytest.mark.parametrize("plain_backward", [False, True], ids=["manual_backward", "loss.backward"])
@pytest.mark.parametrize("toggle", [False, True], ids=["untoggled", "toggled"])
def test_gan(toggle: bool, plain_backward: bool) -> None:
    module, callback = GAN(toggle=toggle, plain_backward=plain_backward), DGMCallback()
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(module, TinyMLP.batches(20))
    assert_final(module, callback)
    assert module.optimizer_steps == [40, 40]
    assert callback.controller.steps == 40
    assert callback.schedule.total_steps == 40
    # Toggled, the discriminator is frozen while the generator steps, whose last layer is its head then.
    masked = {"generator.0", "discriminator.0"} | (set() if toggle else {"generator.2"})
    assert {d.name for d in callback.decisions() if d.masked} == masked
    assert callback.controller.updates > 20
    assert leftovers(module, trainer) == []


@pytest.mark.filterwarnings("ignore:step .* a gradient was NaN or infinite:RuntimeWarning")
def test_gan_with_a_grad_scaler() -> None:
    module, callback = GAN(), DGMCallback()
    make_trainer(callback, max_epochs=2, **fp16(init_scale=1024.0)).fit(module, TinyMLP.batches(20))
    assert module.optimizer_steps == [40, 40]
    assert callback.controller.steps == 40
    assert_final(module, callback)


def test_gan_run_of_max_steps_reaches_the_end_of_its_schedule() -> None:
    """Lightning counts every optimizer's step in manual optimization."""
    module, callback = GAN(), DGMCallback()
    make_trainer(callback, max_steps=80, max_epochs=-1).fit(module, TinyMLP.batches(20))
    assert module.optimizer_steps == [40, 40]
    assert callback.schedule.total_steps == callback.controller.steps == 40
    assert_final(module, callback)


@pytest.mark.parametrize("plain_backward", [False, True], ids=["manual_backward", "loss.backward"])
@pytest.mark.parametrize("toggle", [False, True], ids=["untoggled", "toggled"])
def test_gan_layers_are_observed_with_the_gradient_of_their_own_step(toggle: bool, plain_backward: bool) -> None:
    """Not with what the generator's loss, or the batch before, has left in `grad`."""
    callback = DGMCallback(DGMConfig(schedule=window_schedule()))
    expected: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}

    class Recorded(GAN):
        def _one(self, optimizer: Any, index: int, loss: Callable[[], Tensor]) -> None:
            if callback.controller.steps == 9:
                name, net = (("generator.0", self.generator), ("discriminator.0", self.discriminator))[index]
                expected[name] = torch.autograd.grad(loss(), net[0].weight)[0]
            super()._one(optimizer, index, loss)

    class Look(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            if callback.controller.steps == 10:
                for name in expected:
                    window = callback.state_dict()["layers"][name]["window"]
                    assert window is not None
                    assert window["samples"] == 1
                    seen[name] = window["gradient"]

    module = Recorded(toggle=toggle, plain_backward=plain_backward)
    make_trainer(callback, Look(), max_epochs=2).fit(module, TinyMLP.batches(20))
    assert len(expected) == 2
    torch.testing.assert_close(seen, expected)


def window_schedule() -> Any:
    """40 steps: masks change at 0, 12, 24 and so on, with the three steps before each observed."""
    from lightning_estdgm import EstDgm, Phase

    return EstDgm(
        exploration=Phase(0.7, 0.6, 12),
        consolidation=Phase(0.3, 0.3, 12),
        refinement=Phase(0.1, 0.1, 16),
        update_every=12,
        observe_steps=3,
    )


class Compilable(MLP):
    """Without `self.log`, which newer torch cannot trace."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)


class ManualAccumulation(TinyMLP):
    """Steps every second batch, and never on the ones that give no loss."""

    def __init__(self, *, factor: int = 2, skip: int = 0) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.factor = factor
        self.skip = skip

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if self.skip and batch_idx % self.skip == 0:
            return
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / self.factor)
        if (batch_idx + 1) % self.factor == 0:
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()


def test_manual_accumulation_with_a_known_number_of_steps() -> None:
    module, callback = ManualAccumulation(), DGMCallback(total_steps=20)
    make_trainer(callback, max_epochs=2).fit(module, TinyMLP.batches(20))
    assert callback.controller.steps == module.optimizer_steps == 20
    assert_final(module, callback)


def test_manual_accumulation_observes_one_whole_sample_a_step() -> None:
    """Signed gradients are summed over micro-batches before their magnitude counts, as in automatic optimization."""
    callback = DGMCallback(DGMConfig(schedule=window_schedule()), total_steps=40)
    expected: list[Tensor] = []
    seen: list[dict[str, Any]] = []

    class Recorded(ManualAccumulation):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            if callback.controller.steps == 9:
                expected.append(torch.autograd.grad(self.loss(batch) / 2, self.net[0].weight)[0])
            super().training_step(batch, batch_idx)

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if callback.controller.steps == 10 and not seen:
                seen.append(callback.state_dict()["layers"]["net.0"]["window"])

    module = Recorded()
    module.clip_gradients = lambda *args, **kwargs: None  # type: ignore[method-assign]
    make_trainer(callback, Look(), max_epochs=2).fit(module, TinyMLP.batches(40))
    assert len(expected) == 2
    assert seen[0]["samples"] == 1
    torch.testing.assert_close(seen[0]["gradient"], expected[0] + expected[1])


def test_manual_accumulation_ends_in_refinement() -> None:
    """How often a manual step happens cannot be known beforehand; the schedule must still be walked to its end."""
    module, callback = ManualAccumulation(), DGMCallback()
    make_trainer(callback, max_epochs=2).fit(module, TinyMLP.batches(40))
    assert callback.controller.steps == module.optimizer_steps == 40
    assert_final(module, callback)


def test_manual_optimization_that_skips_batches() -> None:
    module, callback = ManualAccumulation(factor=1, skip=10), DGMCallback(total_steps=36)
    make_trainer(callback, max_epochs=1).fit(module, TinyMLP.batches(40))
    assert callback.controller.steps == module.optimizer_steps == 36
    assert_final(module, callback)


@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize("manual", [False, True])
def test_a_step_in_every_second_batch_of_many(storage: str, manual: bool) -> None:
    module = ManualAccumulation(factor=2) if manual else TinyMLP()
    settings = {} if manual else {"accumulate_grad_batches": 2}
    callback = DGMCallback(DGMConfig(units=Units(size=1), storage=storage))
    make_trainer(callback, max_epochs=4, **settings).fit(module, TinyMLP.batches(40))
    assert callback.controller.steps == module.optimizer_steps == 80
    assert_final(module, callback)


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
@pytest.mark.filterwarnings("ignore:the run ended at position")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_step_that_returns_none_sometimes(accumulate: int) -> None:
    class Sometimes(TinyMLP):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx % 8 in (4, 5) else super().training_step(batch, batch_idx)

    module, callback = Sometimes(), DGMCallback()
    trainer = make_trainer(callback, max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(module, TinyMLP.batches(64))
    # torch's step is called for a None batch too, but nothing can move: those are no steps.
    assert module.optimizer_steps == 64 // accumulate
    assert callback.controller.steps == 48 // accumulate
    assert callback.density == pytest.approx(callback.schedule(callback.controller.position).density, abs=2e-3)
    assert_masked(module, callback)


# --------------------------------------------------------------------------- length of the run


def test_run_length_from_max_steps() -> None:
    module, callback = TinyMLP(), DGMCallback()
    make_trainer(callback, max_steps=30, max_epochs=-1).fit(module, TinyMLP.batches(7))
    assert callback.schedule.total_steps == callback.controller.steps == 30
    assert_final(module, callback)


def test_run_length_is_the_shorter_of_steps_and_epochs() -> None:
    module, callback = TinyMLP(), DGMCallback()
    make_trainer(callback, max_steps=1000, max_epochs=3).fit(module, TinyMLP.batches(10))
    assert callback.schedule.total_steps == callback.controller.steps == 30
    assert_final(module, callback)


def test_run_length_follows_limit_train_batches() -> None:
    module, callback = TinyMLP(), DGMCallback()
    make_trainer(callback, max_epochs=3, limit_train_batches=0.5, accumulate_grad_batches=2).fit(
        module, TinyMLP.batches(20)
    )
    assert callback.schedule.total_steps == callback.controller.steps == 15
    assert_final(module, callback)


@pytest.mark.parametrize("settings", [{"max_steps": 24, "max_epochs": -1}, {"limit_train_batches": 8, "max_epochs": 3}])
def test_endless_loader_with_a_limit(settings: dict[str, Any]) -> None:
    module, callback = TinyMLP(), DGMCallback()
    make_trainer(callback, **settings).fit(module, endless_loader(TinyMLP.batches(5)))
    assert callback.schedule.total_steps == callback.controller.steps == 24
    assert_final(module, callback)


def test_loader_without_a_length_and_total_steps() -> None:
    module, callback = TinyMLP(), DGMCallback(total_steps=30)
    make_trainer(callback, max_epochs=3).fit(module, endless_loader(TinyMLP.batches(5), n=10))
    assert callback.schedule.total_steps == callback.controller.steps == 30
    assert_final(module, callback)


def test_run_longer_than_its_total_steps_stays_in_refinement() -> None:
    module, callback = TinyMLP(), DGMCallback(total_steps=20)
    make_trainer(callback, max_steps=30, max_epochs=-1).fit(module, TinyMLP.batches(7))
    assert callback.controller.steps == 30
    assert_final(module, callback)


class Phases(pl.Callback):
    """The phase and density of each batch."""

    def __init__(self, callback: DGMCallback) -> None:
        self.callback = callback
        self.seen: list[str] = []
        self.densities: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append(self.callback.phase)
        self.densities.append(self.callback.density)


@pytest.mark.parametrize("by", ["max_time", "Timer"])
def test_run_limited_by_time_alone_walks_through_all_phases(by: str) -> None:
    module, callback = TinyMLP(), DGMCallback()
    phases = Phases(callback)
    length = {"seconds": 3}
    extra = [Timer(duration=length)] if by == "Timer" else []
    settings = {"max_time": length} if by == "max_time" else {}
    trainer = make_trainer(callback, phases, *extra, max_epochs=-1, **settings)
    trainer.fit(module, TinyMLP.batches(50))
    assert list(dict.fromkeys(phases.seen)) == ["exploration", "consolidation", "refinement"]
    assert phases.densities == sorted(phases.densities, reverse=True)
    assert callback.controller.updates > 3
    assert callback.controller.steps == module.optimizer_steps == trainer.global_step
    assert_final(module, callback)


def test_time_limit_beyond_the_last_epoch_does_not_stretch_the_schedule() -> None:
    module, callback = TinyMLP(), DGMCallback()
    make_trainer(callback, max_epochs=3, max_time={"hours": 1}).fit(module, TinyMLP.batches(10))
    assert callback.controller.steps == 30
    assert_final(module, callback)


def test_time_limit_that_comes_first_still_ends_in_refinement() -> None:
    module, callback = TinyMLP(), DGMCallback()
    make_trainer(callback, max_epochs=100_000, max_time={"seconds": 2}).fit(module, TinyMLP.batches(10))
    assert callback.controller.steps < 100_000
    assert_final(module, callback)


def test_a_time_limit_far_before_the_last_epoch_costs_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step goes past thousands of steps of the schedule then, and past the hundredth part of the epochs."""
    plan, epoch_steps, calls = SteppedSchedule.__call__, ScheduleClock._epoch_steps, {"plan": 0, "epoch": 0}

    def counted_plan(self: SteppedSchedule, step: int) -> Plan:
        calls["plan"] += 1
        return plan(self, step)

    def counted_epoch(self: ScheduleClock, trainer: pl.Trainer, epoch: int) -> int:
        calls["epoch"] += 1
        return epoch_steps(self, trainer, epoch)

    monkeypatch.setattr(SteppedSchedule, "__call__", counted_plan)
    monkeypatch.setattr(ScheduleClock, "_epoch_steps", counted_epoch)
    module, callback = TinyMLP(), DGMCallback()
    make_trainer(callback, max_epochs=100_000, max_time={"seconds": 2}).fit(module, TinyMLP.batches(10))
    assert calls["plan"] < 100 * callback.controller.steps
    assert calls["epoch"] < 10
    assert_final(module, callback)


def test_fast_dev_run_works() -> None:
    """One step cannot hold three phases, but a smoke test of the user's code must run."""
    module, callback = TinyMLP(), DGMCallback()
    make_trainer(callback, fast_dev_run=True).fit(module, TinyMLP.batches(3), TinyMLP.batches(2))
    assert callback.controller.steps == 1
    assert_masked(module, callback)


def test_second_fit_of_one_trainer_ends_in_refinement_too() -> None:
    """Lightning counts epochs and steps on: what is left of the run is what the schedule has."""
    module, callback = TinyMLP(), DGMCallback()
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(module, TinyMLP.batches(15))
    assert_final(module, callback)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, TinyMLP.batches(15))
    assert module.optimizer_steps == 60
    assert_final(module, callback)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_barebones_trainer() -> None:
    module, callback = Compilable(), DGMCallback()
    trainer = pl.Trainer(barebones=True, callbacks=[callback], accelerator="cpu", devices=1, max_epochs=1)
    trainer.fit(module, MLP.batches(25))
    assert_final(module, callback)


@pytest.mark.parametrize("cls", [MLP, models.ConvNet, models.Encoder])
def test_flops_know_how_often_each_weight_is_used(cls: Any) -> None:
    """A layer that is not seen would count as used once a step, however long the sequence."""
    module, callback = cls(), DGMCallback()
    make_trainer(callback, max_epochs=1).fit(module, cls.batches(10))
    uses = callback.state_dict()["positions"]
    expected = {"MLP": {8}, "ConvNet": {4, 4 * 36, 4 * 16}, "Encoder": {10}}[cls.__name__]
    assert uses.keys() == {d.name for d in callback.decisions()}
    assert set(uses.values()) == expected


FORMS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda y: y, lambda got: got),
    "list": (lambda y: [y, y.mean()], lambda got: got[0]),
    "dict": (lambda y: {"mask": y > 0, "y": y}, lambda got: got["y"]),
    "loss first": (lambda y: (y.square().mean(), y), lambda got: got[1]),
}
LAYERS: dict[str, tuple[Any, ...]] = {
    "linear": (nn.Linear, (32, 32)),
    "convolution": (nn.Conv2d, (8, 8, 3, 1, 1), nn.Unflatten(1, (8, 2, 2)), nn.Flatten()),
    "transposed": (nn.ConvTranspose2d, (8, 8, 3, 1, 1), nn.Unflatten(1, (8, 2, 2)), nn.Flatten()),
    "experts": (BmmExperts, (4, 32, 32), nn.Identity(), nn.Flatten(0, 1)),
}


class Apply(nn.Module):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, given: Any) -> Any:
        return self.function(given)


class Returning(models.Task):
    """Has a layer whose own forward returns its output in some form."""

    def __init__(self, layer: str, form: str) -> None:
        super().__init__()
        cls, sizes, *(before, after) = *LAYERS[layer], *[nn.Identity()] * (4 - len(LAYERS[layer]))
        put, take = FORMS[form]
        own = type("Own", (cls,), {"forward": lambda self, x: put(cls.forward(self, x))})
        self.net = nn.Sequential(nn.Linear(16, 32), before, own(*sizes), Apply(take), after, nn.Linear(32, 1))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(self.net(batch[0]).squeeze(-1), batch[1])


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_may_return_its_output_in_any_form(layer: str) -> None:
    ends = {}
    for form in FORMS:
        pl.seed_everything(0, verbose=False)
        module, callback = Returning(layer, form), DGMCallback(DGMConfig(units=Units(size=1), backend="dense"))
        make_trainer(callback, max_epochs=1).fit(module, TinyMLP.batches(24))
        assert_final(module, callback)
        assert any(name.startswith("net.2") for name in callback.masks())
        ends[form] = module.state_dict(), callback.state_dict()["positions"], callback.flops_ratio
    for weights, positions, flops in ends.values():
        assert (positions, flops) == ends["tensor"][1:]
        assert all(torch.equal(weights[name], weight) for name, weight in ends["tensor"][0].items())


class Named(TinyMLP):
    """Passes inputs by torch's own name for them, or by position."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.by_name = by_name
        self.conv, self.up, self.linear = nn.Conv2d(4, 4, 3, 1, 1), nn.ConvTranspose2d(4, 4, 3, 1, 1), nn.Linear(16, 16)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        def call(layer: nn.Module, x: Tensor) -> Tensor:
            return layer(input=x) if self.by_name else layer(x)

        x = call(self.up, call(self.conv, batch[0].view(8, 4, 2, 2)).relu())
        return super().loss((call(self.linear, x.flatten(1)), batch[1]))


@pytest.mark.parametrize("settings", [{"backend": "reference"}, {"storage": "packed"}], ids=["swapped", "packed"])
def test_an_input_may_be_passed_by_name(settings: dict[str, Any]) -> None:
    ends = []
    for by_name in (False, True):
        pl.seed_everything(0, verbose=False)
        config = DGMConfig(units=Units(size=1), selection=Selection(include=["linear"]), **settings)
        module, callback = Named(by_name), DGMCallback(config)
        make_trainer(callback, max_epochs=1).fit(module, TinyMLP.batches(24))
        backends = {d.name: d.backend for d in callback.decisions()}
        assert backends["conv"] == backends["linear"] == next(iter(settings.values()))
        ends.append((module.state_dict(), callback.state_dict()["positions"], callback.flops_ratio))
    assert ends[0][1:] == ends[1][1:]
    assert all(torch.equal(ends[0][0][name], weight) for name, weight in ends[1][0].items())


class Compiled(TinyMLP):
    """Has a submodule that torch.jit has made."""

    def __init__(self, how: str) -> None:
        super().__init__()
        part = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        made = {"script": torch.jit.script, "trace": lambda part: torch.jit.trace(part, torch.randn(2, 16))}[how](part)
        self.net = nn.Sequential(made, torch.jit.script(nn.Tanh()), *self.net)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_a_submodule_of_torch_jit_trains_as_it_is(how: str, storage: Any) -> None:
    module, callback = Compiled(how), DGMCallback(DGMConfig(units=Units(size=1), storage=storage))
    made = module.net[0]
    before = [p.detach().clone() for p in made.parameters()]
    make_trainer(callback, max_epochs=1).fit(module, TinyMLP.batches(24))
    assert_final(module, callback)
    assert {d.name: d.masked for d in callback.decisions()} == {"net.2": True, "net.4": True, "net.6": False}
    assert all((p != q).all() for p, q in zip(made.parameters(), before, strict=True))


class WithEmptyLayer(TinyMLP):
    """Has a layer of no outputs, whose weight is used by its forward or by itself."""

    def __init__(self, by_itself: bool) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            self.none = nn.Linear(16, 0)
        self.by_itself = by_itself
        self.net[1] = Apply(self.with_none)

    def with_none(self, x: Tensor) -> Tensor:
        nothing = F.linear(x, self.none.weight) if self.by_itself else self.none(x)
        return torch.cat([x, nothing], 1).relu()


@pytest.mark.parametrize("by_itself", [False, True], ids=["called", "by itself"])
@pytest.mark.parametrize("settings", [{"backend": "reference"}, {"storage": "packed"}], ids=["swapped", "packed"])
def test_a_layer_of_no_outputs_stays_dense(settings: dict[str, Any], by_itself: bool) -> None:
    module, callback = WithEmptyLayer(by_itself), DGMCallback(DGMConfig(units=Units(size=1), **settings))
    make_trainer(callback, max_epochs=1).fit(module, TinyMLP.batches(24))
    assert_final(module, callback)
    why = {d.name: d.why for d in callback.decisions() if not d.masked}
    assert why["none"] == "its weight is empty"


class LossHead(nn.Linear):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return F.mse_loss(super().forward(x).squeeze(-1), y)


class EndsInItsLoss(TinyMLP):
    def __init__(self) -> None:
        super().__init__()
        self.net[-1] = LossHead(16, 1)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.net[-1](self.net[:-1](batch[0]), batch[1])


def test_a_head_may_return_its_loss() -> None:
    module, callback = EndsInItsLoss(), DGMCallback()
    make_trainer(callback, max_epochs=1).fit(module, TinyMLP.batches(24))
    assert_final(module, callback)
    assert callback.state_dict()["positions"] == {"net.0": 8, "net.2": 8, "net.4": 8}


# --------------------------------------------------------------------------- torch.compile


def test_compiled_module_equals_eager_with_the_cpu_backend() -> None:
    results = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        pl.seed_everything(0, verbose=False)
        module, callback = Compilable(optimizer="sgd"), DGMCallback(DGMConfig(backend="cpu"))
        trainer = make_trainer(callback, max_epochs=1)
        traced_before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        # The default backend works as well, but takes half a minute to compile both graphs.
        fitted = torch.compile(module, backend="aot_eager") if compiled else module
        trainer.fit(fitted, MLP.batches(24))
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > traced_before) == compiled
        assert {d.backend for d in callback.decisions() if d.masked} == {"cpu"}
        assert {d.name for d in callback.decisions()} == {"net.0", "net.2", "net.4"}
        assert_final(module, callback)
        assert leftovers(module, trainer) == []
        assert callback.controller is not None
        seen = callback.controller.state_dict()["positions"]
        assert len(seen) == len(callback.decisions())  # backends are measured at the real shapes, compiled or not
        results[compiled] = module.state_dict(), callback.masks(), (callback.flops_ratio, seen)
    torch._dynamo.reset()
    (eager, eager_masks, (eager_flops, eager_seen)) = results[False]
    (compiled_, compiled_masks, (compiled_flops, compiled_seen)) = results[True]
    assert compiled_seen == eager_seen
    assert list(eager) == list(compiled_)
    for name in eager_masks:
        assert torch.equal(eager_masks[name], compiled_masks[name])
    for name in eager:
        torch.testing.assert_close(compiled_[name], eager[name], rtol=1e-4, atol=1e-5)
    assert compiled_flops == pytest.approx(eager_flops, rel=1e-6)
