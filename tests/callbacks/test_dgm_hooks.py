"""What each hook sees and when, what is shown and logged, and that nothing is left behind."""

from __future__ import annotations

import copy
import csv
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.nn import functional as F

from helpers.models import (
    GAN,
    MLP,
    NO_VALIDATION_LOADER,
    Batches,
    TinyMLP,
    assert_final,
    assert_masked,
    callback_for,
    leftovers,
    make_trainer,
    weight_masks,
)
from lightning_estdgm import DGMCallback, Units

pytestmark = pytest.mark.filterwarnings(NO_VALIDATION_LOADER)

OBSERVED = [3, 4, 8, 9, 13, 14]


def window_of(callback: DGMCallback, layer: str = "net.0") -> dict[str, Any] | None:
    layers = callback.state_dict()["layers"]  # none in the first step
    return layers[layer]["window"] if layers else None


# --------------------------------------------------------------------------- order of hooks and masking


class Recorder(pl.Callback):
    """Whether the first layer's inactive gradients are there, at each hook."""

    def __init__(self, callback: DGMCallback, notes: list[tuple[str, int, bool]], where: str) -> None:
        self.callback, self.notes, self.where = callback, notes, where

    def _note(self, hook: str, module: MLP) -> None:
        if self.callback.controller.steps == 0:  # dense, with whole gradients at every hook
            return
        weight, mask = weight_masks(module, self.callback)["net.0"]
        whole = torch.count_nonzero(weight.grad[~mask]) > 0.5 * (~mask).sum()
        masked = torch.count_nonzero(weight.grad[~mask]) == 0
        assert whole or masked
        self.notes.append((f"{hook} {self.where}", self.callback.controller.steps, bool(whole)))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._note("backward", pl_module)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self._note("step", pl_module)


class Clipped(TinyMLP):
    """Records the gradient norm that clipping sees, and the sizes it leaves."""

    norms: list[float]

    def configure_gradient_clipping(self, optimizer: Any, **settings: Any) -> None:
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        self.norms.append(torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads])).item())
        self.recorder._note("clip", self)
        self.clip_gradients(optimizer, **settings)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_whole_in_a_window_until_the_step_and_masked_before_clipping(accumulate: int) -> None:
    callback, log = callback_for(), []
    first, last = Recorder(callback, log, "before"), Recorder(callback, log, "after")
    module = Clipped()
    module.norms, module.recorder = [], Recorder(callback, log, "itself")
    make_trainer(first, callback, last, max_epochs=1, accumulate_grad_batches=accumulate, gradient_clip_val=0.1).fit(
        module, TinyMLP.batches(20 * accumulate)
    )
    assert [step for hook, step, _ in log if hook == "clip itself"] == list(range(1, 20))
    for hook, step, whole in log:
        if hook == "backward before":
            assert whole, (hook, step)
        elif hook in ("backward after", "step before"):
            assert whole == (step in OBSERVED), (hook, step)
        else:  # after our own on_before_optimizer_step, so in clipping too
            assert not whole, (hook, step)
    order = [hook for hook, step, _ in log if step == 3]
    assert order == ["backward before", "backward after"] * accumulate + ["step before", "step after", "clip itself"]


def test_clipping_sees_the_norm_of_the_masked_gradient() -> None:
    callback = callback_for()
    module = Clipped()
    module.norms, module.recorder = [], Recorder(callback, [], "itself")
    expected = []

    class Norm(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            masks = {id(weight): mask for weight, mask in weight_masks(pl_module, callback).values()}
            grads = [p.grad * masks.get(id(p), torch.tensor(1.0)) for p in pl_module.parameters()]
            expected.append(torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads])).item())

    make_trainer(Norm(), callback, max_epochs=1, gradient_clip_val=0.1).fit(module, TinyMLP.batches(20))
    assert module.norms == pytest.approx(expected)


