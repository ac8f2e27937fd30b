"""EnergyMonitor: the joules of a Lightning run, by device, phase, training and validation."""

from __future__ import annotations

import logging
import math
import operator
import os
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor

from lightning_estdgm.energy.accumulator import Totals
from lightning_estdgm.energy.device_assignment import Opened, claim, gpu_names
from lightning_estdgm.energy.export import Measurement, check_prometheus, measurements, write_prometheus
from lightning_estdgm.energy.footprint import Footprint
from lightning_estdgm.energy.ledger import Ledger
from lightning_estdgm.energy.reading import DeviceId, DeviceInfo, hostname, own_gpus, torch_ids
from lightning_estdgm.energy.run_file import describe_model, describe_run, run_folder, write_run_file
from lightning_estdgm.energy.sampler import Absent, Meter, Watts, check_interval
from lightning_estdgm.energy.sources.protocol import EnergySource, resolve
from lightning_estdgm.energy.summary import TRAIN, VAL, announcement, metrics, summary

__all__ = ["EnergyMonitor"]

_log = logging.getLogger(__name__)

_LAYOUT = {
    "Energy": {
        "Joules": ["Multiline", [r"energy/total_joules", r"energy/net_joules"]],
        "Joules by phase": ["Multiline", [r"energy/phase/.*_joules"]],
        "Watts": ["Multiline", [r"power/total_watts", r"power/(gpu|cpu|dram)_watts"]],
        "Joules by domain": ["Multiline", [r"energy/(gpu|cpu|dram)_joules"]],
        "Joules of training and validation": ["Multiline", [r"energy/(train|val)_joules"]],
        "Joules per step, sample, ...": ["Multiline", [r"energy/joules_per_"]],
        "Watts by GPU": ["Multiline", [r"power/gpu/"]],
    }
}
"""TensorBoard's custom-scalars page: titles, and patterns that the beginning of a tag has to match."""


