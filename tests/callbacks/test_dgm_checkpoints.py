"""Checkpoints of every origin: without our state, of weights alone, read without this package, for evaluation."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from helpers.models import (
    MLP,
    NO_VALIDATION_LOADER,
    Batches,
    TinyMLP,
    assert_final,
    assert_masked,
    make_trainer,
    weight_masks,
)
from helpers.runs import EPOCH_STEPS, SCHEDULE, STEPS, Run, SaveAt, differences, end_of, load
from lightning_estdgm import DGMCallback, DGMConfig

pytestmark = [
    pytest.mark.filterwarnings(NO_VALIDATION_LOADER),
    pytest.mark.filterwarnings("ignore:You defined a `predict_step`"),
    pytest.mark.filterwarnings("ignore:Be aware .*add the following callbacks.*ModelCheckpoint"),
]

NO_STATE = "holds no state of DGMCallback"


class Look(pl.Callback):
    """Remembers masks and weights as the training starts from them, or after some steps.

    Args:
        after: number of steps of this fit after which it looks.

    """

    def __init__(self, after: int = 0) -> None:
        self.after = after

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.after == 0:
            self.look(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.after -= 1
        if self.after == 0:
            self.look(trainer, pl_module)

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        dgm = next(c for c in trainer.callbacks if isinstance(c, DGMCallback))  # type: ignore[attr-defined]
        self.masks = dgm.masks()
        self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.controller = (dgm.controller.steps, dgm.controller.position)
        self.optimizer = [
            [value.clone() for value in state.values() if value.dim() == 2]
            for weight, _ in weight_masks(pl_module, dgm).values()
            for state in [trainer.optimizers[0].state[weight]]
        ]
        self.kept = [mask for _, mask in weight_masks(pl_module, dgm).values()]


def without_state(path: Path, to: Path) -> dict[str, Any]:
    """Write a checkpoint less our state, and return the state."""
    checkpoint = load(path)
    state = checkpoint["callbacks"].pop("DGMCallback")
    torch.save(checkpoint, to)
    return state


# --------------------------------------------------------------------------- without our state


@pytest.fixture(scope="module", params=["single weights", "blocks"])
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[int, Path]]:
    run = Run(TinyMLP if request.param == "single weights" else MLP)
    folder = tmp_path_factory.mktemp("straight")
    saves = [SaveAt("on_train_batch_end", step, folder / f"{step}.ckpt") for step in (6, 12, 34)]
    run.fit(*saves)
    return run, {save.step: save.path for save in saves}


@pytest.mark.parametrize("step", [6, 34])
def test_masks_come_back_from_the_zeros_of_the_weights(
    straight: tuple[Run, dict[int, Path]], step: int, tmp_path: Path
) -> None:
    run, saved = straight
    without_state(saved[step], tmp_path / "bare.ckpt")
    look, again = Look(), Look()
    with pytest.warns(UserWarning, match=f"is at step {step} but {NO_STATE}") as told:
        module, callback, _ = run.fit(look, ckpt=tmp_path / "bare.ckpt")
    run.fit(again, ckpt=saved[step])
    (message,) = (str(w.message) for w in told if NO_STATE in str(w.message))
    assert "2 of 2 masked layers (net.0, net.2) hold as many zeros as the schedule leaves" in message
    density = sum(m.sum() for m in look.masks.values()) / sum(m.numel() for m in look.masks.values())
    assert f"for density {density:.3f}" in message
    assert density == pytest.approx(callback.schedule(step).density, rel=0.03)
    assert differences(look.masks, again.masks) == []
    assert differences(look.weights, dict(load(saved[step])["state_dict"])) == []
    assert differences(look.optimizer, again.optimizer) == []
    assert look.controller == again.controller == (step, step)
    assert_final(module, callback)


def test_masks_and_weights_go_straight_on_where_no_window_was_open(
    straight: tuple[Run, dict[int, Path]], tmp_path: Path
) -> None:
    """In the frozen tail, where nothing but the masks decides what comes."""
    run, saved = straight
    without_state(saved[34], tmp_path / "bare.ckpt")
    ends = []
    for path in (saved[34], tmp_path / "bare.ckpt"):
        if path != saved[34]:
            with pytest.warns(UserWarning, match=NO_STATE):
                ends.append(end_of(*run.fit(ckpt=path)))
        else:
            ends.append(end_of(*run.fit(ckpt=path)))
    for part in ("weights", "optimizers", "masks", "global_step"):
        assert differences(ends[0][part], ends[1][part]) == [], part


def test_units_that_an_update_has_just_grown_cannot_be_told_and_are_drawn(
    straight: tuple[Run, dict[int, Path]], tmp_path: Path
) -> None:
    run, saved = straight
    state = without_state(saved[12], tmp_path / "bare.ckpt")
    assert state["updates"] == 3
    look, again = Look(), Look()
    with pytest.warns(UserWarning, match="hold more zeros than the schedule leaves: some of these units are active"):
        module, callback, _ = run.fit(look, ckpt=tmp_path / "bare.ckpt")
    run.fit(again, ckpt=saved[12])
    weights = load(saved[12])["state_dict"]
    for name, mask in look.masks.items():
        assert mask.sum() == again.masks[name].sum()
        assert not torch.equal(mask, again.masks[name])
    for (name, kept), mask in zip(look.masks.items(), look.kept, strict=True):
        assert torch.count_nonzero(weights[f"{name}.weight"][~mask]) == 0, "no weight was lost"
        assert kept.any()
    assert differences(look.weights, dict(weights)) == []
    assert_final(module, callback)


class LateStrategy(SingleDeviceStrategy):
    """Restores checkpoints after the start of the fit, as FSDP does."""

    restore_checkpoint_after_setup = True


@pytest.mark.parametrize(
    ("strategy", "storage"),
    [(SingleDeviceStrategy, "dense"), (SingleDeviceStrategy, "packed"), (LateStrategy, "dense")],
)
def test_a_checkpoint_without_any_callback_s_state_is_as_one_without_ours(
    strategy: Any, storage: str, tmp_path: Path
) -> None:
    run, path = Run(TinyMLP, config={"storage": storage}), tmp_path / "saved.ckpt"
    run.fit(SaveAt("on_train_batch_end", 14, path))
    without_state(path, tmp_path / "ours.ckpt")
    checkpoint = load(path)
    del checkpoint["callbacks"]
    torch.save(checkpoint, tmp_path / "all.ckpt")
    ends = []
    for name in ("ours", "all"):
        run.trainer["strategy"] = strategy("cpu")
        with pytest.warns(UserWarning, match=f"is at step 14 but {NO_STATE}"):
            ends.append(end_of(*run.fit(ckpt=tmp_path / f"{name}.ckpt")))
    assert differences(*ends) == []
    assert ends[0]["dgm"]["steps"] == STEPS


def save_dense(run: Run, step: int, path: Path) -> None:
    """Train without the callback, and save after a step."""
    pl.seed_everything(0, verbose=False)
    trainer = make_trainer(SaveAt("on_train_batch_end", step, path), max_steps=STEPS, max_epochs=-1)
    trainer.fit(run.module(), run.loader())


@pytest.mark.parametrize("cls", [TinyMLP, MLP])
def test_dense_weights_keep_their_largest_units_at_the_density_of_that_step(cls: Any, tmp_path: Path) -> None:
    """After one more dense step, which shows the layers that train."""
    run, path, later = Run(cls), tmp_path / "dense.ckpt", tmp_path / "later.ckpt"
    save_dense(run, 14, path)
    save_dense(run, 15, later)
    look = Look(after=1)
    with pytest.warns(UserWarning, match="no layer holds zeros: the largest units stay active, once the next step"):
        module, callback, trainer = run.fit(look, ckpt=path)
    assert callback.controller.steps == STEPS == trainer.global_step
    assert look.controller == (15, 15)
    dense = load(later)["state_dict"]
    density = callback.schedule(15).density
    sizes = [(mask.sum() / mask.numel()).item() for mask in look.kept]
    assert sum(sizes) / 2 == pytest.approx(density, rel=0.02)
    for (name, mask), kept in zip(look.masks.items(), look.kept, strict=True):
        weight = dense[f"{name}.weight"]
        assert torch.equal(look.weights[f"{name}.weight"], weight.where(kept, 0.0)), "no scaling, only zeros"
        block = weight.shape[0] // mask.shape[0]
        norms = weight.unflatten(1, (-1, block)).unflatten(0, (-1, block)).square().sum((1, 3))
        assert norms[mask].min() > norms[~mask].max()
    for states, kept in zip(look.optimizer, look.kept, strict=True):
        assert len(states) == 2
        assert all(torch.count_nonzero(state[~kept]) == 0 for state in states)
        assert all(torch.count_nonzero(state[kept]) > 0 for state in states)
    assert_final(module, callback)
    assert all(d.final_backend != "?" for d in callback.decisions())
    assert callback.flops_ratio < 0.5


def test_dense_weights_of_a_frozen_run_keep_every_value(tmp_path: Path) -> None:
    run, path = Run(TinyMLP, config={"inactive": "frozen"}), tmp_path / "dense.ckpt"
    save_dense(run, 14, path)
    save_dense(run, 15, tmp_path / "later.ckpt")
    look = Look(after=1)
    with pytest.warns(UserWarning, match=NO_STATE):
        run.fit(look, ckpt=path)
    assert look.masks.keys() == {"net.0", "net.2"}
    assert differences(look.weights, dict(load(tmp_path / "later.ckpt")["state_dict"])) == []


def test_backends_are_chosen_for_the_tokens_of_the_resumed_run(tmp_path: Path) -> None:
    """The first step shows them, whatever its number."""
    run, path = Run(MLP), tmp_path / "dense.ckpt"
    save_dense(run, 5, path)
    with pytest.warns(UserWarning, match=NO_STATE):
        _, callback, _ = run.fit(ckpt=path)
    assert set(callback.controller.state_dict()["positions"].values()) == {8}


def test_missing_callback_on_resume_warns_and_its_next_checkpoint_can_be_taken_up(
    straight: tuple[Run, dict[int, Path]], tmp_path: Path
) -> None:
    run, saved = straight
    save = SaveAt("on_train_batch_end", 20, tmp_path / "without.ckpt")
    trainer = make_trainer(save, max_steps=20, max_epochs=-1)
    with pytest.warns(UserWarning, match=r"Please add the following callbacks: \['DGMCallback'\]"):
        trainer.fit(run.module(), run.loader(), ckpt_path=saved[12])
    assert "DGMCallback" not in load(save.path)["callbacks"]
    with pytest.warns(UserWarning, match="no layer holds zeros: the largest units stay active"):
        module, callback, _ = run.fit(ckpt=save.path)
    assert_final(module, callback)


def test_checkpoint_of_step_0_without_our_state_is_a_start(tmp_path: Path) -> None:
    run, path = Run(TinyMLP), tmp_path / "start.ckpt"

    class SaveFirst(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(path)

    pl.seed_everything(0, verbose=False)
    module = run.module()
    make_trainer(SaveFirst(), max_steps=STEPS, max_epochs=-1).fit(module, run.loader())
    end = end_of(*run.fit())
    assert differences(end, end_of(*run.fit(ckpt=path, seed=0))) == []


# --------------------------------------------------------------------------- weights alone


def test_weights_only_checkpoint_is_refused_by_lightning_and_its_weights_start_a_new_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(TinyMLP)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=36, save_weights_only=True)
    trained, dgm, _ = run.fit(keep)
    path = tmp_path / "step=36.ckpt"
    assert "callbacks" not in load(path)
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        run.fit(ckpt=path)

    module = TinyMLP.load_from_checkpoint(path, weights_only=True)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    look, drawn, callback = Look(), Look(after=1), DGMCallback(DGMConfig(schedule=SCHEDULE))
    trainer = make_trainer(callback, look, drawn, max_steps=STEPS, max_epochs=-1)
    caplog.set_level("INFO", logger="lightning.pytorch")
    trainer.fit(module, run.loader())
    assert caplog.text.count("A new run starts from weights with zeros: 2 of 2 masked layers (net.0, net.2)") == 1
    assert differences(look.weights, before) == [], "no trained weight was dropped or scaled"
    for name, mask in dgm.masks().items():
        assert (drawn.masks[name] & mask).sum() == mask.sum(), "what was active stays active"
        assert drawn.masks[name].sum() > 3 * mask.sum()
    assert_final(module, callback)
    assert type(trained) is TinyMLP


# --------------------------------------------------------------------------- without this package


def test_our_checkpoint_is_read_where_this_package_is_absent(tmp_path: Path) -> None:
    """By `torch.load(weights_only=True)` and `load_from_checkpoint` of the user's module, in a fresh process."""
    path = tmp_path / "ours.ckpt"
    run = Run(MLP, config={"backend": "cpu"})
    module, _, _ = run.fit(SaveAt("on_train_batch_end", 14, path))
    x = MLP.batches(1)[0][0]
    weights = load(path)["state_dict"]
    module.load_state_dict(weights)
    torch.save({"x": x, "y": module(x)}, tmp_path / "expected.pt")
    (tmp_path / "user.py").write_text(
        textwrap.dedent(
            """
            import sys
            from pathlib import Path

            class Absent:
                def find_spec(self, name, path=None, target=None):
                    if name.partition(".")[0] == "lightning_estdgm":
                        raise ModuleNotFoundError(name)

            sys.meta_path.insert(0, Absent())
            import lightning.pytorch as pl
            import torch
            from torch import nn

            class MLP(pl.LightningModule):
                def __init__(self):
                    super().__init__()
                    wide, narrow = (nn.Linear(128, 128) for _ in range(2)), nn.Linear(128, 1)
                    self.net = nn.Sequential(next(wide), nn.GELU(), next(wide), nn.GELU(), narrow)

            folder = Path(__file__).parent
            checkpoint = torch.load(folder / "ours.ckpt", weights_only=True)
            assert checkpoint["callbacks"]["DGMCallback"]["steps"] == 14
            module = MLP.load_from_checkpoint(folder / "ours.ckpt", weights_only=True)
            expected = torch.load(folder / "expected.pt", weights_only=True)
            assert torch.equal(module.net(expected["x"]), expected["y"])
            assert (module.net[0].weight == 0).float().mean() > 0.5
            assert not any(name.startswith("lightning_estdgm") for name in sys.modules)
            print("read without the package")
            """
        )
    )
    done = subprocess.run([sys.executable, str(tmp_path / "user.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("read without the package\n")


# --------------------------------------------------------------------------- ModelCheckpoint


class Validated(TinyMLP):
    """Its monitored value goes down and up again, so that the best checkpoint is neither the first nor the last."""

    def on_validation_epoch_end(self) -> None:
        self.log("watched", float(abs(self.trainer.global_step - 24)))


@pytest.mark.filterwarnings("ignore:the best checkpoint by")
def test_top_k_and_last_checkpoints_resume_and_evaluate(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{step}", monitor="watched", save_top_k=2, save_last=True)

    def fit(*callbacks: pl.Callback, ckpt: Path | str | None = None, seed: int = 0, sanity: int = 2) -> Any:
        pl.seed_everything(seed, verbose=False)
        module, callback = Validated(), DGMCallback(DGMConfig(schedule=SCHEDULE))
        trainer = make_trainer(
            callback,
            *callbacks,
            max_epochs=STEPS // EPOCH_STEPS,
            enable_checkpointing=bool(callbacks),
            num_sanity_val_steps=sanity,
        )
        trainer.fit(module, TinyMLP.batches(EPOCH_STEPS), TinyMLP.batches(2), ckpt_path=ckpt)
        return module, callback, trainer

    module, callback, trainer = fit(keep)
    end = end_of(module, callback, trainer)
    assert {path.name for path in tmp_path.iterdir()} == {"step=16.ckpt", "step=24.ckpt", "last.ckpt"}
    assert Path(keep.best_model_path).name == "step=24.ckpt"
    assert differences(end, end_of(*fit(sanity=0))) == [], "the sanity check changes nothing"
    for name in ("step=16.ckpt", "last.ckpt"):
        assert differences(end, end_of(*fit(ckpt=tmp_path / name, seed=1))) == []
    assert load(tmp_path / "last.ckpt")["callbacks"]["DGMCallback"]["steps"] == 24
    check_evaluation(Path(keep.best_model_path), trainer, callback)


def check_evaluation(path: Path, fitted: pl.Trainer, dgm: DGMCallback) -> None:
    """`validate`, `test` and `predict` give what the masked weights give, after a fit, with the callback, without."""
    weights = load(path)["state_dict"]
    plain = TinyMLP()
    plain.load_state_dict(weights)
    batches = TinyMLP.batches(3)
    with torch.no_grad():
        expected = {
            "loss": torch.stack([plain.loss(batch) for batch in batches]).mean(),
            "outputs": [plain(x) for x, _ in batches],
        }
    masks = dgm.masks()
    for trainer in (fitted, make_trainer(DGMCallback(DGMConfig(schedule=SCHEDULE))), make_trainer()):
        for module in (TinyMLP(), TinyMLP(optimizer="sgd")):
            for stage in ("validate", "test"):
                (found,) = getattr(trainer, stage)(module, Batches(batches), ckpt_path=path, verbose=False)
                name = "val_loss" if stage == "validate" else "test_loss"
                torch.testing.assert_close(torch.tensor(found[name]), expected["loss"])
            outputs = trainer.predict(module, Batches(batches), ckpt_path=path)
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected["outputs"], strict=True))
            assert differences(dict(module.state_dict()), dict(weights)) == []
            assert {type(layer).__name__ for layer in module.net} == {"Linear", "GELU"}
    assert differences(masks, dgm.masks()) == [], "what the callback knows of its fit stays"


def test_validation_of_a_checkpoint_is_no_start_for_the_next_fit(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    run = Run(TinyMLP)
    end = end_of(*run.fit(SaveAt("on_train_batch_end", 14, path)))
    callback = run.callback()
    trainer = make_trainer(callback, max_steps=STEPS, max_epochs=-1)
    trainer.validate(TinyMLP(), TinyMLP.batches(1), ckpt_path=path, verbose=False)
    pl.seed_everything(0, verbose=False)
    module = run.module()
    trainer.fit(module, run.loader())
    assert differences(end, end_of(module, callback, trainer)) == []


def test_a_checkpoint_in_the_middle_of_an_epoch_validates_as_masked(tmp_path: Path) -> None:
    """Validation inside a fit, also in an observation window, sees zeros outside the masks."""
    seen: list[Tensor] = []

    class Watches(TinyMLP):
        def on_validation_start(self) -> None:
            dgm = self.trainer.callbacks[0]
            assert_masked(self, dgm)
            seen.append(torch.tensor(dgm.controller.observing))

    trainer = make_trainer(
        DGMCallback(DGMConfig(schedule=SCHEDULE)), max_steps=STEPS, max_epochs=-1, val_check_interval=1
    )
    trainer.fit(Watches(), TinyMLP.batches(EPOCH_STEPS), TinyMLP.batches(1))
    assert len(seen) == STEPS + 1
    assert {bool(x) for x in seen} == {True, False}
