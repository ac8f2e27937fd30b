"""`SparseCheckpointIO` in real Trainers: small files, and the same checkpoint back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from packaging.version import InvalidVersion

from helpers.checkpoints import INSIDE_A_WINDOW, STEPS, SaveAt, Unpicklable, end_of, fit, loader, ordinary
from helpers.distributed_jobs import run
from helpers.exact import differences
from helpers.models import (
    GAN,
    GPT2,
    MLP,
    NO_VALIDATION_LOADER,
    ConvNet,
    Encoder,
    ResumableLoader,
    callback_for,
    make_trainer,
)
from lightning_estdgm import DGMCallback, DGMConfig, EstDgm, Phase, SparseCheckpointIO
from lightning_estdgm.config import Units
from lightning_estdgm.recipes.gpt import ByteGPT

pytestmark = [
    pytest.mark.filterwarnings(NO_VALIDATION_LOADER),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Checkpoints of one run each, by model and settings, as Lightning makes them: by step, 14 and 20."""
    made: dict[str, dict[str, Any]] = {}

    def get(model: type[Any] = MLP, step: int = STEPS, **dgm: Any) -> dict[str, Any]:
        key = f"{model.__name__} {dgm}"
        if key not in made:
            folder, scale = tmp_path_factory.mktemp("saved"), 2 if model is GAN else 1
            saves = [SaveAt(at * scale, folder / f"{at}.ckpt") for at in (INSIDE_A_WINDOW, STEPS)]
            fit(*saves, model=model, dgm=dgm)
            made[key] = {save.path.stem: ordinary(save.path) for save in saves}
        return made[key][str(step)]

    return get


def round_trip(checkpoint: dict[str, Any], path: Path) -> Any:
    SparseCheckpointIO().save_checkpoint(checkpoint, path)
    return SparseCheckpointIO().load_checkpoint(path)


# --------------------------------------------------------------------------- exactness and size


@pytest.mark.parametrize("step", [INSIDE_A_WINDOW, STEPS])
@pytest.mark.parametrize(
    ("model", "dgm"),
    [
        (MLP, {}),
        (MLP, {"units": {"size": 1}}),
        (MLP, {"inactive": "frozen"}),
        (ConvNet, {}),
        (Encoder, {}),
        (GPT2, {}),
        (GAN, {}),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else str(x),
)
def test_checkpoint_comes_back_to_the_bit(
    saved: Callable[..., Any], model: type[Any], dgm: Any, step: int, tmp_path: Path
) -> None:
    """Linear layers and convolutions, fused projections, weights stored transposed, two optimizers."""
    checkpoint = saved(model, step, **dgm)
    assert differences(checkpoint, round_trip(checkpoint, tmp_path / "x.ckpt")) == []

    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    masked = checkpoint["callbacks"]["DGMCallback"]["layers"]
    worth = {name for name, x in masked.items() if torch.Size(x["shape"]).numel() >= 256}
    by_layer: dict[str, list[str]] = {}
    for entry in content["packed"]:
        by_layer.setdefault(entry.get("layer"), []).append(entry["path"][0])
    per_weight = {"optimizer_states": 2, "state_dict": 0 if dgm.get("inactive") == "frozen" else 1}
    for name in worth:
        places = by_layer.get(name, [])
        moments = 1 if name.startswith("discriminator") else per_weight["optimizer_states"]  # SGD has one
        assert places.count("optimizer_states") == moments, name
        assert places.count("state_dict") == per_weight["state_dict"], name
    assert set(by_layer) - {None} <= worth


def byte_gpt_checkpoint(folder: Path, block_size: int, inactive: str = "zero") -> Path:
    """The demo's model, 6.3 M masked weights, at density 0.10 after a few steps of AdamW."""
    schedule = EstDgm(
        exploration=Phase(0.7, 0.6, 1), consolidation=Phase(0.3, 0.2, 1), refinement=Phase(0.1, 0.1, 2), update_every=1
    )
    config = DGMConfig(schedule=schedule, units=Units(size=block_size), inactive=inactive, backend="dense")  # type: ignore
    pl.seed_everything(0, verbose=False)
    module, callback = ByteGPT(), DGMCallback(config)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(256, (1, 17), generator=generator) for _ in range(4)]
    trainer = make_trainer(callback, max_steps=4)
    trainer.fit(module, ResumableLoader([(x[:, :-1], x[:, 1:]) for x in texts]))
    assert abs(callback.density - 0.10) < 0.01
    trainer.save_checkpoint(folder / "dense.ckpt")
    return folder / "dense.ckpt"


