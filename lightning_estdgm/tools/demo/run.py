"""The demo: one small GPT trained twice on the same batches, dense and by EST-DGM, and what each run cost."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import Profiler
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from lightning_estdgm.callbacks.dgm import DGMCallback
from lightning_estdgm.callbacks.energy import EnergyMonitor
from lightning_estdgm.config import DGMConfig
from lightning_estdgm.method.schedules import EstDgm
from lightning_estdgm.recipes.gpt import ByteGPT, StdlibText
from lightning_estdgm.tools.bench.environment import environment
from lightning_estdgm.tools.demo.report import (
    DENSE,
    DGM,
    MaskMoment,
    RunRecord,
    StepLog,
    Validation,
    best_rates,
    figure,
    records,
    results_table,
    summarize,
    sweep_table,
)
from lightning_estdgm.tools.report import compare, read_run, write, write_json

MIN_STEPS = 20
_MAX_CELLS = 96  # of a drawn mask, in each direction


@dataclass(frozen=True)
class DemoConfig:
    """What the demo trains, and on what.

    Attributes:
        steps: optimizer steps of each run, at least 20.
        seeds: how many pairs of runs; seed s gives the initial weights, the batches and the masks of pair s.
        batch_size: windows a step.
        context: bytes a window.
        width: of the model.
        layers: decoder blocks.
        heads: attention heads.
        lr_dense: peak learning rate of the dense runs.
        lr_dgm: peak learning rate of the EST-DGM runs, before the density-aware step size.
        weight_decay: of the matrices.
        dgm: the whole configuration of EST-DGM but its seed, which is the pair's.
        text: a text file to learn; None for Python's standard library.
        val_windows: validation windows of ``context`` bytes.
        validations: about how many validations a run, the last one at its end.
        profile_steps: steps of the profile taken after the timed runs; 0 for none.
        out: folder for the PNG, the JSON, the report and the TensorBoard runs.

    Raises:
        ValueError: for a value out of range, naming it.
    """

    steps: int = 400
    seeds: int = 1
    batch_size: int = 16
    context: int = 128
    width: int = 512
    layers: int = 2
    heads: int = 8
    lr_dense: float = 1e-3
    lr_dgm: float = 1e-3
    weight_decay: float = 0.1
    dgm: DGMConfig = field(default_factory=DGMConfig)
    text: Path | None = None
    val_windows: int = 256
    validations: int = 6
    profile_steps: int = 4
    out: Path = Path("runs/demo")

    def __post_init__(self) -> None:
        for name, least in (("steps", MIN_STEPS), ("seeds", 1), ("validations", 1), ("profile_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out: got {str(self.out)!r}, which is a file; expected a folder or a free name")
        with torch.device("meta"):  # the model's own checks of sizes and rates, without its weights
            for mode in (DENSE, DGM):
                self.model(self.lr(mode))
        self.data(seed=0)

    def lr(self, mode: str) -> float:
        """Peak learning rate of a mode."""
        return self.lr_dense if mode == DENSE else self.lr_dgm

    def model(self, lr: float) -> ByteGPT:
        """A model with weights from the global random state."""
        return ByteGPT(self.width, self.layers, self.heads, self.context, lr, self.weight_decay)

    def data(self, seed: int) -> StdlibText:
        """The text, with batches drawn from ``seed``."""
        return StdlibText(self.context, self.batch_size, seed, self.val_windows, path=self.text)

    def val_interval(self) -> int:
        """Steps between validations: the divisor of ``steps`` nearest to the wish, so that one comes at the end."""
        wish = self.steps / self.validations
        return min(
            (d for d in range(1, self.steps + 1) if self.steps % d == 0 and 2 * d >= wish),
            key=lambda d: abs(d - wish),
        )


def run_demo(
    config: DemoConfig, json_path: Path | None = None, command: str = "", console: Console | None = None
) -> dict[str, Any]:
    """Train dense and EST-DGM in turns, seed by seed; print the table; write PNG, JSON, report and TensorBoard runs.

    Args:
        config: what to train.
        json_path: where the JSON goes; ``out/demo.json`` if None.
        command: the command line, to be kept in the JSON.
        console: where the progress bar and the table go.

    Returns:
        What the JSON holds.
    """
    console = console or _console()
    began = time.perf_counter()
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    content = _header(config, command)
    plan = [(mode, seed, config.lr(mode)) for seed in range(config.seeds) for mode in (DENSE, DGM)]
    logs = config.out / "tensorboard" / stamp
    with _session(config, len(plan), console) as bar:
        runs = [train(config, *each, bar, logs) for each in plan]
    profiled = {mode: profile_steps(config, mode) for mode in (DENSE, DGM)} if config.profile_steps else None
    summary = summarize(runs)
    png = config.out / "demo.png"
    figure(runs, png)
    report = config.out / "report.html"
    write(compare([read_run(logs / run_name(*each)) for each in plan], "val/loss"), report)
    files = {"png": str(png), "report": str(report), "tensorboard": str(logs)}
    content |= {"files": files, "seconds": time.perf_counter() - began}
    content |= {"summary": summary, "profile": profiled, "runs": records(runs)}
    json_path = json_path or config.out / "demo.json"
    write_json(content, json_path)
    console.print(results_table(summary, runs, profiled))
    console.print(
        f"{json_path}\n{png}\n{report}\ntensorboard --logdir {files['tensorboard']}", style="dim", soft_wrap=True
    )
    return content


def run_sweep(
    config: DemoConfig,
    rates: Mapping[str, Sequence[float]],
    json_path: Path | None = None,
    command: str = "",
    console: Console | None = None,
) -> dict[str, Any]:
    """Train each mode at each of its learning rates, else as in the demo; print and write the validation losses.

    Raises:
        ValueError: fewer than three different rates for a mode, which cannot show that the best is not at an end.
    """
    for mode in (DENSE, DGM):
        given = list(rates.get(mode, ()))
        if len(set(given)) < 3:
            raise ValueError(f"learning rates of {mode}: got {given}, expected at least three different ones")
    console = console or _console()
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    content = _header(config, command)
    plan = [
        (mode, seed, lr) for seed in range(config.seeds) for mode in (DENSE, DGM) for lr in dict.fromkeys(rates[mode])
    ]
    logs, runs = config.out / "tensorboard" / f"sweep-{stamp}", []
    with _session(config, len(plan), console) as bar:
        for mode, seed, lr in plan:
            runs.append(train(config, mode, seed, lr, bar, logs))
            bar.progress.print(f"{mode} seed {seed} lr {lr:g}: validation loss {runs[-1].validation[-1].loss:.4f}")
    losses = [
        {
            "mode": run.mode,
            "lr": run.lr,
            "seed": run.seed,
            "val_loss": run.validation[-1].loss,
            "curve": [asdict(v) for v in run.validation],
            "train_s": math.fsum(run.steps.wall_s),
            "train_j": run.energy.get("train_joules"),
            "energy_method": run.energy.get("method"),
        }
        for run in runs
    ]
    best = best_rates(losses)
    at_end = {mode: best[mode]["lr"] in (min(rates[mode]), max(rates[mode])) for mode in best}
    content |= {"best": best, "best_is_at_an_end": at_end, "sweep": losses}
    json_path = json_path or config.out / "sweep.json"
    write_json(content, json_path)
    console.print(sweep_table(losses))
    for mode, is_end in at_end.items():
        if is_end:
            console.print(f"the best rate of {mode} is at an end of its range: widen the range", style="yellow")
    console.print(str(json_path), style="dim", soft_wrap=True)
    return content


def train(config: DemoConfig, mode: str, seed: int, lr: float, bar: ProgressBar | None, logs: Path) -> RunRecord:
    """One run by a real Trainer. Initial weights and batches depend on ``seed`` alone, not on ``mode``."""
    data = config.data(seed)
    data.setup()
    torch.manual_seed(seed)
    model = config.model(lr)
    initial = _digest(p.detach() for p in model.parameters())
    dgm = DGMCallback(replace(config.dgm, seed=seed)) if mode == DGM else None
    monitor = EnergyMonitor(interval_s=0.25)  # a curve needs points closer together than a total does
    recorder = Recorder(monitor, dgm)
    if bar:
        bar.begin(f"{mode} seed {seed} lr {lr:g}", recorder)
    logger = TensorBoardLogger(logs, name="", version=run_name(mode, seed, lr), default_hp_metric=False)
    # The recorder comes after the callbacks that it measures, the bar after the recorder that it reads.
    callbacks = [c for c in (dgm, monitor, recorder, bar) if c is not None]
    trainer = _trainer(
        callbacks,
        max_steps=config.steps,
        logger=logger,
        log_every_n_steps=max(1, min(10, config.steps // 50)),
        val_check_interval=config.val_interval(),
        check_val_every_n_epoch=None,
    )
    called = time.perf_counter()
    with environment_variable("PL_GLOBAL_SEED", str(seed)):  # where EnergyMonitor looks for the seed
        trainer.fit(model, datamodule=data)
    logger.finalize("success")
    masked, active, outside = count_masked(model, dgm) if dgm else (0, 0, 0)
    return RunRecord(
        mode=mode,
        seed=seed,
        lr=lr,
        parameters=sum(p.numel() for p in model.parameters()),
        setup_s=recorder.origin - called,
        steps=recorder.steps,
        validation=recorder.validation,
        initial=initial,
        batches=recorder.batches.hexdigest(),
        energy=recorder.energy,
        layers=[{**asdict(d), "shape": list(d.shape)} for d in dgm.decisions()] if dgm else [],
        masks=recorder.moments,
        masked_weights=masked,
        active_weights=active,
        nonzero_outside=outside,
        flops_ratio=dgm.flops_ratio if dgm else 1.0,
    )


def run_name(mode: str, seed: int, lr: float) -> str:
    """Name of a run's folder."""
    return f"{mode}-seed{seed}-lr{lr:g}"


