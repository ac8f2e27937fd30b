"""Bad input is refused at once, in words that name what was got and what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from helpers.models import (
    MLP,
    NO_VALIDATION_LOADER,
    ConvNet,
    ResumableLoader,
    TinyMLP,
    assert_final,
    callback_for,
    endless_loader,
    leftovers,
    make_trainer,
)
from lightning_estdgm import DGMCallback, DGMConfig, EstDgm, Phase
from lightning_estdgm.config import Selection, StepSize, Units
from lightning_estdgm.method._update_rule import UpdateRule

pytestmark = pytest.mark.filterwarnings(NO_VALIDATION_LOADER)


# --------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DGMCallback({"gamma": 2}), TypeError, "config must be a DGMConfig, got {'gamma': 2}"),
        (lambda: DGMCallback(EstDgm()), TypeError, "config must be a DGMConfig, got EstDgm("),
        (lambda: DGMCallback(total_steps=0), ValueError, "total_steps must be at least 1, got 0"),
        (lambda: DGMCallback(total_steps=1e3), TypeError, "total_steps must be an int or None, got 1000.0"),
        (lambda: DGMCallback(total_steps=True), TypeError, "total_steps must be an int or None, got True"),
        (lambda: DGMConfig(schedule="est-dgm"), TypeError, "such as EstDgm(), got 'est-dgm'"),
        (lambda: DGMConfig(schedule=EstDgm), TypeError, "such as EstDgm(), got"),
        (
            lambda: DGMConfig(units=Units(size=24)),
            ValueError,
            "'finest', 'fastest' or one of",
        ),
        (lambda: DGMConfig(units=Units(size="big")), ValueError, "got 'big'"),
        (lambda: DGMConfig(units=Units(distribution="er")), ValueError, "['erk', 'uniform'] or a function, got 'er'"),
        (
            lambda: DGMConfig(update_rule=UpdateRule(gamma=-1)),
            ValueError,
            "gamma must be a finite number of at least 0, got -1",
        ),
        (lambda: DGMConfig(update_rule=UpdateRule(gamma=float("nan"))), ValueError, "gamma"),
        (
            lambda: DGMConfig(update_rule=UpdateRule(drop_fraction=1.0)),
            ValueError,
            "drop_fraction must lie in [0, 1), got 1.0",
        ),
        (
            lambda: DGMConfig(inactive="off"),
            ValueError,
            "inactive must be 'zero', 'frozen' or a BackwardSet, got 'off'",
        ),
        (lambda: DGMConfig(step_size=StepSize(exponent=float("nan"))), ValueError, "step_size.exponent"),
        (
            lambda: DGMConfig(selection=Selection(include="net.*")),
            TypeError,
            "include must be a sequence of selectors, got 'net.*'",
        ),
        (
            lambda: DGMConfig(selection=Selection(exclude="net.*")),
            TypeError,
            "exclude must be a sequence of selectors, got 'net.*'",
        ),
        (lambda: DGMConfig(selection=Selection(exclude=(3,))), TypeError, "exclude"),
        (lambda: DGMConfig(backend="triturate"), ValueError, "unknown backend 'triturate', expected one of: cpu"),
        (lambda: DGMConfig(seed=1.5), TypeError, "seed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_what_needs_a_model_says_so_before_the_fit() -> None:
    callback = DGMCallback()
    for ask in (callback.masks, callback.decisions, lambda: callback.schedule):
        with pytest.raises(RuntimeError, match=r"only from the start of trainer\.fit on"):
            ask()


# --------------------------------------------------------------------------- the run


def refuse(
    message: str, callback: DGMCallback, module: pl.LightningModule, loader: Any, *more: pl.Callback, **settings: Any
) -> None:
    """The fit is refused with this message, before a single weight has moved; nothing stays behind."""
    before = {k: v.clone() for k, v in module.state_dict().items()}
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = make_trainer(callback, *more, **{"max_epochs": 1} | settings)
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, loader, ckpt_path=ckpt_path)
    if ckpt_path is None:
        assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert leftovers(module, trainer) == []


def test_two_callbacks() -> None:
    """Lightning itself refuses two callbacks with one key, where the Trainer is made."""
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `DGMCallback`"):
        make_trainer(callback_for(), DGMCallback())


def test_the_trainer_of_another_package() -> None:
    other = type("Trainer", (), {"__module__": "pytorch_lightning.trainer.trainer"})()
    with pytest.raises(
        TypeError, match=r"got a Trainer of pytorch_lightning.trainer.trainer, expected lightning.pytor"
    ):
        DGMCallback().setup(other, TinyMLP(), "fit")


def test_second_callback_added_later() -> None:
    module, callback = TinyMLP(), callback_for()
    trainer = make_trainer(callback, max_epochs=1)
    trainer.callbacks.append(DGMCallback())
    with pytest.raises(ValueError, match="expected one DGMCallback in the Trainer, got 2"):
        trainer.fit(module, TinyMLP.batches(20))
    assert leftovers(module, trainer) == []


class Model(TinyMLP):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def test_no_maskable_layer() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            return (self.factor * x).sum(-1, keepdim=True)

    refuse("the model has no layer to mask: expected at least", callback_for(), Model(Scale()), TinyMLP.batches(20))


def test_nothing_but_an_output_head() -> None:
    refuse("found {'net': 'output head'}", callback_for(), Model(nn.Linear(16, 1)), TinyMLP.batches(20))


def test_everything_excluded() -> None:
    refuse(
        "no layer to mask.*'net.0': 'excluded'",
        callback_for(selection={"exclude": ("net.*",)}),
        TinyMLP(),
        TinyMLP.batches(20),
    )


def test_selector_that_matches_nothing() -> None:
    refuse(
        r"exclude='encoder\.\*' matches none of the layers that can be masked: \['net.0', 'net.2', 'net.4'\]",
        callback_for(selection={"exclude": ("encoder.*",)}),
        TinyMLP(),
        TinyMLP.batches(20),
    )


def test_block_size_that_does_not_fit() -> None:
    refuse(
        r"Units\(size=32\) does not fit layer 'net.0' with weight \(16, 16\): block sizes that do are \[1, .*, 16\]",
        callback_for(units={"size": 32}),
        TinyMLP(),
        TinyMLP.batches(20),
    )


def test_forced_backend_that_cannot_compute_a_layer() -> None:
    refuse(
        "backend='cpu' was asked for but cannot compute layer 'net.0': needs blocks of at least",
        callback_for(units={"size": 1}, backend="cpu"),
        TinyMLP(),
        TinyMLP.batches(20),
    )


@pytest.mark.parametrize("max_epochs", [3, -1])
def test_length_that_cannot_be_told(max_epochs: int) -> None:
    refuse(
        "the length of the run cannot be told.*total_steps=.*max_steps=",
        DGMCallback(),
        TinyMLP(),
        endless_loader(TinyMLP.batches(2)),
        max_epochs=max_epochs,
    )


@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")
def test_length_that_cannot_be_told_with_the_trainers_defaults() -> None:
    loader = endless_loader(TinyMLP.batches(2))
    refuse("the length of the run cannot be told", DGMCallback(), TinyMLP(), loader, max_epochs=None)


def test_phases_that_do_not_cover_the_run() -> None:
    refuse(
        r"phases must cover the run: .* make 20 steps, but the run has 19",
        callback_for(),
        TinyMLP(),
        TinyMLP.batches(19),
    )


def test_run_too_short_for_its_phases() -> None:
    refuse("a run of 2 steps is too short", DGMCallback(), TinyMLP(), TinyMLP.batches(2))


def test_model_whose_every_layer_is_outside_the_optimizer() -> None:
    class HeadOnly(TinyMLP):
        def parameter_groups(self) -> Any:
            return self.net[4].parameters()

    refuse("optimizer", callback_for(), HeadOnly(), TinyMLP.batches(20))


def test_an_optimizer_that_is_made_once_the_fit_has_begun() -> None:
    class MadeLate(TinyMLP):
        def configure_optimizers(self) -> Any:
            return None

        def on_fit_start(self) -> None:
            self.own = torch.optim.SGD(self.parameters(), 0.1)

    message = "there is no optimizer yet: make it in configure_optimizers, not in a later hook; found"
    with pytest.warns(UserWarning, match="returned `None`"):
        refuse(message, callback_for(), MadeLate(), TinyMLP.batches(20))


# --------------------------------------------------------------------------- checkpoints


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A run of 20 steps, saved after the seventh."""
    path = tmp_path / "saved.ckpt"

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 7:
                trainer.save_checkpoint(path)

    make_trainer(callback_for(), Save(), max_steps=20, max_epochs=-1).fit(TinyMLP(), TinyMLP.batches(20))
    return path