@pytest.mark.parametrize(
    ("block_size", "inactive", "at_most"),
    [(1, "zero", 0.20), (64, "zero", 0.20), (1, "frozen", 0.50)],
    ids=["single weights", "blocks", "frozen"],
)
def test_file_size_at_density_a_tenth(block_size: int, inactive: str, at_most: float, tmp_path: Path) -> None:
    dense = byte_gpt_checkpoint(tmp_path, block_size, inactive)
    checkpoint = ordinary(dense)
    back = round_trip(checkpoint, tmp_path / "sparse.ckpt")
    assert differences(checkpoint, back) == []
    sizes = [path.stat().st_size for path in (dense, tmp_path / "sparse.ckpt")]
    ratio = sizes[1] / sizes[0]
    print(f"{block_size=} {inactive=}: {sizes[0]:,} bytes dense, {sizes[1]:,} sparse, {ratio:.3f}")  # for the docs
    assert ratio <= at_most


# --------------------------------------------------------------------------- in a Trainer


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("dgm", [{}, {"units": {"size": 1}}, {"inactive": "frozen"}], ids=str)
def test_resume_from_a_sparse_checkpoint_equals_the_run_straight_through(
    dgm: dict[str, Any], asynchronous: bool, tmp_path: Path
) -> None:
    def plugin() -> Any:
        return AsyncCheckpointIO(SparseCheckpointIO()) if asynchronous else SparseCheckpointIO()

    path = tmp_path / "sparse.ckpt"
    straight = end_of(*fit(SaveAt(INSIDE_A_WINDOW, path), plugins=[plugin()], dgm=dgm))
    with pytest.raises(InvalidVersion):  # it is no ordinary one
        fit(ckpt=path, dgm=dgm)
    assert differences(straight, end_of(*fit(ckpt=path, plugins=[plugin()], dgm=dgm))) == []


def test_asynchronous_checkpoint_holds_the_weights_of_its_own_step(tmp_path: Path) -> None:
    """Masks and weights change while the thread writes."""
    both = [SaveAt(step, tmp_path / f"async {step}.ckpt") for step in (4, 9, 14)]
    fit(*both, plugins=[AsyncCheckpointIO(SparseCheckpointIO())])
    fit(*[SaveAt(s.step, tmp_path / f"plain {s.step}.ckpt") for s in both])
    for save in both:
        loaded = SparseCheckpointIO().load_checkpoint(save.path)
        plain = ordinary(tmp_path / f"plain {save.step}.ckpt")
        assert differences(dict(loaded["state_dict"]), dict(plain["state_dict"])) == []
        assert differences(loaded["optimizer_states"], plain["optimizer_states"]) == []


def test_error_of_an_asynchronous_save_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder is needed")
    with pytest.raises(OSError, match="taken"):
        fit(SaveAt(3, tmp_path / "taken" / "x.ckpt"), plugins=[AsyncCheckpointIO(SparseCheckpointIO())])


def test_switched_on_in_the_middle_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "ordinary.ckpt"
    straight = end_of(*fit(SaveAt(6, path)))
    assert differences(straight, end_of(*fit(ckpt=path, plugins=[SparseCheckpointIO()]))) == []


@pytest.mark.filterwarnings("ignore:the best checkpoint by")
@pytest.mark.parametrize("save_last", [True, "link"])
def test_model_checkpoint_keeps_and_removes_the_same_files(save_last: Any, tmp_path: Path) -> None:
    class Noisy(MLP):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("noise", float((7 * self.trainer.global_step) % 11))
            return super().training_step(batch, batch_idx)

    listings = []
    for name, plugins in (("sparse", [SparseCheckpointIO()]), ("dense", [])):
        folder = tmp_path / name
        keep = ModelCheckpoint(
            folder, "{step}-{noise}", monitor="noise", save_top_k=2, save_last=save_last, every_n_train_steps=3
        )
        fit(keep, model=Noisy, plugins=plugins)
        listings.append(sorted(os.listdir(folder)))
        assert (folder / "last.ckpt").is_symlink() == (save_last == "link")
        best = Path(keep.best_model_path)
        loaded = SparseCheckpointIO().load_checkpoint(best)
        assert loaded["global_step"] == int(best.name.split("-")[0].removeprefix("step="))
    assert len(listings[0]) == 3
    assert listings[0] == listings[1]


def test_weights_alone(tmp_path: Path) -> None:
    """`save_weights_only` stores no masks; the weights bring their own."""
    keep = ModelCheckpoint(tmp_path, "weights", save_weights_only=True, save_last=False)
    module, _, trainer = fit(keep, plugins=[SparseCheckpointIO()])
    trainer.save_checkpoint(tmp_path / "sparse.ckpt", weights_only=True)
    loaded = SparseCheckpointIO().load_checkpoint(tmp_path / "sparse.ckpt")
    assert "callbacks" not in loaded
    assert differences(dict(loaded["state_dict"]), dict(module.state_dict())) == []
    dense = sum(x.numel() * x.element_size() for x in module.state_dict().values())
    assert (tmp_path / "sparse.ckpt").stat().st_size < 0.35 * dense
    assert (tmp_path / "weights.ckpt").exists()