class EnergyMonitor(Callback):
    """Measures the energy of `Trainer.fit` and logs it to every logger at Lightning's own cadence.

    Logged (docs/energy.md has the whole list): ``energy/total_joules``, ``energy/{gpu,cpu,dram}_joules``,
    ``energy/{train,val}_joules``, ``energy/phase/<phase>_joules``, ``energy/joules_per_step``,
    ``energy/joules_per_sample``, ``power/*_watts``, ``power/gpu/<node>/<local>_watts``,
    ``energy/coverage_ratio``, ``energy/gaps``, ``energy/seconds``. A figure with any estimated part ends in
    ``_estimated``. Totals are in the checkpoint, so restarts add up. At the end, and after an exception,
    ``energy.json`` is written to the first logger's folder, or to the trainer's root where it has none.

    The phase is the `phase` (a str) of another callback of the trainer, such as `DGMCallback`; without one
    it is "train". Each device is read by one process of its host, and rank 0 logs the sums of all.

    Args:
        sources: names ("nvml", "rapl", "cpu-estimate") or `EnergySource` objects; None takes all that work
            here, and the CPU estimate only where the CPU is not measured.
        interval_s: seconds between two readings of the background thread.
        per: what else to count in each training batch: the unit's name in the singular, and a function of the
            batch that returns the number. ``{"token": lambda batch: batch["input_ids"].numel()}`` logs
            ``energy/joules_per_token``. "sample" replaces the count of samples, which otherwise is the batch
            size that all tensors of the batch agree on.
        idle_s: measure so many seconds before training starts; joules above that idle baseline are reported
            beside the gross ones, as ``energy/net_joules``.
        footprint: report CO2 and cost, as ``footprint/*``.
        prometheus: file for the textfile collector of Prometheus's node exporter, rewritten at every log.

    Raises:
        TypeError: an argument is not of the kind that is expected.
        ValueError: `interval_s` or `idle_s` is not positive, no source has that name, or a unit is no name.
        ModuleNotFoundError: `prometheus` without `prometheus_client`.

    Example:
        >>> from lightning_estdgm.callbacks.energy import EnergyMonitor
        >>> monitor = EnergyMonitor(["cpu-estimate"], interval_s=0.5)
        >>> monitor.total_joules is None
        True
    """

    def __init__(
        self,
        sources: Iterable[str | EnergySource] | None = None,
        interval_s: float = 1.0,
        *,
        per: Mapping[str, Callable[[Any], int]] | None = None,
        idle_s: float | None = None,
        footprint: Footprint | None = None,
        prometheus: str | os.PathLike[str] | None = None,
    ) -> None:
        self._interval_s = check_interval(interval_s)
        self._sources = None if sources is None else (sources if isinstance(sources, str) else list(sources))
        resolve(self._sources)  # a bad argument shows here, not after an hour in the queue
        self._per: dict[str, Callable[[Any], int | None]] = {"sample": _batch_size, **_check_per(per)}
        self._idle_s = None if idle_s is None else _check_idle(idle_s)
        if footprint is not None and not isinstance(footprint, Footprint):
            raise TypeError(f"footprint must be a Footprint or None, got {footprint!r}")
        self._footprint = footprint
        if prometheus is not None:
            check_prometheus()
        self._prometheus = None if prometheus is None else Path(prometheus)
        self._ledger = Ledger()
        self._claims: list[list[Opened]] = []  # by rank
        self._absent: list[Absent] = []
        self._idle_w: dict[DeviceId, float] = {}
        self._power_w: dict[DeviceId, float] = {}  # as last logged
        self._model: dict[str, Any] | None = None
        self._batch_size: int | None = None
        self._stage: str | None = None
        self._reset_fit()

    def _reset_fit(self) -> None:
        self._meter: Meter | None = None
        self._trainer: Trainer | None = None
        self._window = ("", TRAIN)
        self._hooks: list[Any] = []
        self._watts = Watts({})
        self._steps = 0
        self._counts: dict[str, int | None] = {}
        self._counting = True
        self._run: dict[str, Any] | None = None
        self._said: set[Any] = set()

    def __getstate__(self) -> dict[str, Any]:
        # Threads, locks and library handles stay in the process that made them (ddp_spawn pickles callbacks).
        fit = ("_meter", "_trainer", "_window", "_hooks", "_watts", "_steps", "_counts", "_counting", "_run", "_said")
        return {key: value for key, value in self.__dict__.items() if key not in fit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_fit()

    # Results

    @property
    def total_joules(self) -> float | None:
        """Joules so far, restarts included; None where nothing was read. `summary` says how it was got."""
        return self._ledger.total().joules()

    def summary(self) -> dict[str, Any]:
        """The run so far in plain types, valid during and after `fit`; joules that nobody read are None."""
        idle_w = None if self._idle_s is None else self._idle_w
        return summary(self._ledger.total(), self._all_opened(), self._absent, idle_w=idle_w, footprint=self._footprint)

    def measurements(self) -> list[Measurement]:
        """The run so far under OpenTelemetry's names; watts are those of the last log."""
        return measurements(self._ledger.total(), self._all_opened(), self._power_w)

    # Checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Totals of the whole run so far. In a distributed fit, call it on all ranks, as Lightning does."""
        if self._meter is not None and self._trainer is not None:
            self._meter.read()
            self._exchange(self._trainer)
        return self._ledger.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the checkpoint's totals in place of what this object held; this fit comes on top.

        So it makes no difference whether it arrives before or after `on_fit_start`, or twice.
        """
        if self._stage not in (None, "fit"):
            return  # `trainer.test(ckpt_path="best")` must not take back the joules of the fit before it
        self._ledger.load_state_dict(state_dict)

    # Hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note what the trainer does, and the model before a strategy shards it."""
        self._stage = stage
        self._model = describe_model(pl_module) if next(pl_module.parameters(), None) is not None else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the sources, agree on who reads what, start reading, and say once what is measured."""
        self._close()
        self._trainer = trainer
        self._window = (self._phase(trainer), TRAIN)
        self._batch_size = None
        self._meter = meter = Meter(resolve(self._sources), interval_s=self._interval_s)
        meter.open(select=lambda source, devices: _own_devices(trainer, devices))
        place = (uuid.uuid4().hex, hostname(), _device_name(trainer.strategy.root_device))
        every = _gather(trainer, (place, meter.opened, meter.absent))
        self._claims = claim([opened for _, opened, _ in every])
        self._absent = list(dict.fromkeys(absent for _, _, found in every for absent in found))
        meter.keep(self._claims[[each for each, _, _ in every].index(place)])
        if self._idle_s is not None:
            self._synchronize(trainer)
            meter.measure_idle(self._idle_s)
        meter.start(*self._window)
        self._watts = Watts({d: source.update_period_s for source in self._all_opened() for d in source.devices})
        self._counts = dict.fromkeys(self._per, 0)
        self._counting = _sees_batches_of_its_own(trainer)
        self._ledger.begin(every[0][0][0], self._own_totals)
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "register_step_post_hook"):
                self._hooks.append(optimizer.register_step_post_hook(self._count_step))
        self._exchange(trainer)
        self._run = {
            **describe_run(trainer, pl_module),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "hosts": len({host for (_, host, _), _, _ in every}),
            "devices": [device for (_, _, device), _, _ in every],
            "model": self._model or describe_model(pl_module),
        }
        rank_zero_info(announcement(self._all_opened(), self._absent, self._idle_w))
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_custom_scalars(_LAYOUT)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A phase that changed at the last batch's end begins here, whatever the order of callbacks."""
        self._enter(trainer, TRAIN)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count samples; log when Lightning logs."""
        if self._meter is None:
            return
        self._count_batch(batch)
        # Lightning's condition holds on every micro-batch of a step that is due: log on the last one.
        if trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate():
            self._log(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is booked apart."""
        self._enter(trainer, VAL)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to training."""
        self._enter(trainer, TRAIN)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A last reading, logged and written down; the thread ends."""
        if self._meter is None:
            return
        self._synchronize(trainer)
        self._meter.stop()  # first, so that what is logged last is what `summary` says
        self._log(trainer)
        self._write(trainer, "finished")
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The thread ends; what was read stays, and is written down."""
        if self._meter is not None:
            self._meter.stop()
            self._write(trainer, "exception")
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Whatever happened, nothing is left running."""
        self._close()
        self._stage = None

    # Inside

    def _all_opened(self) -> list[Opened]:
        return [source for sources in self._claims for source in sources]

    def _enter(self, trainer: Trainer, stage: str) -> None:
        window = (self._phase(trainer), stage)
        if self._meter is None or window == self._window:
            return
        self._synchronize(trainer)  # else the kernels queued so far are booked on the next window
        self._meter.mark(*window)
        self._window = window

    def _phase(self, trainer: Trainer) -> str:
        for callback in self._other_callbacks(trainer):
            phase = getattr(callback, "phase", None)
            if isinstance(phase, str):
                return phase or "setup"
        return TRAIN

    def _method(self, trainer: Trainer) -> dict[str, Any] | None:
        """What the callback that gives the phases says of itself, for the run's file."""
        for callback in self._other_callbacks(trainer):
            if isinstance(getattr(callback, "phase", None), str) and hasattr(callback, "run_summary"):
                return dict(callback.run_summary())
        return None

    def _other_callbacks(self, trainer: Trainer) -> list[Callback]:
        return [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]

    def _synchronize(self, trainer: Trainer) -> None:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _count_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Lightning steps the optimizer also where training_step returned None; no gradient, no step.
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            self._steps += 1

    def _count_batch(self, batch: Any) -> None:
        if self._batch_size is None:
            self._batch_size = _batch_size(batch)
        if not self._counting:
            return
        for unit, count in self._per.items():
            so_far, number = self._counts[unit], count(batch)
            if number is not None or count is not _batch_size:
                number = _check_count(unit, number)
            self._counts[unit] = None if so_far is None or number is None else so_far + number

    def _own_totals(self) -> Totals:
        assert self._meter is not None
        totals = self._meter.totals()
        totals.steps, totals.counts = self._steps, dict(self._counts)
        return totals

    def _exchange(self, trainer: Trainer) -> None:
        """Learn the other ranks' sums. All ranks call this at the same points of the loop."""
        assert self._meter is not None
        others = Totals()
        for rank, (totals, idle_w) in enumerate(_gather(trainer, (self._ledger.own(), self._meter.idle_watts))):
            self._idle_w.update(idle_w)
            if rank != trainer.global_rank:
                others = others.add(totals, beside=True)
        self._ledger.others = others

    def _log(self, trainer: Trainer) -> None:
        if self._meter is None:
            return
        self._meter.read()
        self._exchange(trainer)
        self._tell_of_failures()
        if not trainer.is_global_zero:
            return
        opened = self._all_opened()
        self._power_w = self._watts.since(self._ledger.fit())
        values = metrics(self._ledger.total(), opened, self._power_w, gpu_names(self._claims), self._footprint)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            separator = logger.group_separator
            logger.log_metrics({name.replace("/", separator): value for name, value in values.items()}, step=step)
        if self._prometheus is not None:
            try:
                write_prometheus(self._prometheus, self.measurements())
            except OSError as e:
                self._warn_once("prometheus", f"the Prometheus file {self._prometheus} cannot be written: {e}")

    def _tell_of_failures(self) -> None:
        assert self._meter is not None
        for device in self._meter.failing():
            if device not in self._said:
                self._said.add(device)
                _log.warning(
                    "%s %s on %s cannot be read any more: its joules are missing from here on, "
                    "unless its counter comes back (energy/gaps, energy/coverage_ratio)",
                    device.kind,
                    device.uid,
                    device.host,
                )

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            rank_zero_warn(message)

    def _write(self, trainer: Trainer, status: str) -> None:
        """Write `energy.json` on rank 0; a run does not end for a summary that cannot be written."""
        if self._run is None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            content = {
                "version": 1,
                "format": "lightning_estdgm.energy",
                "status": status,
                "run": {
                    **self._run,
                    "batch_size": self._batch_size,
                    "global_step": trainer.global_step,
                    "epochs": trainer.current_epoch,
                },
                "method": self._method(trainer),
                "energy": self.summary(),
            }
            write_run_file(run_folder(trainer), content)
        except Exception as e:
            rank_zero_warn(f"the energy summary cannot be written: {type(e).__name__}: {e}")

    def _close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._meter is not None:
            self._meter.stop()
        self._ledger.end()
        self._reset_fit()


def _gather(trainer: Trainer, own: Any) -> list[Any]:
    """Every rank's object, by rank."""
    distributed = torch.distributed
    if trainer.world_size < 2 or not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, own)
    return every


