"""One training run, the same in every fault test, as a job of its own processes; and what may happen to it."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from helpers.models import MLP, SCHEDULE, Batches, ResumableLoader, make_trainer
from lightning_estdgm import DGMCallback, DGMConfig, RequeueBetweenSteps, SparseCheckpointIO

STEPS = 20  # of models.SCHEDULE
EVERY = 4  # steps between checkpoints


def train(
    folder: Path,
    *extra: pl.Callback,
    make: Callable[[], pl.LightningModule] = lambda: MLP(scheduler="onecycle"),
    ckpt: Path | str | None = None,
    plugins: tuple[Any, ...] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Train, with a checkpoint every four steps; return all that a resumed run must end with as a straight one does."""
    pl.seed_everything(0, verbose=False)
    module, ranks, rank = make(), int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    callback = DGMCallback(DGMConfig(schedule=SCHEDULE, backend="dense"))  # a measured choice differs from run to run
    every = ModelCheckpoint(folder, "{step}", every_n_train_steps=EVERY, save_top_k=-1, save_on_train_epoch_end=False)
    if ranks > 1:
        settings |= {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": ranks}
    if not any(isinstance(plugin, AsyncCheckpointIO) for plugin in plugins):
        plugins = (SparseCheckpointIO(), *plugins)
    trainer = make_trainer(
        callback,
        every,
        *extra,
        plugins=list(plugins),
        enable_checkpointing=True,
        default_root_dir=folder,
        max_steps=STEPS,
        **settings,
    )
    batches = Batches(MLP.batches(STEPS * ranks)[rank::ranks])
    trainer.fit(module, ResumableLoader(batches), ckpt_path=ckpt)
    return {
        "weights": dict(module.state_dict()),
        "optimizer": trainer.optimizers[0].state_dict(),
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "dgm": callback.state_dict(),
        "global_step": trainer.global_step,
    }


def checkpoints(folder: Path) -> dict[int, Path]:
    """What `train` has left in its folder, by step."""
    return {int(path.stem.removeprefix("step=")): path for path in folder.glob("step=*.ckpt")}


def temporaries(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix == ".tmp"]


class At(pl.Callback):
    """Does something in one hook of one step."""

    def __init__(self, hook: str, step: int, do: Callable[[], Any]) -> None:
        self.step, self.do = step, do
        setattr(self, hook, self._maybe)

    def _maybe(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.do()


class FromOutside(pl.Callback):
    """Sends this process a signal some time after a step has begun, wherever it is then; two steps later at most."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        def send() -> None:
            while trainer.global_step < self.step:
                time.sleep(1e-4)
            os.kill(os.getpid(), self.number)

        self.thread = threading.Thread(target=send, daemon=True)
        self.thread.start()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step + 2:
            self.thread.join()


# --------------------------------------------------------------------------- kill -9 of a rank


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_rank(folder: Path, hook: str, step: int) -> dict[str, Any]:
    """Rank 1 is killed in one hook of one step, or (hook "") anywhere in it."""
    fault = At(hook, step, kill) if hook else FromOutside(step, signal.SIGKILL)
    return train(folder, *([fault] if os.environ.get("RANK") == "1" else []))


# --------------------------------------------------------------------------- kill -9 while a checkpoint is written


def content(value: float) -> dict[str, Any]:
    """A checkpoint of 2 MB."""
    return {"value": value, "state_dict": {str(i): torch.full((100, 1000), value) for i in range(5)}}


def killed_writer(path: Path, where: str, limit: int | None = None) -> None:
    """Save a whole checkpoint, then be killed in the middle of the next."""
    SparseCheckpointIO().save_checkpoint(content(1.0), path)
    if limit is not None:  # the system kills the process with the byte that goes beyond the limit
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    elif where == "file synced":
        _die_in("fsync", 1)
    elif where == "before renaming":
        _die_in("replace", 1)
    elif where == "folder not synced yet":
        _die_in("fsync", 2)
    SparseCheckpointIO().save_checkpoint(content(2.0), path)


def _die_in(function: str, call: int) -> None:
    real, calls = getattr(os, function), []

    def dying(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            kill()
        return real(*args)

    setattr(os, function, dying)


def killed_while_saving(folder: Path, save: int) -> dict[str, Any]:
    """A training run is killed when its n-th checkpoint is written and not renamed yet."""
    _die_in("replace", save)
    return train(folder)


# --------------------------------------------------------------------------- full disk


def full_disk(folder: Path, limit: int, asynchronous: bool) -> tuple[str, str, dict[str, Any]]:
    """No file may grow beyond `limit` bytes from the second checkpoint on; return the error, then go on with room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        while not checkpoints(folder):  # an asynchronous save may be under way
            time.sleep(1e-3)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    plugins = (AsyncCheckpointIO(SparseCheckpointIO()),) if asynchronous else ()
    try:
        train(folder, At("on_train_batch_start", EVERY + 1, fill), plugins=plugins)
    except OSError as error:
        failure = (type(error).__name__, str(error))
    else:
        failure = ("", "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    saved = {step: path.read_bytes() for step, path in checkpoints(folder).items()}
    left = temporaries(folder)
    end = train(folder, ckpt=folder / f"step={max(saved)}.ckpt") if saved else {}
    return (*failure, {"saved": sorted(saved), "temporaries": left, "end": end})


# --------------------------------------------------------------------------- signals


def terminated(folder: Path, step: int, *callbacks: pl.Callback) -> list[int]:
    """SIGTERM comes at any moment of a step; return which checkpoints there are."""
    last = ModelCheckpoint(folder / "last", "{step}", save_on_exception=True, every_n_train_steps=10**6)
    try:
        train(folder, last, FromOutside(step, signal.SIGTERM))
    except SIGTERMException:
        return sorted(checkpoints(folder / "last"))
    raise AssertionError("the run went on")


class Signalled(MLP):
    """Gets the requeue signal at a certain point of one step."""

    def __init__(self, point: str, step: int) -> None:
        super().__init__(scheduler="onecycle")
        self.point, self.step, self.sent = point, step, False

    def _here(self, point: str, step: int | None = None) -> None:
        if not self.sent and point == self.point and self.trainer.global_step == (self.step if step is None else step):
            self.sent = True
            signal.raise_signal(signal.SIGUSR1)

    def on_train_batch_start(self, *args: Any) -> None:
        self._here("batch fetched")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self._here("forward")
        return super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None:
        self._here("gradients")

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._here("optimizer stepped", self.step + 1)

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self._here("batch over", self.step + 1)


def as_slurm_job(folder: Path) -> Path:
    """Set up what a SLURM job sees; ``scontrol`` writes what it is called with to the file that is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    job = {
        "JOB_ID": "4711",
        "JOB_NAME": "train",
        "NTASKS": ranks,
        "NTASKS_PER_NODE": ranks,
        "PROCID": rank,
        "LOCALID": rank,
        "NODEID": "0",
    }
    os.environ |= {f"SLURM_{name}": value for name, value in job.items()}
    programs, calls = folder / f"bin {rank}", folder / "scontrol.txt"
    programs.mkdir(exist_ok=True)
    (programs / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\n')
    (programs / "scontrol").chmod(0o755)
    os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return calls


def requeued(
    folder: Path, point: str, step: int, *, between_steps: bool = True, **settings: Any
) -> tuple[str, list[str], dict[str, Any]]:
    """The requeue signal comes at a point of a step (point "": anywhere in it); afterwards the job runs once more.

    Returns:
        What scontrol was called with, the checkpoints of the requeueing, and the end of the second run.

    """
    calls = as_slurm_job(folder)
    rank = int(os.environ.get("RANK", "0"))
    steps = step + rank  # no two ranks get it in the same step
    make = {"make": lambda: Signalled(point, steps)} if point else {}
    extra: list[pl.Callback] = [] if point else [FromOutside(steps, signal.SIGUSR1)]
    extra += [RequeueBetweenSteps()] if between_steps else []
    train(folder, *extra, plugins=(SLURMEnvironment(),), **make, **settings)
    saved = sorted(path.name for path in folder.glob("hpc_ckpt_*"))
    end = train(folder, ckpt="hpc", plugins=(SLURMEnvironment(),), **settings)
    return calls.read_text() if calls.exists() else "", saved, end


def in_validation(folder: Path) -> tuple[list[str], list[str]]:
    """The signal comes in the middle of a validation; return what happened in order, and what was saved."""
    as_slurm_job(folder)
    events = []

    class Validated(MLP):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            events.append(f"validation {batch_idx}")
            if batch_idx == 0 and self.trainer.global_step == 6:
                signal.raise_signal(signal.SIGUSR1)

        def on_save_checkpoint(self, checkpoint: Any) -> None:
            events.append(f"saved at {self.trainer.global_step}")

    trainer = make_trainer(
        RequeueBetweenSteps(),
        plugins=[SLURMEnvironment()],
        default_root_dir=folder,
        max_steps=8,
        val_check_interval=6,
        num_sanity_val_steps=0,
    )
    trainer.fit(Validated(), ResumableLoader(MLP.batches(8)), ResumableLoader(MLP.batches(3)))
    return events, sorted(path.name for path in folder.glob("hpc_ckpt_*"))
