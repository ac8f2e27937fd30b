"""Checkpoints of packed runs in a real Trainer: ordinary files, written and read a layer at a time."""

import copy
import io
import pickle
import subprocess
import sys
import weakref

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import nn

from helpers import saving_job
from helpers.exact import differences
from helpers.models import MLP, NO_VALIDATION_LOADER, ResumableLoader, make_trainer
from helpers.runs import EPOCH_STEPS, SCHEDULE, STEPS
from lightning_estdgm import DGMCallback, DGMConfig, SparseCheckpointIO, Units
from lightning_estdgm.modules._later_whole import LaterWhole
from lightning_estdgm.modules._packing import Packing
from lightning_estdgm.tools.bench._peak_memory import allocated

pytestmark = [
    pytest.mark.filterwarnings(NO_VALIDATION_LOADER),
    pytest.mark.filterwarnings("ignore:Be aware .*add the following callbacks"),
]
PLUGINS = {"Lightning's own": list, "SparseCheckpointIO": lambda: [SparseCheckpointIO()]}
AT = 7  # a step at which some units are young


def fit(*extra, plugins=(), ckpt=None, **settings):
    pl.seed_everything(0, verbose=False)
    module = MLP(32, "adamw", "onecycle")
    saves = any(isinstance(callback, ModelCheckpoint) for callback in extra)
    trainer = make_trainer(
        DGMCallback(DGMConfig(SCHEDULE, units=Units(size=4), storage="packed")),
        *extra,
        plugins=list(plugins),
        enable_checkpointing=saves,
        **{"max_steps": STEPS, "max_epochs": -1, **settings},
    )
    trainer.fit(module, ResumableLoader(MLP.batches(EPOCH_STEPS, 32)), ckpt_path=ckpt)
    return module, trainer


@pytest.fixture
def most_alive(monkeypatch):
    """List of the number of whole tensors that were there each time when one was made."""
    alive, most = weakref.WeakSet(), []
    unpack = Packing.unpack

    def unpacked(packing, values, fill=0.0):
        whole = unpack(packing, values, fill)
        alive.add(whole)
        most.append(len(alive))
        return whole

    monkeypatch.setattr(Packing, "unpack", unpacked)
    return most


class Save(pl.Callback):
    """Saves once by the Trainer, and once all that the Trainer would save as whole tensors."""

    def __init__(self, folder, most_alive, at=AT):
        self.folder, self.most_alive, self.at = folder, most_alive, at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            self.save(trainer)

    def save(self, trainer):
        self.most_alive.clear()
        trainer.save_checkpoint(self.folder / "saved.ckpt")
        self.most = list(self.most_alive)
        torch.save(trainer._checkpoint_connector.dump_checkpoint(), self.folder / "whole.ckpt")


@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize("when", ["in the fit", "after it"])
def test_checkpoints_are_written_a_layer_at_a_time(tmp_path, most_alive, plugin, when):
    save = Save(tmp_path, most_alive, AT if when == "in the fit" else -1)
    straight, ended = fit(save, plugins=PLUGINS[plugin]())
    if when == "after it":
        save.save(ended)
    assert len(save.most) > 3
    assert max(save.most) == 1
    loaded = ended.strategy.checkpoint_io.load_checkpoint(tmp_path / "saved.ckpt")
    whole = torch.load(tmp_path / "whole.ckpt")
    assert [type(x) for x in whole["state_dict"].values()] == [torch.Tensor] * len(whole["state_dict"])
    assert differences(loaded, whole) == []
    if plugin == "Lightning's own":
        assert differences(torch.load(tmp_path / "saved.ckpt", weights_only=True), whole) == []
    if when == "in the fit":
        for name in ("saved.ckpt", "whole.ckpt"):
            resumed, _ = fit(plugins=PLUGINS[plugin](), ckpt=tmp_path / name)
            assert differences(straight.state_dict(), resumed.state_dict()) == []


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("plugin", ["none", "sparse"])
def test_what_is_loaded_is_whole_for_one_layer_at_a_time(tmp_path, plugin):
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    size, file = {"width": 512, "layers": 12}, tmp_path / "last.ckpt"
    dense = 12 * size["layers"] * size["width"] ** 2
    saving_job.fit(plugin, Saves(), **size)
    _, without = allocated(lambda: saving_job.fit(plugin, **size))
    _, most = allocated(lambda: saving_job.fit(plugin, ckpt=file, **size), mapped=file.stat().st_size)
    assert most - without < dense / 4