def test_averaged_weights_resume_exactly(tmp_path: Path) -> None:
    def average() -> EMAWeightAveraging:
        return EMAWeightAveraging(decay=0.9)

    path = tmp_path / "sparse.ckpt"
    plugins = [SparseCheckpointIO()]
    straight = end_of(*fit(average(), SaveAt(11, path), plugins=plugins))
    assert {"current_model_state", "averaging_state"} <= set(SparseCheckpointIO().load_checkpoint(path))
    assert differences(straight, end_of(*fit(average(), ckpt=path, plugins=[SparseCheckpointIO()]))) == []


def test_validate_from_a_sparse_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "sparse.ckpt"
    module, _, trainer = fit(SaveAt(STEPS, path), plugins=[SparseCheckpointIO()])
    (expected,) = trainer.validate(module, loader(MLP), verbose=False)
    other = make_trainer(callback_for(), plugins=[SparseCheckpointIO()])
    assert other.validate(MLP(), loader(MLP), ckpt_path=path, verbose=False) == [expected]


# --------------------------------------------------------------------------- remote


@pytest.fixture
def remote() -> Any:
    files = fsspec.filesystem("memory")
    yield files
    if files.exists("/run"):
        files.rm("/run", recursive=True)


def test_model_checkpoint_on_a_remote_path(remote: Any) -> None:
    keep = ModelCheckpoint("memory://run", "{step}", every_n_train_steps=5, save_top_k=1, monitor=None)
    straight = end_of(*fit(keep, plugins=[SparseCheckpointIO()]))
    assert [Path(name).name for name in remote.ls("/run", detail=False)] == ["step=20.ckpt"]
    loaded = SparseCheckpointIO().load_checkpoint("memory://run/step=20.ckpt")
    assert differences(dict(loaded["state_dict"]), straight["weights"]) == []
    SparseCheckpointIO().remove_checkpoint("memory://run/step=20.ckpt")
    assert not remote.exists("/run/step=20.ckpt")


def test_failed_remote_save_leaves_the_old_checkpoint(remote: Any) -> None:
    SparseCheckpointIO().save_checkpoint({"x": 1}, "memory://run/last.ckpt")
    with pytest.raises(RuntimeError, match="no state for you"):
        SparseCheckpointIO().save_checkpoint({"x": torch.ones(10**5), "y": Unpicklable()}, "memory://run/last.ckpt")
    assert SparseCheckpointIO().load_checkpoint("memory://run/last.ckpt") == {"x": 1}


# --------------------------------------------------------------------------- strategies


class FSDPOnCPU(FSDPStrategy):
    """Lightning refuses the CPU for `FSDPStrategy` itself only."""


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("strategy", [FSDPOnCPU, ModelParallelStrategy])
def test_sharded_strategies_are_refused_before_any_work(strategy: type[Any], asynchronous: bool) -> None:
    plugin: Any = AsyncCheckpointIO(SparseCheckpointIO()) if asynchronous else SparseCheckpointIO()
    trainer = make_trainer(strategy=strategy(), plugins=[plugin])
    with pytest.raises(ValueError, match=rf"{strategy.__name__} loads checkpoints past its CheckpointIO"):
        callback_for().setup(trainer, MLP(), "fit")


def resumed_past_the_plugin(path: Path) -> str:
    """Save by two ranks of FSDP2 through the plugin, then resume; return the error."""
    from torch.distributed.fsdp import fully_shard

    class Sharded(MLP):
        def configure_model(self) -> None:
            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def trainer() -> pl.Trainer:
        strategy = ModelParallelStrategy(2, tensor_parallel_size=1, save_distributed_checkpoint=False)
        return make_trainer(strategy=strategy, devices=2, plugins=[SparseCheckpointIO()], max_steps=2)

    first = trainer()
    first.fit(Sharded(), MLP.batches(2))
    first.save_checkpoint(path)
    try:
        trainer().fit(Sharded(), MLP.batches(2), ckpt_path=path)
    except KeyError as error:
        return repr(error)
    return ""


def test_control_fsdp2_really_loads_past_the_plugin(tmp_path: Path) -> None:
    """Why it is refused. Should this fail one day, the strategy can be served."""
    path = tmp_path / "x.ckpt"
    assert run(resumed_past_the_plugin, 2, path) == ["KeyError('state_dict')"] * 2
    assert "state_dict" in SparseCheckpointIO().load_checkpoint(path)


def test_strategies_with_whole_weights_are_not_refused() -> None:
    trainer = make_trainer(strategy=DDPStrategy(), plugins=[SparseCheckpointIO()])
    callback_for().setup(trainer, MLP(), "fit")
    SparseCheckpointIO().check_strategy(trainer.strategy)


# --------------------------------------------------------------------------- readers that know nothing of it


def test_plain_readers_fail_and_say_why(saved: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "sparse.ckpt"
    SparseCheckpointIO().save_checkpoint(saved(), path)
    for read in (MLP.load_from_checkpoint, lambda path: fit(ckpt=path)):
        with pytest.raises(InvalidVersion, match="sparse checkpoint; give the Trainer SparseCheckpointIO, or run"):
            read(path)
    content = torch.load(path, weights_only=True)
    assert "state_dict" not in content
    assert content["format"] == "lightning_estdgm sparse checkpoint"