def count_masked(model: LightningModule, dgm: DGMCallback) -> tuple[int, int, int]:
    """Masked weights in all, those inside the masks, and those outside that are not exactly zero."""
    total = active = outside = 0
    masks = dgm.masks()
    for layer in dgm.decisions():
        if not layer.masked:
            continue
        weight = model.get_parameter(f"{layer.name}.weight").detach()
        inside = masks[layer.name].to(weight.device)
        inside = inside.repeat_interleave(layer.block_size, 0).repeat_interleave(layer.block_size, 1)
        total += weight.numel()
        active += int(inside.sum())
        outside += int((weight[~inside] != 0).sum())
    return total, active, outside


class Recorder(Callback):
    """Writes down every step (seconds, loss, joules so far, density, phase), validations, and a mask three times.

    A step's seconds run from the end of the step before (of the validation, where one came between) to the point
    where all callbacks before this one have done their work. The recorder's own work is in no step.
    """

    def __init__(self, monitor: EnergyMonitor, dgm: DGMCallback | None) -> None:
        self.monitor, self.dgm = monitor, dgm
        self.steps = StepLog()  # not `log`: the Trainer puts its own there
        self.validation: list[Validation] = []
        self.moments: list[MaskMoment] = []
        self.batches = hashlib.blake2b(digest_size=16)
        self.energy: dict[str, Any] = {}
        self.origin = self.mark = 0.0
        self._validation_j = self._validation_from_j = 0.0
        self._layer = ""
        self._moments: set[int] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; draw the first masked layer at the ends of the first, a middle and the last phase."""
        if self.dgm is not None:
            ends = [s.last - 1 for s in self.dgm.schedule.segments if s.phase != "warmup"]
            self._moments = {ends[0], ends[len(ends) // 2], ends[-1]}
            self._layer = next(d.name for d in self.dgm.decisions() if d.masked)
        self.origin = self.mark = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note what holds during the step."""
        entered = time.perf_counter()
        step, log = len(self.steps), self.steps
        for part in batch:
            self.batches.update(part.to("cpu", torch.uint8).contiguous().numpy().tobytes())
        if self.dgm is None:
            now = (1.0, "train", False, False)
        else:
            plan, following = self.dgm.schedule(step), self.dgm.schedule(step + 1)
            is_last = step + 1 >= self.dgm.schedule.total_steps
            now = (self.dgm.density, plan.phase, plan.observe, following.update and not is_last)
            if step in self._moments:
                mask = self.dgm.masks()[self._layer]
                cells = _cells(mask)
                self.moments.append(MaskMoment(self._layer, step, plan.phase, float(mask.float().mean()), cells))
        for column, value in zip((log.density, log.phase, log.observed, log.updated), now, strict=True):
            column.append(value)  # type: ignore[attr-defined]
        self.mark += time.perf_counter() - entered

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the step's clock, then look at the joules."""
        loss = float(outputs["loss"])  # waits for the device
        now = time.perf_counter()
        joules = self.monitor.total_joules
        self.steps.wall_s.append(now - self.mark)
        self.steps.clock_s.append(now - self.origin)
        self.steps.loss.append(loss)
        self.steps.total_j.append(joules)
        self.steps.train_j.append(None if joules is None else joules - self._validation_j)
        self.mark = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the joules before."""
        self._validation_from_j = self.monitor.total_joules or 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the loss, and take the validation's time and joules out of the training's."""
        joules = self.monitor.total_joules
        self._validation_j += (joules or 0.0) - self._validation_from_j
        loss = float(trainer.callback_metrics["val/loss"])
        self.mark = time.perf_counter()
        train_j = None if joules is None else joules - self._validation_j
        self.validation.append(Validation(len(self.steps), self.mark - self.origin, train_j, loss))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the monitor's own account."""
        self.energy = self.monitor.summary()


