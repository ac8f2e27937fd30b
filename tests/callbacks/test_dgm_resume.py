"""A run stopped after any step and resumed from its checkpoint equals the run that went straight through."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from helpers.models import GAN, MLP, NO_VALIDATION_LOADER, ResumableLoader, TinyMLP, assert_final, make_trainer
from helpers.runs import EPOCH_STEPS, SCHEDULE, STEPS, Run, SaveAt, differences, end_of, load
from lightning_estdgm import DGMCallback, DGMConfig
from lightning_estdgm.method._masks import unpack_bits
from lightning_estdgm.recipes import ByteGPT, StdlibText

pytestmark = [
    pytest.mark.filterwarnings(NO_VALIDATION_LOADER),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
]

STOPS = {
    "first step": 1,
    "inside a window": 6,
    "end of an epoch": 8,
    "just before an update": 11,
    "phase border": 12,
    "mid-epoch": 21,
    "frozen tail": 36,
}


RUNS = {
    "single weights": Run(TinyMLP),
    "accumulation and clipping": Run(TinyMLP, accumulate=2, gradient_clip_val=0.5),
    "blocks, forced cpu backend": Run(MLP, config={"backend": "cpu"}),
    "blocks, auto backend, accumulation": Run(MLP, accumulate=2, config={"units": {"size": 16}}),
    "frozen": Run(MLP, config={"inactive": "frozen", "backend": "cpu"}),
    "bf16-mixed": Run(TinyMLP, precision="bf16-mixed"),
    "two manual optimizers": Run(GAN),
}


class Straight:
    """One uninterrupted run, with a checkpoint after each step."""

    def __init__(self, run: Run, directory: Path) -> None:
        self.run, self.directory = run, directory
        every = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        module, callback, trainer = run.fit(every)
        self.end = end_of(module, callback, trainer)
        self.scale = 2 if run.cls is GAN else 1  # Lightning counts every manual optimizer's step

    def checkpoint(self, step: int) -> Path:
        return self.directory / f"step={step * self.scale}.ckpt"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Straight]:
    made: dict[str, Straight] = {}

    def get(name: str) -> Straight:
        if name not in made:
            made[name] = Straight(RUNS[name], tmp_path_factory.mktemp("straight"))
        return made[name]

    return get


# --------------------------------------------------------------------------- equality


@pytest.mark.parametrize(("name", "stop"), list(itertools.product(RUNS, STOPS)))
def test_resumed_equals_straight(straight: Callable[[str], Straight], name: str, stop: str) -> None:
    run = straight(name)
    step = STOPS[stop]
    path = run.checkpoint(step)
    state = load(path)["callbacks"]["DGMCallback"]
    assert state["steps"] == step
    window = next(iter(state["layers"].values()))["window"]
    assert (window["samples"] if window else 0) == {1: 0, 6: 1, 11: 2, 21: 0}.get(step, 0)

    module, callback, trainer = run.run.fit(ckpt=path, seed=1)
    assert differences(run.end, end_of(module, callback, trainer)) == []
    assert callback.controller.steps == STEPS
    if run.run.config.get("inactive") != "frozen":
        assert_final(module, callback)


class FrozenForAnEpoch(TinyMLP):
    """The head, which stays dense, trains alone in the third epoch."""

    def on_train_epoch_start(self) -> None:
        self.net[:-1].requires_grad_(self.current_epoch != 2)


@pytest.mark.parametrize("step", [1, 15])
def test_steps_of_dense_layers_alone_do_not_count_after_a_resume_either(step: int, tmp_path: Path) -> None:
    run = Straight(Run(FrozenForAnEpoch), tmp_path)
    module, callback, trainer = run.run.fit(ckpt=run.checkpoint(step), seed=1)
    assert differences(run.end, end_of(module, callback, trainer)) == []
    assert callback.controller.steps == STEPS - EPOCH_STEPS


def test_comparison_sees_another_seed(straight: Callable[[str], Straight]) -> None:
    run = straight("single weights")
    different = differences(run.end, end_of(*run.run.fit(seed=1)))
    assert ".weights.net.0.weight" in different


def test_optimizer_and_weights_are_what_the_resumed_run_goes_on_from(straight: Callable[[str], Straight]) -> None:
    run = straight("single weights")
    path = run.checkpoint(6)
    saved = load(path)
    seen: dict[str, Any] = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            seen["weights"] = {k: v.clone() for k, v in pl_module.state_dict().items()}
            seen["optimizers"] = [o.state_dict() for o in trainer.optimizers]
            seen["dgm"] = trainer.callbacks[0].state_dict()

    run.run.fit(Look(), ckpt=path, seed=1)
    assert differences(seen["weights"], dict(saved["state_dict"])) == []
    assert differences(seen["dgm"], saved["callbacks"]["DGMCallback"]) == []


# --------------------------------------------------------------------------- controls: every field matters


def _flip_first_units(layer: dict[str, Any]) -> None:
    layer["mask"] = layer["mask"].clone()
    layer["mask"][0] ^= 0b11


SPOILED: dict[str, Callable[[dict[str, Any]], None]] = {
    "window dropped": lambda s: s["layers"]["net.0"].update(window=None),
    "window's gradient": lambda s: s["layers"]["net.0"]["window"]["gradient"].zero_(),
    "window's norm": lambda s: s["layers"]["net.0"]["window"]["norm"].fill_(1.0),
    "window's samples": lambda s: [layer["window"].update(samples=3) for layer in s["layers"].values()],
    "mask": lambda s: _flip_first_units(s["layers"]["net.0"]),
    "explored": lambda s: s["layers"]["net.0"]["explored"].fill_(255),
    "steps": lambda s: s.update(steps=s["steps"] + 1),
    "position": lambda s: s.update(position=s["position"] + 2),
    "churn": lambda s: s.update(churn=0.5),
    "waiting": lambda s: s.update(waiting=True),
    "updates": lambda s: s.update(updates=0),
    "flops": lambda s: s.update(flops={"analytic": 0.0, "executed": 0.0, "dense": 0.0}),
    "positions": lambda s: s.update(positions={}),
    "dtypes": lambda s: s.update(dtypes={}),
    "selector": lambda s: s.update(selector={"choices": []}),
}


@pytest.mark.parametrize("field", SPOILED)
def test_control_a_spoiled_field_is_seen(straight: Callable[[str], Straight], field: str, tmp_path: Path) -> None:
    run = straight("blocks, auto backend, accumulation" if field in ("selector", "dtypes") else "single weights")
    checkpoint = load(run.checkpoint(6))
    SPOILED[field](checkpoint["callbacks"]["DGMCallback"])
    torch.save(checkpoint, tmp_path / "spoiled.ckpt")
    after_one = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if not after_one and trainer.global_step == 7:
                after_one.update(trainer.callbacks[0].state_dict())

    try:
        end = end_of(*run.run.fit(Look(), ckpt=tmp_path / "spoiled.ckpt", seed=1))
    except (ValueError, UserWarning):
        return  # refused outright, or said: weights outside the masks
    # Some leave no trace at the end, such as a common factor of all scores: then a step later.
    regular = load(run.checkpoint(7))["callbacks"]["DGMCallback"]
    assert differences(run.end, end) + differences(regular, after_one) != []


def test_control_an_unspoiled_checkpoint_is_equal_a_step_later_too(
    straight: Callable[[str], Straight], tmp_path: Path
) -> None:
    run = straight("single weights")
    save = SaveAt("on_train_batch_end", 7, tmp_path / "next.ckpt")
    run.run.fit(save, ckpt=run.checkpoint(6), seed=1)
    regular, saved = (load(path)["callbacks"]["DGMCallback"] for path in (run.checkpoint(7), save.path))
    assert differences(regular, saved) == []


@pytest.mark.parametrize("part", ["optimizer_states", "lr_schedulers", "state_dict"])
def test_control_the_rest_of_the_checkpoint_matters_too(
    straight: Callable[[str], Straight], part: str, tmp_path: Path
) -> None:
    run = straight("single weights")
    checkpoint = load(run.checkpoint(6))
    if part == "state_dict":
        checkpoint["state_dict"]["net.0.weight"].mul_(0.5)
    elif part == "lr_schedulers":
        checkpoint[part][0]["last_epoch"] += 1
    else:
        for state in checkpoint[part][0]["state"].values():
            state["exp_avg"].zero_()
    torch.save(checkpoint, tmp_path / "spoiled.ckpt")
    assert differences(run.end, end_of(*run.run.fit(ckpt=tmp_path / "spoiled.ckpt", seed=1))) != []


def test_resumed_run_makes_the_choices_of_the_checkpoint(straight: Callable[[str], Straight], tmp_path: Path) -> None:
    """A measurement would come out "dense" for layers this small: what was saved is used instead."""
    run = straight("blocks, auto backend, accumulation")
    assert {d[2] for d in run.end["decisions"]} == {"dense"}
    checkpoint = load(run.checkpoint(6))
    state = checkpoint["callbacks"]["DGMCallback"]
    for choice in state["selector"]["choices"]:
        choice |= {"backend": "cpu", "dense_s": 2.0, "sparse_s": 1.0}
    for layer in state["layers"].values():
        layer["backend"] = "cpu"
    torch.save(checkpoint, tmp_path / "cpu.ckpt")
    _, callback, _ = run.run.fit(ckpt=tmp_path / "cpu.ckpt", seed=1)
    assert [d.backend for d in callback.decisions()] == ["cpu", "cpu", "dense"]


# --------------------------------------------------------------------------- when and how a checkpoint is saved


@pytest.mark.parametrize("step", [6, 11])
@pytest.mark.parametrize("listed", ["before", "after"])
def test_checkpoint_saved_by_a_callback_before_or_after_ours(listed: str, step: int, tmp_path: Path) -> None:
    """Also where the user's `on_train_batch_end` runs first, and our step is not over yet."""
    run, path = RUNS["single weights"], tmp_path / "saved.ckpt"
    save = SaveAt("on_train_batch_end", step, path)
    end = end_of(*(run.fit(before=(save,)) if listed == "before" else run.fit(save)))
    assert differences(end, end_of(*run.fit(ckpt=path, seed=1))) == []


