"""The folder of `energy.json`: beside the checkpoints of its run, and there before the run has ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.core import url_to_fs
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from helpers.energy_runs import Net, data, monitor, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*")


class Remote(Logger):
    """As much of a logger without `log_dir` as Lightning's W&B, MLflow, Comet and Neptune loggers share."""

    def __init__(self, save_dir: str | Path | None, name: str | None, version: str | int | None) -> None:
        super().__init__()
        self._place = save_dir, name, version

    @property
    def save_dir(self) -> Any:
        return self._place[0]

    @property
    def name(self) -> str | None:
        return self._place[1]

    @property
    def version(self) -> str | int | None:
        return self._place[2]

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def files(folder: Path) -> dict[str, dict[str, Any]]:
    found = sorted(path for path in folder.rglob("energy*.json"))
    return {str(path.relative_to(folder)): json.loads(path.read_text()) for path in found}


@pytest.mark.parametrize(
    "place",
    [
        ("wandb", "project", "a1b2c3"),  # W&B, Comet, Neptune
        ("mlruns", "0123", "f00d"),  # MLflow, local
        (None, "0123", "f00d"),  # MLflow with a server
        (None, "name", 3),
        (None, None, None),
    ],
    ids=str,
)
def test_it_lies_beside_the_checkpoints_of_its_run(tmp_path: Path, place: Any) -> None:
    logger = Remote(place[0] and tmp_path / place[0], *place[1:])
    trainer(tmp_path, monitor(), logger=logger, enable_checkpointing=True).fit(Net(), data())
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    (file,) = tmp_path.rglob("energy*.json")
    assert checkpoint.parent.name == "checkpoints"
    assert file == checkpoint.parents[1] / "energy.json"


@pytest.mark.parametrize("make", [TensorBoardLogger, CSVLogger])
def test_the_folder_of_a_logger_that_has_one_is_also_that_of_the_checkpoints(tmp_path: Path, make: Any) -> None:
    trainer(tmp_path, monitor(), logger=make(tmp_path, "name"), enable_checkpointing=True).fit(Net(), data())
    assert list(files(tmp_path)) == ["name/version_0/energy.json"]
    assert next(tmp_path.rglob("*.ckpt")).parents[1] == tmp_path / "name" / "version_0"


class Shared(Remote):
    """A logger whose `log_dir` is that of all its runs, as SwanLab's."""

    @property
    def log_dir(self) -> Any:
        return str(self.save_dir)


def test_a_folder_that_all_runs_share_is_not_taken_for_that_of_one(tmp_path: Path) -> None:
    for version in ("a", "b"):
        logger = Shared(tmp_path, "project", version)
        trainer(tmp_path, monitor(), logger=logger, enable_checkpointing=True).fit(Net(), data())
    assert list(files(tmp_path)) == ["project/a/energy.json", "project/b/energy.json"]
    assert sorted(path.parents[1].name for path in tmp_path.rglob("*.ckpt")) == ["a", "b"]


def test_it_lies_beside_the_curves_where_a_logger_puts_them_elsewhere(tmp_path: Path) -> None:
    trainer(tmp_path, monitor(), logger=TensorBoardLogger(tmp_path, "name", sub_dir="events")).fit(Net(), data())
    assert list(files(tmp_path)) == ["name/version_0/events/energy.json"]
    assert list((tmp_path / "name" / "version_0" / "events").glob("events.out.tfevents.*"))


def test_the_runs_of_one_project_have_a_file_each(tmp_path: Path) -> None:
    joules = {}
    for version in ("a", "b"):
        mon = monitor()
        trainer(tmp_path, mon, logger=Remote(tmp_path, "project", version)).fit(Net(), data())
        joules[f"project/{version}"] = mon.total_joules
    found = files(tmp_path)
    assert list(found) == ["project/a/energy.json", "project/b/energy.json"]
    assert {content["run"]["name"]: content["energy"]["total_joules"] for content in found.values()} == joules