class ProgressBar(Callback):
    """One bar over all runs, with the run, the phase, the density and the loss."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress = progress
        self.task: TaskID = progress.add_task("", total=total, state="")
        self.recorder: Recorder | None = None

    def begin(self, title: str, recorder: Recorder) -> None:
        """Go on with the next run."""
        self.recorder = recorder
        self.progress.update(self.task, description=title, state="")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step further."""
        assert self.recorder is not None
        log = self.recorder.steps
        state = f"{log.phase[-1]}, density {log.density[-1]:.2f}, loss {log.loss[-1]:.3f}"
        self.progress.update(self.task, advance=1, state=state)


# Where the time goes ----------------------------------------------------------------------------------------

_LINEAR = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::linear")
_PARTS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("linear products", lambda name: name in _LINEAR or name.startswith("estdgm::")),
    ("attention", lambda name: "scaled_dot_product" in name or "flash_attention" in name),
    ("optimizer", lambda name: "_fused_adam" in name),
    ("masks", lambda name: name.startswith("[Callback]DGMCallback")),
    ("other", lambda name: name.startswith("[")),  # a range of Lightning's: ends the search upwards
    # Besides the optimizer's own operation, its step holds nothing but the hooks on it.
    ("masks", lambda name: name.startswith("Optimizer.step#")),
)