def test_checkpoint_saved_by_the_module(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"

    class Saves(TinyMLP):
        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            if self.trainer.global_step == 6 and not path.exists():
                self.trainer.save_checkpoint(path)

    run = Run(Saves)
    end = end_of(*run.fit())
    assert differences(end, end_of(*run.fit(ckpt=path, seed=1))) == []


def test_second_resume_equals_straight(straight: Callable[[str], Straight], tmp_path: Path) -> None:
    run = straight("single weights")
    save = SaveAt("on_train_batch_end", 22, tmp_path / "second.ckpt")
    run.run.fit(save, ckpt=run.checkpoint(6), seed=1)
    assert differences(run.end, end_of(*run.run.fit(ckpt=tmp_path / "second.ckpt", seed=2))) == []


def test_resume_by_a_callback_that_has_run_before(straight: Callable[[str], Straight]) -> None:
    run = straight("single weights")
    _, callback, _ = run.run.fit(seed=3)
    module = run.run.module()
    trainer = make_trainer(callback, max_steps=STEPS, max_epochs=-1)
    trainer.fit(module, run.run.loader(), ckpt_path=run.checkpoint(6))
    assert differences(run.end, end_of(module, callback, trainer)) == []


def test_resume_after_an_exception_through_a_checkpoint_saved_then(
    straight: Callable[[str], Straight], tmp_path: Path
) -> None:
    """The state stays readable after the hooks are gone."""
    run = straight("single weights")

    class Fails(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 6:
                raise RuntimeError("out of disk")

        def on_exception(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "failed.ckpt")

    with pytest.raises(RuntimeError, match="out of disk"):
        run.run.fit(Fails())
    saved, regular = load(tmp_path / "failed.ckpt"), load(run.checkpoint(6))
    assert differences(saved["callbacks"]["DGMCallback"], regular["callbacks"]["DGMCallback"]) == []
    assert differences(dict(saved["state_dict"]), dict(regular["state_dict"])) == []


@pytest.mark.parametrize("with_dgm", [True, False])
def test_resumable_loader_goes_on_where_it_was(with_dgm: bool, tmp_path: Path) -> None:
    """With `max_epochs` the run's length comes from the loader: asking for it must not start it anew."""
    orders: list[list[float]] = []

    class Watches(TinyMLP):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            orders[-1].append(batch[0][0, 0].item())
            return super().training_step(batch, batch_idx)

    def fit(*callbacks: pl.Callback, ckpt: Path | None = None) -> None:
        orders.append([])
        dgm = (DGMCallback(DGMConfig(schedule=SCHEDULE)),) if with_dgm else ()
        trainer = make_trainer(*dgm, *callbacks, max_epochs=5)
        trainer.fit(Watches(), ResumableLoader(TinyMLP.batches(EPOCH_STEPS)), ckpt_path=ckpt)

    fit(SaveAt("on_train_batch_end", 21, tmp_path / "saved.ckpt"))
    fit(ckpt=tmp_path / "saved.ckpt")
    assert orders[1] == orders[0][21:]


@pytest.mark.parametrize(("limit", "state"), [(None, {"epoch": 1, "position": 2}), (5, {"epoch": 2, "position": 3})])
def test_recipe_resumes_in_mid_epoch_on_the_same_batches(
    limit: int | None, state: dict[str, int], tmp_path: Path
) -> None:
    """`StdlibText`'s loader is stateful; also where an epoch ends before the loader does."""
    (tmp_path / "text.txt").write_bytes(bytes(i * i % 251 for i in range(6000)))

    def fit(*callbacks: pl.Callback, ckpt: Path | None = None, seed: int = 0) -> dict[str, Any]:
        pl.seed_everything(seed, verbose=False)
        module, callback = ByteGPT(width=16, layers=1, heads=1, context=16), DGMCallback(DGMConfig(schedule=SCHEDULE))
        trainer = make_trainer(
            callback, *callbacks, max_steps=STEPS, max_epochs=-1, limit_train_batches=limit, num_sanity_val_steps=0
        )
        data = StdlibText(context=16, batch_size=32, path=tmp_path / "text.txt", val_windows=4)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt)
        assert trainer.num_training_batches == (limit or 11)
        return end_of(module, callback, trainer)

    saves = [SaveAt("on_train_batch_end", step, tmp_path / f"{step}.ckpt") for step in (5, 13)]
    end = fit(*saves)
    for save in saves:
        assert differences(end, fit(ckpt=save.path, seed=1)) == []
    checkpoint = load(saves[1].path)
    assert checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [state]
    del checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    torch.save(checkpoint, saves[1].path)
    assert differences(end, fit(ckpt=saves[1].path, seed=1)) != []


@pytest.mark.parametrize("step", [6, 8, 21])
def test_resumed_equals_straight_with_max_epochs(step: int, tmp_path: Path) -> None:
    run, path = Run(TinyMLP, max_epochs=5, max_steps=-1), tmp_path / "saved.ckpt"
    run.module = lambda: TinyMLP()  # type: ignore[method-assign]
    end = end_of(*run.fit(SaveAt("on_train_batch_end", step, path)))
    assert differences(end, end_of(*run.fit(ckpt=path, seed=1))) == []


def test_fp16_with_a_skipped_first_step_resumes(tmp_path: Path) -> None:
    """Lightning has counted a step and we have not; the state is there all the same."""
    path = tmp_path / "saved.ckpt"
    results = []
    for ckpt in (None, path):
        pl.seed_everything(0, verbose=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-20)
        module, callback = TinyMLP(optimizer="sgd"), DGMCallback(DGMConfig(schedule=SCHEDULE))
        trainer = make_trainer(
            callback,
            SaveAt("on_train_batch_end", 1, path),
            max_steps=STEPS,
            max_epochs=-1,
            plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        )
        trainer.fit(module, ResumableLoader(TinyMLP.batches(EPOCH_STEPS)), ckpt_path=ckpt)
        assert callback.controller.steps == STEPS - 1
        results.append(end_of(module, callback, trainer))
    assert load(path)["callbacks"]["DGMCallback"]["steps"] == 0
    assert differences(*results) == []


def test_run_limited_by_time_resumes_where_it_was_in_the_schedule(tmp_path: Path) -> None:
    class SaveInConsolidation(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.callbacks[0].phase == "consolidation" and not (tmp_path / "saved.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    positions = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            positions.append(next(c for c in trainer.callbacks if isinstance(c, DGMCallback)).controller.position)

    settings = {"max_time": {"seconds": 2}, "max_epochs": -1}
    callback = DGMCallback()
    make_trainer(callback, SaveInConsolidation(), **settings).fit(TinyMLP(), TinyMLP.batches(30))
    saved = load(tmp_path / "saved.ckpt")["callbacks"]["DGMCallback"]
    module, callback = TinyMLP(), DGMCallback()
    make_trainer(callback, Look(), **settings).fit(
        module, ResumableLoader(TinyMLP.batches(30)), ckpt_path=tmp_path / "saved.ckpt"
    )
    assert saved["position"] <= positions[0] < 2 * saved["position"]
    assert_final(module, callback)


# --------------------------------------------------------------------------- what a checkpoint is


def test_checkpoint_is_that_of_a_dense_model(straight: Callable[[str], Straight]) -> None:
    """It loads without the callback, by weights alone, with the same keys, and computes the same."""
    run = straight("blocks, forced cpu backend")
    path = run.checkpoint(STEPS)
    plain = MLP()
    assert list(load(path)["state_dict"]) == list(plain.state_dict())
    loaded = MLP.load_from_checkpoint(path, weights_only=True)
    assert type(loaded.net[0]) is torch.nn.Linear
    assert differences(loaded.state_dict(), run.end["weights"]) == []
    x = MLP.batches(1)[0][0]
    plain.load_state_dict(run.end["weights"])
    assert torch.equal(loaded(x), plain(x))
    assert torch.count_nonzero(loaded.net[0].weight) == 16 * 16 * int(run.end["masks"]["net.0"].sum())


def test_checkpoint_resumes_without_the_callback(straight: Callable[[str], Straight]) -> None:
    run = straight("single weights")
    module = run.run.module()
    trainer = make_trainer(max_steps=STEPS, max_epochs=-1)
    trainer.fit(module, run.run.loader(), ckpt_path=run.checkpoint(21))
    assert trainer.global_step == STEPS
    assert torch.count_nonzero(module.net[0].weight) == module.net[0].weight.numel()


def test_state_holds_plain_types_and_packed_masks(straight: Callable[[str], Straight]) -> None:
    state = load(straight("single weights").checkpoint(6))["callbacks"]["DGMCallback"]

    def leaves(value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [leaf for item in value.values() for leaf in leaves(item)]
        return [leaf for item in value for leaf in leaves(item)] if isinstance(value, (list, tuple)) else [value]

    assert {type(leaf) for leaf in leaves(state)} <= {int, float, str, bool, type(None), Tensor}
    assert state["layers"]["net.0"]["mask"].numel() == 16 * 16 // 8
    assert state["layers"]["net.0"]["mask"].dtype == torch.uint8
    assert straight("single weights").run.callback().state_key == DGMCallback(total_steps=5).state_key == "DGMCallback"


def test_checkpoints_hold_no_window_between_windows(straight: Callable[[str], Straight]) -> None:
    for step, there in ((1, False), (2, True), (3, True), (4, False), (36, False)):
        state = load(straight("single weights").checkpoint(step))["callbacks"]["DGMCallback"]
        assert all((layer["window"] is not None) == there for layer in state["layers"].values())


def test_weights_in_every_checkpoint_are_masked(straight: Callable[[str], Straight]) -> None:
    run = straight("single weights")
    for step in (1, 6, 11, 22, STEPS):
        checkpoint = load(run.checkpoint(step))
        layers = checkpoint["callbacks"]["DGMCallback"]["layers"]
        for name, layer in layers.items():
            mask = unpack_bits(layer["mask"], (16, 16))
            weight = checkpoint["state_dict"][f"{name}.weight"]
            assert torch.count_nonzero(weight[~mask]) == 0
            assert torch.count_nonzero(weight[mask]) > 0.9 * mask.sum()