@pytest.mark.parametrize("cls", [TinyMLP, MLP])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_observed_sample_is_the_mean_over_micro_batches(accumulate: int, cls: type[MLP]) -> None:
    """Signed gradients are averaged first; the magnitude is taken of the mean, per step."""
    backend = "auto" if cls is TinyMLP else "cpu"
    callback = callback_for(backend=backend)
    batches = cls.batches(20 * accumulate)
    expected: list[Tensor] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            step = callback.controller.steps
            if step in (3, 4) and batch_idx % accumulate == 0:
                model = copy.deepcopy(pl_module.net)
                for layer in model:
                    layer.__class__ = getattr(layer, "_estdgm_dense_class", type(layer))
                total = sum(F.mse_loss(model(x).squeeze(-1), y) for x, y in batches[batch_idx : batch_idx + accumulate])
                expected.append(torch.autograd.grad(total / accumulate, model[0].weight)[0])
            window = window_of(callback)
            if step == 4 and batch_idx % accumulate == 0:
                assert window["samples"] == 1
                torch.testing.assert_close(window["gradient"], expected[0])
                if cls is TinyMLP:
                    torch.testing.assert_close(window["norm"], expected[0].abs())
                else:
                    blocks = expected[0].view(8, 16, 8, 16).pow(2).sum((1, 3)).sqrt()
                    torch.testing.assert_close(window["norm"], blocks)

        def on_train_batch_end(self, *args: Any) -> None:
            if callback.controller.steps == 4:
                self.window = window_of(callback)
            assert (window_of(callback) is None) == (callback.controller.steps not in (4, 9, 14))

        def on_before_zero_grad(self, *args: Any) -> None:
            if callback.controller.steps == 4 and window_of(callback)["samples"] == 2:
                torch.testing.assert_close(window_of(callback)["gradient"], expected[0] + expected[1])

    make_trainer(callback, Look(), max_epochs=1, accumulate_grad_batches=accumulate).fit(cls(), batches)
    assert len(expected) == 2


