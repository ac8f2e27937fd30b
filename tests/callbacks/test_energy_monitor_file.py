"""`energy.json`: where it goes, what it says, and that it never harms the run."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

import lightning_estdgm
from helpers.energy_parts import ConstantPower
from helpers.energy_runs import Net, Phases, data, monitor, trainer
from lightning_estdgm import DGMCallback, DGMConfig
from lightning_estdgm.callbacks._internal.run_description import describe_model
from lightning_estdgm.config import Units

pytestmark = pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*")


class Wide(LightningModule):
    """Something for DGMCallback to mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "energy.json").read_text())


def test_it_describes_the_run_and_what_it_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    mon = monitor()
    loggers = [TensorBoardLogger(tmp_path, "tb", "seed17"), CSVLogger(tmp_path, "csv", "")]
    trainer(tmp_path, mon, logger=loggers, accumulate_grad_batches=2).fit(Net(), data())
    assert [p.relative_to(tmp_path) for p in tmp_path.rglob("*energy.json*")] == [Path("tb/seed17/energy.json")]
    content = read(tmp_path / "tb" / "seed17")
    assert list(content) == ["version", "format", "status", "run", "method", "energy"]
    assert (content["version"], content["format"], content["status"]) == (1, "lightning_estdgm.energy", "finished")
    run = content["run"]
    started, ended = run.pop("started"), run.pop("ended")
    assert started.endswith("+00:00")
    assert ended.endswith("+00:00")
    (fit,) = run.pop("fits")
    assert (len(fit.pop("id")), fit.pop("steps")) == (32, 4)
    assert list(fit) == ["started", "ended"]
    assert started[:19] <= fit["ended"][:19] <= ended[:19]
    assert fit["started"] < fit["ended"]
    assert len(run["model"].pop("fingerprint")) == 64
    assert run.pop("host")
    assert run.pop("versions") == {
        "python": ".".join(map(str, __import__("sys").version_info[:3])),
        "torch": metadata.version("torch"),  # builds with CUDA name it in `torch.__version__` alone
        "lightning": lightning.__version__,
        "lightning_estdgm": lightning_estdgm.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    assert run == {
        "name": "tb/seed17",
        "hosts": 1,
        "world_size": 1,
        "strategy": "SingleDeviceStrategy",
        "accelerator": "cpu",
        "precision": "32-true",
        "accumulate_grad_batches": 2,
        "model": {"class": "Net", "parameters": 5},
        "batch_size": 4,
        "global_step": 4,
        "epochs": 1,
        "compiled": False,
        "seed": 17,
        "devices": ["cpu"],
    }
    assert content["method"] is None
    assert content["energy"] == mon.summary()


def test_without_a_folder_of_a_logger_it_goes_to_the_root(tmp_path: Path) -> None:
    trainer(tmp_path / "root", monitor()).fit(Net(), data())
    assert read(tmp_path / "root")["run"]["name"] == "root"


def test_an_exception_leaves_what_was_used_until_then(tmp_path: Path) -> None:
    mon = monitor()
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(tmp_path, mon).fit(Net(fail_at=3), data())
    content = read(tmp_path)
    assert content["status"] == "exception"
    assert content["run"]["global_step"] == 3
    assert content["energy"] == mon.summary()
    assert content["energy"]["steps"] == 3


def test_a_run_that_fails_before_it_starts_writes_nothing(tmp_path: Path) -> None:
    class Refuses(Callback):
        def on_fit_start(self, *args: Any) -> None:
            raise ValueError("no")

    source = ConstantPower()
    with pytest.raises(ValueError, match="no"):
        trainer(tmp_path, Refuses(), monitor(source)).fit(Net(), data())
    assert not (tmp_path / "energy.json").exists()
    assert "open" not in source.events


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    trainer(tmp_path, monitor(), fast_dev_run=1).fit(Net(), data())
    assert not (tmp_path / "energy.json").exists()


def test_a_file_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "csv").write_text("a file where the folder should be")
    mon = monitor()
    run = trainer(tmp_path, mon)
    run._default_root_dir = str(tmp_path / "csv")
    with pytest.warns(UserWarning, match="energy summary cannot be written: FileExistsError"):
        run.fit(Net(), data())
    assert mon.summary()["steps"] == 8