def profile_steps(config: DemoConfig, mode: str) -> dict[str, Any]:
    """Where the time of a steady step goes, in ms and shares; for EST-DGM a step of the frozen end of refinement.

    A short run of its own with the phases squeezed, so that the timed runs carry no profiler. The profiler slows
    small operations down: read the shares, and take times from the timed runs. "other" is the step's wall time
    less the parts: norms, GELU, embeddings, loss, clipping, data, Lightning, Python.
    """
    count = config.profile_steps
    schedule = config.dgm.schedule
    length = MIN_STEPS + 4 * count
    if isinstance(schedule, EstDgm):
        shares = {"exploration": 0.1, "consolidation": 0.1, "refinement": 0.8}
        phases = {name: replace(getattr(schedule, name), length=share) for name, share in shares.items()}
        schedule = replace(schedule, **phases, cycles=1, warmup=0, update_every=None, observe_steps=None, freeze=0.5)
    profiler = StepProfiler(length, count, with_masks=mode == DGM)
    callbacks: list[Callback] = [profiler]
    if mode == DGM:
        callbacks.insert(0, DGMCallback(replace(config.dgm, schedule=schedule)))
    # What DGMCallback prints has been seen in the timed runs.
    with _quiet(), torch.random.fork_rng(devices=[]), redirect_stdout(io.StringIO()):
        torch.manual_seed(0)
        trainer = _trainer(callbacks, max_steps=length, logger=False, limit_val_batches=0, profiler=LightningRanges())
        trainer.fit(config.model(config.lr(mode)), datamodule=config.data(seed=0))
    return profiler.shares()