def test_two_runs_into_one_folder_keep_a_file_each_and_the_second_says_so(tmp_path: Path) -> None:
    mons = [monitor(), monitor()]
    trainer(tmp_path, mons[0]).fit(Net(), data())
    with pytest.warns(
        UserWarning, match=r"holds the energy\.json of another run: this run's is energy-1\.json"
    ) as said:
        trainer(tmp_path, mons[1], enable_checkpointing=True, max_epochs=2).fit(Net(), data())
    assert len([w for w in said if "another run" in str(w.message)]) == 1
    found = files(tmp_path)
    assert list(found) == ["energy-1.json", "energy.json"]
    assert found["energy.json"]["energy"] == mons[0].summary()
    assert found["energy-1.json"]["energy"] == mons[1].summary()


@pytest.fixture
def bucket() -> Iterator[str]:
    files = fsspec.filesystem("memory")
    yield "memory://bucket"
    if files.exists("/bucket"):
        files.rm("/bucket", recursive=True)


def remote_files(url: str) -> dict[str, dict[str, Any]]:
    files, root = url_to_fs(url)
    found = [path for path in files.find(root) if path.endswith(".json")]
    return {path.removeprefix(f"{root}/"): json.loads(files.cat_file(path)) for path in sorted(found)}


@pytest.mark.parametrize(
    ("logger", "folder"),
    [
        (lambda url: CSVLogger(url, "name"), "name/version_0"),
        (lambda url: Remote(url, "project", "a1b2c3"), "project/a1b2c3"),
        (lambda url: Remote(None, "project", "a1b2c3"), "project/a1b2c3"),
        (lambda url: False, ""),
    ],
    ids=["csv", "with a save_dir", "without one", "no logger"],
)
@pytest.mark.parametrize("local", [False, True], ids=["remote", "file URL"])
def test_it_lies_beside_the_checkpoints_at_a_url(
    tmp_path: Path, bucket: str, logger: Any, folder: str, local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = (tmp_path / "bucket").as_uri() if local else bucket
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    mon = monitor()
    run = trainer(tmp_path, mon, default_root_dir=url, logger=logger(url), enable_checkpointing=True)
    run.fit(Net(), data())
    assert os.listdir() == []
    ((name, content),) = remote_files(url).items()
    assert name == os.path.join(folder, "energy.json")
    files, root = url_to_fs(url)
    (checkpoint,) = (path for path in files.find(root) if path.endswith(".ckpt"))
    assert os.path.dirname(os.path.dirname(checkpoint)) == os.path.dirname(f"{root}/{name}")
    assert (content["status"], content["energy"]) == ("finished", mon.summary())


def test_at_a_url_another_runs_file_stays_and_a_resumed_run_goes_on_with_its_own(tmp_path: Path, bucket: str) -> None:
    mons = [monitor(), monitor(), monitor()]
    trainer(tmp_path, mons[0], default_root_dir=bucket).fit(Net(), data())
    run = trainer(tmp_path, mons[1], default_root_dir=bucket)
    with pytest.warns(UserWarning, match=r"bucket holds the energy\.json of another run: this run's is energy-1\.json"):
        run.fit(Net(), data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    run = trainer(tmp_path, mons[2], default_root_dir=bucket, max_epochs=2)
    with pytest.warns(UserWarning, match="this run's is energy-1"):
        run.fit(Net(), data(), ckpt_path=tmp_path / "a.ckpt")
    found = remote_files(bucket)
    assert list(found) == ["energy-1.json", "energy.json"]
    assert found["energy.json"]["energy"] == mons[0].summary()
    assert found["energy-1.json"]["energy"] == mons[2].summary()


class Spy(Callback):
    """Keeps what the file says after each step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[dict[str, Any] | None] = []

    def on_train_batch_start(self, *args: Any) -> None:
        found = files(self.folder)
        self.seen.append(found.get("energy.json"))


@pytest.mark.parametrize("weights_only", [False, True])
def test_it_is_written_at_each_checkpoint(tmp_path: Path, weights_only: bool) -> None:
    spy, mon = Spy(tmp_path), monitor()
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1, save_weights_only=weights_only)
    trainer(tmp_path, mon, spy, checkpoint, max_epochs=3, enable_checkpointing=True).fit(Net(), data())
    assert [content and content["run"]["global_step"] for content in spy.seen] == [None] * 8 + [8] * 8 + [16] * 8
    running = [content for content in spy.seen if content]
    assert {content["status"] for content in running} == {"running"}
    assert running[0]["energy"]["steps"] == 8
    assert 0 < running[0]["energy"]["total_joules"] < running[-1]["energy"]["total_joules"]
    assert running[0]["run"]["ended"] <= running[-1]["run"]["ended"]
    last = files(tmp_path)["energy.json"]
    assert (last["status"], last["energy"]) == ("finished", mon.summary())


def test_a_checkpoint_after_the_end_leaves_it_finished(tmp_path: Path) -> None:
    run = trainer(tmp_path, monitor())
    run.fit(Net(), data())
    run.save_checkpoint(tmp_path / "late.ckpt")
    assert files(tmp_path)["energy.json"]["status"] == "finished"


_KILLED = """
import os, signal, sys
from pathlib import Path
from lightning.pytorch import Callback
from helpers.energy_runs import Net, data, monitor, trainer

class Kill(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 12:
            os.kill(os.getpid(), signal.SIGKILL)

folder = Path(sys.argv[1])
trainer(folder, monitor(), Kill(), max_epochs=3, enable_checkpointing=True).fit(Net(), data())
"""


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_a_killed_run_leaves_its_file_and_the_resumed_one_goes_on_with_it(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parents[1]), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    (content,) = files(tmp_path).values()
    assert (content["status"], content["run"]["global_step"], content["energy"]["steps"]) == ("running", 8, 8)
    (checkpoint,) = tmp_path.rglob("*.ckpt")

    mon = monitor()
    trainer(tmp_path, mon, max_epochs=3, enable_checkpointing=True).fit(Net(), data(), ckpt_path=checkpoint)
    (content,) = files(tmp_path).values()
    assert (content["status"], content["energy"]["steps"]) == ("finished", 24)
    first, second = content["run"]["fits"]
    assert (first["steps"], second["steps"]) == (8, 24)
    assert first["started"] < first["ended"] < second["started"] < second["ended"]


def test_further_fits_of_one_monitor_go_on_with_one_file(tmp_path: Path) -> None:
    mon = monitor()
    for fits in (1, 2):
        trainer(tmp_path, mon).fit(Net(), data())
        (content,) = files(tmp_path).values()
        assert [fit["steps"] for fit in content["run"]["fits"]] == [8, 16][:fits]


def test_a_run_that_fails_again_and_again_has_one_file(tmp_path: Path) -> None:
    run = trainer(tmp_path, monitor())
    run.fit(Net(), data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    for fail_at in (1, 2, None):
        again = trainer(tmp_path, monitor(), max_epochs=2)
        if fail_at is None:
            again.fit(Net(), data(), ckpt_path=tmp_path / "a.ckpt")
        else:
            with pytest.raises(RuntimeError, match="out of luck"):
                again.fit(Net(fail_at=fail_at), data(), ckpt_path=tmp_path / "a.ckpt")
        (content,) = files(tmp_path).values()
        assert content["status"] == ("finished" if fail_at is None else "exception")


@pytest.mark.filterwarnings("ignore:.*of another run")
def test_two_runs_that_branch_off_one_checkpoint_keep_a_file_each(tmp_path: Path) -> None:
    run = trainer(tmp_path / "before", monitor())
    run.fit(Net(), data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    mons = [monitor(), monitor()]
    for mon in mons:
        trainer(tmp_path / "after", mon, max_epochs=2).fit(Net(), data(), ckpt_path=tmp_path / "a.ckpt")
    found = files(tmp_path / "after")
    assert list(found) == ["energy-1.json", "energy.json"]
    assert [found[name]["energy"] for name in ("energy.json", "energy-1.json")] == [mon.summary() for mon in mons]