class Told(Phases):
    def run_summary(self) -> dict[str, Any]:
        return {"name": "mine", "final_density": 0.5}


class Broken(Phases):
    def run_summary(self) -> dict[str, Any]:
        raise KeyError("half of it")


def test_the_method_is_told_by_the_callback_with_the_phases(tmp_path: Path) -> None:
    trainer(tmp_path, Told(), monitor()).fit(Net(), data())
    assert read(tmp_path)["method"] == {"name": "mine", "final_density": 0.5}


def test_a_method_that_cannot_tell_does_not_end_the_run(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="energy summary cannot be written: KeyError: 'half of it'"):
        trainer(tmp_path, Broken(), monitor()).fit(Net(), data())


@pytest.mark.parametrize("monitor_first", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_est_dgm_tells_what_it_did(tmp_path: Path, monitor_first: bool, fails: bool) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if fails and trainer.global_step == 6:
                raise RuntimeError("out of luck")

    dgm, mon = DGMCallback(DGMConfig(units=Units(size=1), backend="dense")), monitor()
    run = trainer(tmp_path, *((mon, dgm) if monitor_first else (dgm, mon)), Fails(), max_epochs=3)
    if fails:
        with pytest.raises(RuntimeError, match="out of luck"):
            run.fit(Wide(), data())
    else:
        run.fit(Wide(), data())
    method = read(tmp_path)["method"]
    assert method == dgm.run_summary()
    assert (method["name"], method["phases"]) == ("EST-DGM", ["exploration", "consolidation", "refinement"])
    assert method["schedule"] == dgm.config.schedule.to_dict()
    assert method["block_sizes"] == {"1": 2}
    assert method["backends"] == {"dense": 2}
    assert method["sparse_operators_ran"] is False
    assert method["final_density"] == pytest.approx(0.10, abs=0.01)
    assert method["density"] == pytest.approx(0.10 if not fails else dgm.density, abs=0.01)
    assert 0 < method["flops_ratio"] < method["flops_executed_ratio"] == 1.0
    entered = [phase for phase in read(tmp_path)["energy"]["by_phase"] if phase != "setup"]
    assert entered == method["phases"][: 2 if fails else 3]


def test_before_the_fit_the_method_knows_its_schedule() -> None:
    summary = DGMCallback().run_summary()
    assert summary["name"] == "EST-DGM"
    assert summary["schedule"]["update_every"] is None
    assert summary["density"] is None


def test_the_fingerprint_tells_models_apart_and_sees_through_wrappers() -> None:
    plain = describe_model(Wide())
    assert plain["parameters"] == 4 * 64 + 64 + 64 * 64 + 64 + 64 + 1
    assert describe_model(Wide()) == plain
    other = Wide()
    other.layer[1] = nn.Linear(64, 64, bias=False)
    assert describe_model(other)["fingerprint"] != plain["fingerprint"]
    wrapped = Wide()
    wrapped.layer = torch.compile(wrapped.layer, backend="eager")
    assert describe_model(wrapped) == plain
    lazy = Wide()
    lazy.layer[0] = nn.LazyLinear(64)
    assert describe_model(lazy) == {"class": "Wide", "parameters": None, "fingerprint": None}


@pytest.mark.parametrize("part", [True, False], ids=["a part is compiled", "the whole is compiled"])
def test_compilation_is_told(tmp_path: Path, part: bool) -> None:
    module: Any = Wide()
    if part:
        module.layer = torch.compile(module.layer, backend="eager")
    else:
        module = torch.compile(module, backend="eager")
    trainer(tmp_path, monitor(), limit_train_batches=1).fit(module, data())
    assert read(tmp_path)["run"]["compiled"] is True