def refuse_checkpoint(message: str, path: Path, callback: DGMCallback, module: Any = None, **settings: Any) -> None:
    loader = ResumableLoader(TinyMLP.batches(20))
    settings = {"max_steps": 20, "max_epochs": -1} | settings
    refuse(message, callback, module or TinyMLP(), loader, ckpt_path=path, **settings)


def test_the_checkpoint_itself_is_fine(checkpoint: Path) -> None:
    module, callback = TinyMLP(), callback_for()
    trainer = make_trainer(callback, max_steps=20, max_epochs=-1)
    trainer.fit(module, ResumableLoader(TinyMLP.batches(20)), ckpt_path=checkpoint)
    assert callback.controller.steps == 20
    assert_final(module, callback)


def test_checkpoint_of_another_schedule(checkpoint: Path) -> None:
    other = EstDgm(
        exploration=Phase(0.7, 0.6, 5),
        consolidation=Phase(0.4, 0.3, 5),
        refinement=Phase(0.2, 0.1, 10),
        update_every=5,
        observe_steps=2,
        freeze=0.5,
    )
    refuse_checkpoint(
        r"another schedule: its settings are \{.*'start': 0.3.*this run's are \{.*'start': 0.4",
        checkpoint,
        DGMCallback(DGMConfig(schedule=other)),
    )