class StepProfiler(Callback):
    """Profiles the last ``count`` of ``length`` steps, whole steps as the Recorder cuts them."""

    def __init__(self, length: int, count: int, with_masks: bool) -> None:
        self.length, self.count, self.with_masks = length, count, with_masks
        self.seen, self.wall_s = 0, 0.0
        self.profile = profile(activities=[ProfilerActivity.CPU])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start or stop at the border of two steps."""
        self.seen += 1
        if self.seen == self.length:
            self.wall_s = time.perf_counter() - self.wall_s
            self.profile.stop()
        elif self.seen == self.length - self.count:
            with environment_variable(
                "KINETO_LOG_LEVEL", "99"
            ):  # else it announces itself on stderr; read at its first start
                self.profile.start()
            self.wall_s = time.perf_counter()

    def shares(self) -> dict[str, Any]:
        """Milliseconds a step and share of it by part; an operation counts without those that it calls."""
        spent = dict.fromkeys((name for name, _ in _PARTS), 0.0)
        for event in self.profile.events():
            part = _part_of(event)
            if part != "other" and (self.with_masks or part != "masks"):
                spent[part] += event.self_cpu_time_total / 1e6
        spent["other"] = self.wall_s - math.fsum(s for name, s in spent.items() if name != "other")
        return {
            "steps": self.count,
            "wall_ms": 1e3 * self.wall_s / self.count,
            "ms": {name: 1e3 * s / self.count for name, s in spent.items()},
            "share": {name: s / self.wall_s for name, s in spent.items()},
        }


class LightningRanges(Profiler):
    """Puts Lightning's own ranges into the profile, to tell operations by the hook they ran in."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[str, record_function] = {}

    def start(self, action_name: str) -> None:
        """Open the range of a hook."""
        if action_name.startswith("[") and "optimizer_step" not in action_name:
            self._open[action_name] = record_function(action_name)
            self._open[action_name].__enter__()

    def stop(self, action_name: str) -> None:
        """Close it."""
        if action_name in self._open:
            self._open.pop(action_name).__exit__(None, None, None)


def _part_of(event: Any) -> str:
    """The part that the event, or else the nearest event around it that tells, belongs to."""
    while event is not None:
        for part, belongs in _PARTS:
            if belongs(event.name):
                return part
        event = event.cpu_parent
    return "other"


# Around a run -----------------------------------------------------------------------------------------------


def _trainer(callbacks: Sequence[Callback], **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=110)  # a log file has no width; the table needs this


@contextmanager
def _session(config: DemoConfig, runs: int, console: Console) -> Iterator[ProgressBar]:
    """The bar, Lightning kept quiet, and the global random state as it was afterwards."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[state]}"),
    )
    with (
        torch.random.fork_rng(devices=[]),
        _quiet(),
        Progress(*columns, console=console) as progress,
    ):
        _warm_up(config)
        yield ProgressBar(progress, runs * config.steps)


def _warm_up(config: DemoConfig) -> None:
    """One step that is not measured, or the dense run, which comes first, would pay the libraries' first calls."""
    model = config.model(config.lr_dense)
    x = torch.zeros(config.batch_size, config.context, dtype=torch.long)
    model.loss((x, x)).backward()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's remarks on hardware, workers and reached limits; other warnings come through."""
    loggers = [logging.getLogger(f"lightning.{part}.utilities.rank_zero") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*does not have many workers")
        warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated", category=FutureWarning)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a moment."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _header(config: DemoConfig, command: str) -> dict[str, Any]:
    data = config.data(seed=0)
    data.setup()
    return {
        "command": command,
        "began": datetime.now().astimezone().isoformat(timespec="seconds"),
        "config": _as_plain(config),
        "environment": environment(),
        "data": data.describe(),
    }


def _as_plain(config: DemoConfig) -> dict[str, Any]:
    """The configuration as plain types; what is none (a predicate, a path) as its text."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value if isinstance(value, (str, int, float, type(None))) else str(value)

    return plain(asdict(config))


def _digest(tensors: Iterator[Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _cells(mask: Tensor) -> list[list[float]]:
    """A unit mask as rows of active shares, averaged down to a size that can be drawn."""
    shares = mask.flatten(1).float()
    size = (min(len(shares), _MAX_CELLS), min(shares.shape[1], _MAX_CELLS))
    return F.adaptive_avg_pool2d(shares[None], size)[0].tolist()