def _own_devices(trainer: Trainer, devices: Mapping[DeviceId, DeviceInfo]) -> Collection[DeviceId]:
    """The rank's own GPU, and all that is no GPU; a run that is not on GPUs takes all that it sees."""
    root = trainer.strategy.root_device
    if root.type != "cuda":
        return list(devices)
    own = own_gpus(devices, *torch_ids(torch.cuda.get_device_properties(root)))
    return [d for d in devices if d.kind != "gpu" or d in own or not own]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _sees_batches_of_its_own(trainer: Trainer) -> bool:
    """False where the batch is another rank's too (tensor parallelism): the first rank of such a group counts."""
    replicas = getattr(trainer.strategy, "distributed_sampler_kwargs", {}).get("num_replicas", trainer.world_size)
    return trainer.global_rank % (trainer.world_size // replicas) == 0


def _check_per(per: Any) -> dict[str, Callable[[Any], int]]:
    if per is None:
        return {}
    if not isinstance(per, Mapping):
        raise TypeError(f"per must map units to functions of the batch, got {per!r}")
    for unit, count in per.items():
        if not (isinstance(unit, str) and re.fullmatch("[a-z][a-z0-9_]*", unit)) or unit == "step":
            raise ValueError(f"per: a unit is a lower-case name other than 'step', got {unit!r}")
        if not callable(count):
            raise TypeError(f"per[{unit!r}] must be a function of the batch, got {count!r}")
    return dict(per)


def _check_count(unit: str, number: Any) -> int:
    try:
        whole = operator.index(number)
    except TypeError:
        raise TypeError(f"per[{unit!r}] must return a whole number, got {number!r}") from None
    if whole < 0:
        raise ValueError(f"per[{unit!r}] must return a number of at least 0, got {whole}")
    return whole


def _check_idle(idle_s: Any) -> float:
    if isinstance(idle_s, bool) or not isinstance(idle_s, (int, float)):
        raise TypeError(f"idle_s must be a number of seconds or None, got {idle_s!r}")
    if not (math.isfinite(idle_s) and idle_s > 0):
        raise ValueError(f"idle_s must be > 0 seconds or None, got {idle_s!r}")
    return float(idle_s)


def _batch_size(batch: Any) -> int | None:
    """The length that all tensors of a batch share along their first dimension; None if there is no such
    length.

    Lightning's own `extract_batch_size` takes the first tensor's and warns where others differ: a guess that
    would make a wrong figure here.
    """
    sizes: set[int] = set()
    queue = [batch]
    while queue:
        item = queue.pop()
        if isinstance(item, Tensor):
            if item.ndim:
                sizes.add(item.shape[0])
        elif isinstance(item, Mapping):
            queue.extend(item.values())
        elif isinstance(item, (list, tuple)):
            queue.extend(item)
    return sizes.pop() if len(sizes) == 1 else None