def test_buffers_exist_only_inside_windows_and_masks_change_only_when_due() -> None:
    callback = callback_for()
    windows, changes, previous = [], [], {}

    class Look(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            step = callback.controller.steps
            if window_of(callback) is not None:
                windows.append(step)
            masks = callback.masks()
            if previous and any(not torch.equal(masks[k], previous[k]) for k in masks):
                changes.append(step)
            previous.update(masks)

    make_trainer(callback, Look(), max_epochs=1).fit(TinyMLP(), TinyMLP.batches(20))
    assert windows == [4, 9, 14]
    assert changes == [5, 10, 15]


def test_manual_gradients_are_masked_after_backward_and_in_windows_by_the_step() -> None:
    callback = callback_for()

    class Look(GAN):
        def is_masked(self, index: int) -> bool:
            weight, mask = weight_masks(self, callback)[("generator.0", "discriminator.0")[index]]
            return bool((weight.grad[~mask] == 0).all())

        def before_step(self, index: int) -> None:
            if callback.controller.steps:  # the first step is dense
                before.append((callback.controller.steps, self.is_masked(index)))

        def on_train_batch_end(self, *args: Any) -> None:
            if callback.controller.steps not in (1, 5, 10, 15):  # masks have changed just now
                after.append(self.is_masked(0) and self.is_masked(1))

    before: list[tuple[int, bool]] = []
    after: list[bool] = []
    make_trainer(callback, max_epochs=1).fit(Look(), TinyMLP.batches(20))
    assert [step for step, _ in before] == [step for step in range(1, 20) for _ in range(2)]
    assert all(masked for step, masked in before if step not in OBSERVED)
    assert len(after) == 16
    assert all(after)


# --------------------------------------------------------------------------- nothing is left behind


class Boom(Exception):
    pass


class Interrupted(MLP):
    """Ends a run in its seventh batch, by an exception or as the user would."""

    how: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if batch_idx == 7:
            if self.how == "stop":
                self.trainer.should_stop = True
            elif self.how is not None:
                raise self.how
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:the run ended at position")
@pytest.mark.parametrize(
    ("how", "raised"),
    [(Boom(), Boom), (KeyboardInterrupt(), SystemExit), ("stop", None)],
    ids=["exception", "KeyboardInterrupt", "should_stop"],
)
def test_nothing_is_left_when_a_run_ends_early(how: Any, raised: type[BaseException] | None) -> None:
    handler = signal.getsignal(signal.SIGINT)
    module, callback = Interrupted(), callback_for(backend="cpu")
    module.how = how
    trainer = make_trainer(callback, TQDMProgressBar(), max_epochs=1, enable_progress_bar=True)
    try:
        if raised is None:
            trainer.fit(module, MLP.batches(20))
        else:
            with pytest.raises(raised):
                trainer.fit(module, MLP.batches(20))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert leftovers(module, trainer) == []
    assert callback.controller.steps == (8 if how == "stop" else 7)
    assert_masked(module, callback)
    assert callback.density == pytest.approx(0.3, abs=0.02)
    # The same objects can be used again.
    module.how = None
    again = callback_for()
    trainer = make_trainer(again, max_epochs=1)
    trainer.fit(module, MLP.batches(20))
    assert_final(module, again)
    assert leftovers(module, trainer) == []


def test_hooks_are_there_during_the_run() -> None:
    """The control of `leftovers`: it does find what is there."""
    module, found = MLP(), []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            found.append(leftovers(pl_module, trainer))

    trainer = make_trainer(
        callback_for(units=Units(size=16)), TQDMProgressBar(), Look(), max_epochs=1, enable_progress_bar=True
    )
    trainer.fit(module, MLP.batches(20))
    text = " ".join(found[0])
    assert all(
        word in text for word in ("MaskedLinear", "_estdgm_topology", "_before_step", "_after_step", "get_metrics")
    )


def test_two_fits_with_new_callbacks() -> None:
    module = MLP()
    for _ in range(2):
        callback = callback_for()
        trainer = make_trainer(callback, max_epochs=1)
        trainer.fit(module, MLP.batches(20))
        assert_final(module, callback)
        assert leftovers(module, trainer) == []


def test_two_fits_with_the_same_callback_equal_two_with_new_ones() -> None:
    results = []
    for same in (True, False):
        pl.seed_everything(0, verbose=False)
        module, callback = MLP(), callback_for()
        for _ in range(2):
            if not same:
                callback = callback_for()
            make_trainer(callback, max_epochs=1).fit(module, MLP.batches(20))
        assert_final(module, callback)
        results.append((module.state_dict(), callback.masks(), callback.controller.steps, callback.flops_ratio))
    (weights, masks, *rest), (other_weights, other_masks, *other_rest) = results
    assert rest == other_rest
    assert all(torch.equal(weights[k], other_weights[k]) for k in weights)
    assert all(torch.equal(masks[k], other_masks[k]) for k in masks)


def test_evaluation_after_the_fit() -> None:
    module, callback = MLP(), callback_for()
    trainer = make_trainer(callback, max_epochs=1)
    batches = MLP.batches(20)
    trainer.fit(module, batches, Batches(batches[:2]))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    assert trainer.validate(module, batches, verbose=False)[0]["val_loss"] > 0
    assert trainer.test(module, batches, verbose=False)[0]["test_loss"] > 0
    assert len(trainer.predict(module, batches)) == 20
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert_final(module, callback)
    assert callback.phase == "refinement"
    assert leftovers(module, trainer) == []


def test_evaluation_without_a_fit_does_nothing() -> None:
    module, callback = MLP(), callback_for()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    make_trainer(callback).validate(module, MLP.batches(2), verbose=False)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert (callback.phase, callback.density, callback.flops_ratio) == ("", 1.0, 1.0)


# --------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize("bar_class", [TQDMProgressBar, RichProgressBar])
def test_progress_bar_shows_phase_and_density(bar_class: type[pl.Callback]) -> None:
    callback, bar, shown = callback_for(), bar_class(), []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            shown.append(trainer.progress_bar_callback.get_metrics(trainer, pl_module))

    class Barred(TinyMLP):
        def loss(self, batch: Any) -> Tensor:
            loss = super().loss(batch)
            self.log("mine", 1.5, prog_bar=True, batch_size=1)
            return loss

    trainer = make_trainer(callback, Look(), bar, max_epochs=1, enable_progress_bar=True)
    trainer.fit(Barred(), TinyMLP.batches(20), TinyMLP.batches(1))
    assert [m["phase"] for m in shown] == ["exploration"] * 4 + ["consolidation"] * 5 + ["refinement"] * 11
    assert [m["density"] for m in shown[:-1]] == ["0.699"] * 4 + ["0.301"] * 5 + ["0.199"] * 5 + ["0.100"] * 5
    assert all(m["mine"] == 1.5 for m in shown[1:])
    metrics = bar.get_metrics(trainer, trainer.lightning_module)
    assert "phase" not in metrics
    assert "density" not in metrics


def test_tqdm_bar_really_renders_phase_and_density(capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(callback_for(), TQDMProgressBar(), max_epochs=1, enable_progress_bar=True).fit(
        TinyMLP(), TinyMLP.batches(20)
    )
    captured = capsys.readouterr()
    assert "phase=refinement" in captured.out + captured.err
    assert "density=0.100" in captured.out + captured.err


@pytest.mark.parametrize("bar", [None, TQDMProgressBar, RichProgressBar])
def test_table_is_printed_once_and_is_data_too(capsys: pytest.CaptureFixture[str], bar: Any) -> None:
    callback = callback_for(units=Units(size=16))
    bars = [bar()] if bar else []
    trainer = make_trainer(callback, *bars, max_epochs=2, enable_progress_bar=bool(bars))
    trainer.fit(MLP(), MLP.batches(10), MLP.batches(1))
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert text.count("weights in linear and convolution layers are masked") == 1
    assert "32,768 of 32,896" in text
    table = [line for line in text.splitlines() if "net.0" in line]
    assert len(table) == 1
    ends = f"0.70 → {callback.decisions()[0].final_density:.2f}"
    assert all(part in table[0] for part in ("128 x 128", "16 x 16", ends))
    head = next(line for line in text.splitlines() if "net.4" in line)
    assert "output head" in head

    first, second, last = callback.decisions()
    assert (first.name, first.shape, first.masked, first.block_size) == ("net.0", (128, 128), True, 16)
    assert first.density == first.final_density == pytest.approx(0.1, abs=0.01)
    assert (last.name, last.masked, last.block_size, last.density) == ("net.4", False, 0, 1.0)
    assert first.backend in ("dense", "cpu")
    assert second.why


def test_forced_backend_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    callback = callback_for(backend="cpu")
    make_trainer(callback, max_epochs=1).fit(MLP(), MLP.batches(20))
    line = next(line for line in capsys.readouterr().out.splitlines() if "net.2" in line)
    assert "cpu" in line
    assert [d.backend for d in callback.decisions()] == ["cpu", "cpu", "dense"]


# --------------------------------------------------------------------------- what is logged

ALWAYS = {"dgm/density", "dgm/phase", "dgm/flops_ratio", "dgm/flops_executed_ratio"}
AT_UPDATES = {"dgm/churn", "dgm/explored", "dgm/density/net.0", "dgm/density/net.2"}


def read_csv(directory: Path) -> dict[str, list[tuple[int, float]]]:
    with next(directory.rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if value and key not in ("step", "epoch"):
                found.setdefault(key, []).append((int(row["step"]), float(value)))
    return found


def read_tensorboard(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(directory.rglob("events.out.*")).parent))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def check_curves(curves: dict[str, list[tuple[int, float]]], callback: DGMCallback) -> None:
    assert curves.keys() >= ALWAYS | AT_UPDATES
    density = dict(curves["dgm/density"])
    assert set(density) == {0, 1, 3, 4, 5, 7, 9, 11, 13, 14, 15, 17, 19}
    # Logged at the end of a step is what the next step works with.
    assert [density[s] for s in (0, 3, 4, 7, 9, 13, 14, 19)] == pytest.approx(
        [0.7, 0.7, 0.3, 0.3, 0.2, 0.2, 0.1, 0.1], abs=2e-3
    )
    phase = dict(curves["dgm/phase"])
    assert [phase[s] for s in (0, 3, 4, 7, 9, 13, 14, 19)] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert [step for step, _ in curves["dgm/churn"]] == [0, 4, 9, 14]
    explored = [value for _, value in curves["dgm/explored"]]
    assert explored == sorted(explored)
    assert explored[0] == pytest.approx(0.7, abs=2e-3)
    assert explored[-1] > explored[0]
    assert dict(curves["dgm/flops_ratio"])[19] == pytest.approx(callback.flops_ratio, rel=1e-4)
    layers = [dict(curves[f"dgm/density/{name}"])[14] for name in ("net.0", "net.2")]
    assert layers == pytest.approx([d.density for d in callback.decisions() if d.masked], rel=1e-4)


def test_curves_in_tensorboard_and_csv_files(tmp_path: Path) -> None:
    callback = callback_for()
    loggers = [TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")]
    make_trainer(callback, max_epochs=2, logger=loggers, log_every_n_steps=2).fit(TinyMLP(), TinyMLP.batches(10))
    for curves in (read_tensorboard(tmp_path / "tb"), read_csv(tmp_path / "csv")):
        check_curves(curves, callback)
        # On the same axis as Lightning's own curves.
        assert {step for step, _ in curves["train_loss"]} <= {step for step, _ in curves["dgm/density"]}


@pytest.mark.parametrize("accumulate", [2])
def test_curves_with_accumulation_hold_each_step_once(tmp_path: Path, accumulate: int) -> None:
    callback = callback_for()
    trainer = make_trainer(
        callback, max_epochs=1, logger=CSVLogger(tmp_path), log_every_n_steps=2, accumulate_grad_batches=accumulate
    )
    trainer.fit(TinyMLP(), TinyMLP.batches(20 * accumulate))
    curves = read_csv(tmp_path)
    check_curves(curves, callback)
    steps = [step for step, _ in curves["dgm/density"]]
    assert steps == sorted(set(steps))


def test_a_trainer_that_never_logs_is_not_made_to(tmp_path: Path) -> None:
    class Counts(CSVLogger):
        calls = 0

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.calls += 1

    calls = []
    for callbacks in ([], [callback_for()]):
        logger = Counts(tmp_path)
        trainer = make_trainer(*callbacks, max_epochs=1, logger=logger, log_every_n_steps=0)
        trainer.fit(TinyMLP(), TinyMLP.batches(20))
        calls.append(logger.calls)
    assert calls[0] == calls[1]


def test_no_logger_is_fine() -> None:
    callback = callback_for()
    make_trainer(callback, max_epochs=1, logger=False).fit(TinyMLP(), TinyMLP.batches(20))
    assert callback.controller.steps == 20


def test_analytic_flops_are_those_of_the_masks() -> None:
    """Two thirds of a step's products follow the density always, the weight gradient only outside windows."""
    callback = callback_for(units={"distribution": "uniform"})
    make_trainer(callback, max_epochs=1).fit(TinyMLP(), TinyMLP.batches(20))
    masked, head = 2 * 16 * 16, 16
    expected = 0.0
    for step in range(20):
        rho = callback.schedule(step).density
        rho = round(rho * masked) / masked if step else 1.0  # the first step is dense
        expected += masked * (2 * rho + (1.0 if step in OBSERVED else rho)) + 3 * head
    assert callback.flops_ratio == pytest.approx(expected / (20 * 3 * (masked + head)), rel=5e-3)


# --------------------------------------------------------------------------- other callbacks


@pytest.mark.filterwarnings("ignore:the best checkpoint by")
@pytest.mark.filterwarnings("ignore:the run ended at position")
def test_early_stopping_checkpoints_and_learning_rate_monitor(tmp_path: Path) -> None:
    callback = DGMCallback()
    stop = EarlyStopping("val_loss", patience=1, min_delta=1e9)
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor="val_loss", save_last=True)
    monitor = LearningRateMonitor()
    module = TinyMLP(scheduler="onecycle")
    trainer = make_trainer(
        stop,
        checkpoint,
        monitor,
        callback,
        max_epochs=10,
        logger=CSVLogger(tmp_path),
        enable_checkpointing=True,
        log_every_n_steps=1,
    )
    batches = TinyMLP.batches(10)
    trainer.fit(module, batches, Batches(batches[:2]))
    assert trainer.current_epoch == 2
    assert callback.controller.steps == 20
    assert callback.density == pytest.approx(callback.schedule(20).density, abs=2e-3)
    assert_masked(module, callback)
    curves = read_csv(tmp_path)
    names = [key for key in curves if key.startswith("lr-")]
    assert len(names) == 2
    assert [rate for _, rate in curves[names[0]]] == pytest.approx([1e-3 / 25] + [r[0] for r in module.rates[:-1]])
    assert Path(checkpoint.best_model_path).exists()
    assert leftovers(module, trainer) == []


class SetsRates(TinyMLP):
    """Looks at its groups and sets their rates where a step's gradients are ready."""

    def __init__(self) -> None:
        super().__init__("sgd")
        self.seen: list[list[tuple[float, int]]] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.seen.append([(group["lr"], len(group["params"])) for group in optimizer.param_groups])
        for group in optimizer.param_groups:
            group["lr"] = 0.0


class Keeping(pl.Callback):
    """Weights before and after each of three batches, after which no masks are drawn or updated."""

    def __init__(self) -> None:
        self.weights: list[list[dict[str, Tensor]]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        if 1 <= index < 4:
            self.weights.append([copy.deepcopy(module.state_dict())])

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if 1 <= index < 4:
            self.weights[-1].append(copy.deepcopy(module.state_dict()))


def test_rates_that_the_module_sets_before_a_step_are_those_of_the_step() -> None:
    module, callback, keeping = SetsRates(), callback_for(), Keeping()
    trainer = make_trainer(callback, keeping, max_steps=20)
    trainer.fit(module, TinyMLP.batches(20))
    groups = module.parameter_groups()
    assert [[n for _, n in step] for step in module.seen] == [[len(group["params"]) for group in groups]] * 20
    assert [step[0][0] for step in module.seen] == [module.seen[0][0][0]] + [0.0] * 19
    assert module.seen[0][0][0] > 0
    assert len(keeping.weights) == 3
    for before, after in keeping.weights:
        assert all(torch.equal(value, after[name]) for name, value in before.items())


class Stopping(torch.optim.SGD):
    """Raises in its third step, when the gradients are there."""

    count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.count += 1
        if self.count == 3:
            raise ArithmeticError("stopped")
        return loss


class Stopped(TinyMLP):
    def configure_optimizers(self) -> Any:
        return Stopping(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:could not try Stopping:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*was called without a model")
@pytest.mark.filterwarnings("ignore:.*no last checkpoint available")
@pytest.mark.parametrize("dgm_first", [True, False])
def test_a_checkpoint_after_an_exception_holds_the_users_groups(tmp_path: Path, dgm_first: bool) -> None:
    saved = OnExceptionCheckpoint(tmp_path)
    module, callback = Stopped(), callback_for()
    callbacks = [callback, saved] if dgm_first else [saved, callback]
    trainer = make_trainer(*callbacks, max_steps=20, enable_checkpointing=True)
    with pytest.raises(ArithmeticError, match="stopped"):
        trainer.fit(module, TinyMLP.batches(20))
    groups = torch.load(saved.ckpt_path, weights_only=False)["optimizer_states"][0]["param_groups"]
    assert [(group["lr"], len(group["params"])) for group in groups] == [(0.1, len(list(module.parameters())))]
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [len(groups[0]["params"])]


def assert_fit_works(module: MLP, callback: DGMCallback, trainer: pl.Trainer) -> None:
    assert callback.controller.steps == 20
    assert_final(module, callback)
    assert leftovers(module, trainer) == []


def test_lr_find_leaves_nothing_and_fit_works_after_it(tmp_path: Path) -> None:
    class Rated(TinyMLP):
        lr = 1e-3

    module, callback = Rated(optimizer="sgd"), callback_for()
    trainer = make_trainer(callback, max_epochs=2, default_root_dir=tmp_path)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    batches = TinyMLP.batches(10)
    finder = Tuner(trainer).lr_find(module, batches, num_training=15, update_attr=False)
    assert len(finder.results["loss"]) > 5
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert all(torch.count_nonzero(p) == p.numel() for p in module.parameters())
    assert leftovers(module, trainer) == []
    trainer.fit(module, batches)
    assert_fit_works(module, callback, trainer)


@pytest.mark.parametrize("dgm_first", [False, True])
def test_learning_rate_finder_callback(tmp_path: Path, dgm_first: bool) -> None:
    class Rated(TinyMLP):
        lr = 1e-3

    module, callback = Rated(optimizer="sgd"), callback_for()
    finder = LearningRateFinder(num_training_steps=15, update_attr=False)
    both = (callback, finder) if dgm_first else (finder, callback)
    trainer = make_trainer(*both, max_epochs=2, default_root_dir=tmp_path)
    batches = TinyMLP.batches(10)
    trainer.fit(module, batches)
    assert_fit_works(module, callback, trainer)
    # What the search saved and loaded again must not come up in a later run.
    other = TinyMLP()
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(other, batches)
    assert_fit_works(other, callback, trainer)