@pytest.mark.parametrize("plugin", ["none", "async"])
@pytest.mark.parametrize("when", ["inside", "after"])
def test_saving_takes_no_more_memory_than_training(tmp_path, plugin, when):
    assert _grown_by_saving(plugin, tmp_path, when) < saving_job.DENSE_STATE / 4


def test_a_plugin_of_the_users_own_is_given_whole_tensors(tmp_path):
    assert _grown_by_saving("own", tmp_path, "inside") > saving_job.DENSE_STATE


def _grown_by_saving(plugin, folder, when):
    """Return by how many bytes saving raises the most resident memory of a process."""
    call = [sys.executable, "-m", "helpers.saving_job", plugin, str(folder), when]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.splitlines()[-1].split())
    return after - before


def test_average_models_are_saved_a_layer_at_a_time(tmp_path, most_alive):
    save = Save(tmp_path, most_alive)
    fit(WeightAveraging(), save)
    assert max(save.most) == 1
    saved, whole = (torch.load(tmp_path / name) for name in ("saved.ckpt", "whole.ckpt"))
    assert "current_model_state" in saved
    assert differences(saved, whole) == []


def test_users_hooks_read_a_checkpoint_as_ever(tmp_path):
    class Reads(pl.Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            weights = checkpoint["state_dict"]
            self.sums = {name: float(x.numpy().sum()) for name, x in weights.items()}
            self.pickled = pickle.loads(pickle.dumps(weights))

    reads = Reads()
    fit(reads, ModelCheckpoint(tmp_path, every_n_train_steps=AT, save_top_k=-1))
    (*_, last) = sorted(tmp_path.glob("*.ckpt"), key=lambda file: file.stat().st_mtime)
    weights = torch.load(last, weights_only=True)["state_dict"]
    assert reads.sums == {name: float(x.numpy().sum()) for name, x in weights.items()}
    assert differences(dict(reads.pickled), dict(weights)) == []


def test_a_fit_that_does_not_begin_leaves_the_trainer_as_it_was():
    class Muon(MLP):
        def configure_optimizers(self):
            raise KeyError("no such optimizer")

    trainer = make_trainer(DGMCallback(DGMConfig(SCHEDULE, units=Units(size=4), storage="packed")), max_steps=STEPS)
    with pytest.raises(KeyError):
        trainer.fit(Muon(32), ResumableLoader(MLP.batches(EPOCH_STEPS, 32)))
    assert type(trainer.strategy.checkpoint_io) is TorchCheckpointIO
    assert "save_checkpoint" not in vars(trainer)
    assert "load_checkpoint" not in vars(trainer.strategy)


def test_a_whole_tensor_that_is_made_later_takes_torchs_functions():
    plain = torch.arange(6.0).view(2, 3)
    later = LaterWhole(plain, (2, 3), plain.clone)
    assert (later.shape, later.dtype, later.device) == (plain.shape, plain.dtype, plain.device)
    assert torch.equal(later, plain)
    assert type(later + 1) is type(copy.deepcopy(later)) is torch.Tensor
    assert later.detach() is later
    assert type(later.clone()) is LaterWhole  # as plugins do that save in the background
    buffer = io.BytesIO()
    torch.save({"weight": later, "copy": later.clone()}, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()))
    for name in ("weight", "copy"):
        assert differences(loaded[name], plain) == []
    layer = nn.Linear(3, 2, bias=False)
    layer.load_state_dict({"weight": later})
    assert torch.equal(layer.weight, plain)
    later.mul_(2)  # what is written stays, as in a plain state dict
    assert torch.equal(later, 2 * plain)
    later.numpy()[0, 0] = 5.0
    assert later[0, 0] == 5.0
    assert not torch.equal(later.clone(), plain)
    shared = LaterWhole(plain, (2, 3), plain.clone)
    shared.share_memory_()  # for another process
    assert shared.is_shared()
    assert torch.equal(shared, plain)