def test_checkpoint_of_other_masked_layers(checkpoint: Path) -> None:
    refuse_checkpoint(
        r"another model or other masked layers: they differ in \['net.2'\]; 'net.2' is \(\(16, 16\), 1\) there and",
        checkpoint,
        callback_for(selection={"exclude": ("net.2",)}),
    )


def test_checkpoint_with_another_block_size(checkpoint: Path) -> None:
    refuse_checkpoint(
        r"'net.0' is \(\(16, 16\), 1\) there and \(\(16, 16\), 16\) here", checkpoint, callback_for(units={"size": 16})
    )


def test_checkpoint_of_a_newer_version(checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    state["callbacks"]["DGMCallback"]["version"] = 99
    torch.save(state, checkpoint)
    refuse_checkpoint("expected a state of version 1, got 99", checkpoint, callback_for())


def test_checkpoint_with_a_damaged_mask(checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    layer = state["callbacks"]["DGMCallback"]["layers"]["net.2"]
    layer["mask"] = layer["mask"][:-1]
    torch.save(state, checkpoint)
    refuse_checkpoint("packed mask must be uint8 with 32 bytes", checkpoint, callback_for())


def test_damaged_block_mask_leaves_no_swapped_layer(tmp_path: Path) -> None:
    trainer = make_trainer(callback_for(backend="cpu"), max_steps=20, max_epochs=-1)
    trainer.fit(MLP(), MLP.batches(20))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    state = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    layer = state["callbacks"]["DGMCallback"]["layers"]["net.2"]
    layer["mask"] = layer["mask"][:-1]
    state["loops"] = {}
    torch.save(state, tmp_path / "saved.ckpt")
    module, callback = MLP(), callback_for(backend="cpu")
    refuse_checkpoint("packed mask must be uint8", tmp_path / "saved.ckpt", callback, module)


def test_refused_checkpoint_does_not_spoil_a_later_run(checkpoint: Path) -> None:
    callback = callback_for(selection={"exclude": ("net.2",)})
    refuse_checkpoint("another model", checkpoint, callback)
    module = TinyMLP()
    make_trainer(callback, max_epochs=1).fit(module, TinyMLP.batches(20))
    assert callback.controller.steps == 20
    assert_final(module, callback)


# --------------------------------------------------------------------------- NaN and infinite gradients


class Spoils(TinyMLP):
    """Gives a NaN or infinite gradient, but only to gradients and only in some steps, and clips it away."""

    value: float = float("nan")
    bad: tuple[int, ...] = ()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.trainer.global_step in self.bad:
            for parameter in self.parameters():
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        return loss * self.value if self.training and self.trainer.global_step in self.bad else loss


def window_of(callback: DGMCallback) -> Any:
    return callback.state_dict()["layers"].get("net.0", {}).get("window")  # no layer in the first step


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_gradients_in_a_window_are_left_out_and_said_once(value: float) -> None:
    module, callback = Spoils(), callback_for()
    module.value, module.bad = value, (3, 8, 13)
    samples = {}

    class Look(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            window = window_of(callback)
            samples[callback.controller.steps] = window and window["samples"]

        def on_before_zero_grad(self, *args: Any) -> None:
            window = window_of(callback)
            assert window is None or torch.isfinite(window["gradient"]).all()

    with pytest.warns(RuntimeWarning, match="NaN or infinite") as caught:
        make_trainer(callback, Look(), max_epochs=1).fit(module, TinyMLP.batches(20))
    assert len([w for w in caught if issubclass(w.category, RuntimeWarning)]) == 1
    assert (samples[4], samples[9], samples[14]) == (None, None, None)
    assert callback.controller.updates == 3
    assert_final(module, callback)


def test_a_wholly_nonfinite_window_puts_the_update_off() -> None:
    module, callback = Spoils(), callback_for()
    module.bad = (3, 4, 5)
    densities = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            densities.append(round(callback.density, 2))

    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        make_trainer(callback, Look(), max_epochs=1).fit(module, TinyMLP.batches(20))
    assert densities[3:8] == [0.7, 0.7, 0.7, 0.3, 0.3]
    assert_final(module, callback)


def test_nonfinite_gradients_outside_windows_are_none_of_our_business(recwarn: pytest.WarningsRecorder) -> None:
    module, callback = Spoils(), callback_for()
    module.bad = (1, 6, 17)
    make_trainer(callback, max_epochs=1).fit(module, TinyMLP.batches(20))
    assert [w for w in recwarn if "NaN" in str(w.message)] == []
    assert_final(module, callback)


def test_convolutions_refuse_blocks_that_do_not_fit() -> None:
    refuse(
        r"Units\(size=16\) does not fit layer 'features.0' with weight \(8, 3, 3, 3\)",
        callback_for(units={"size": 16}),
        ConvNet(),
        ConvNet.batches(20),
    )
