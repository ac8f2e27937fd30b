"""EnergyMonitor: the joules of a Lightning run, by device, phase, training and validation."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from torch import Tensor

from lightning_estdgm.energy import KINDS, DeviceId, EnergySource, resolve
from lightning_estdgm.energy.accumulator import Totals
from lightning_estdgm.energy.meter import Absent, Meter, Opened

__all__ = ["EnergyMonitor"]

TRAIN, VAL = "train", "val"


class EnergyMonitor(Callback):
    """Measures the energy of `Trainer.fit` and logs it to every logger at Lightning's own cadence.

    Logged (docs/energy.md has the whole list): ``energy/total_joules``, ``energy/{gpu,cpu,dram}_joules``,
    ``energy/{train,val}_joules``, ``energy/phase/<phase>_joules``, ``energy/joules_per_step``,
    ``energy/joules_per_sample``, ``power/*_watts``, ``energy/coverage_ratio``, ``energy/gaps``,
    ``energy/seconds``. A figure with any estimated part ends in ``_estimated``. Totals are in the
    checkpoint, so restarts add up.

    The phase is the `phase` (a str) of another callback of the trainer, such as `DGMCallback`; without one
    it is "train".

    Args:
        sources: names ("nvml", "rapl", "cpu-estimate") or `EnergySource` objects; None takes all that work
            here, and the CPU estimate only where the CPU is not measured.
        interval_s: seconds between two readings of the background thread.

    Raises:
        TypeError: `sources` or one of its objects is not what is expected, or `interval_s` is no number.
        ValueError: `interval_s` is not positive, or no source has that name.

    Example:
        >>> from lightning_estdgm.callbacks.energy import EnergyMonitor
        >>> monitor = EnergyMonitor(["cpu-estimate"], interval_s=0.5)
        >>> monitor.total_joules is None
        True
    """

    def __init__(self, sources: Iterable[str | EnergySource] | None = None, interval_s: float = 1.0) -> None:
        if isinstance(interval_s, bool) or not isinstance(interval_s, (int, float)):
            raise TypeError(f"interval_s must be a number of seconds, got {interval_s!r}")
        if not (math.isfinite(interval_s) and interval_s > 0):
            raise ValueError(f"interval_s must be > 0 seconds, got {interval_s!r}")
        self._sources = None if sources is None else (sources if isinstance(sources, str) else list(sources))
        resolve(self._sources)  # a bad argument shows here, not after an hour in the queue
        self._interval_s = float(interval_s)
        self._base = Totals()  # earlier fits, and the run before a restart
        self._others = Totals()  # this fit, the other ranks, as of the last exchange
        self._steps = 0
        self._samples: int | None = 0  # None: the batch size of some batch is unknown
        self._base_samples: int | None = 0
        self._other_samples: int | None = 0
        self._base_steps = 0
        self._opened: list[Opened] = []
        self._absent: list[Absent] = []
        self._stage: str | None = None
        self._reset_session()

    def _reset_session(self) -> None:
        self._meter: Meter | None = None
        self._trainer: Trainer | None = None
        self._window = ("", TRAIN)
        self._hooks: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        # Threads, locks and library handles stay in the process that made them (ddp_spawn pickles callbacks).
        session = ("_meter", "_trainer", "_window", "_hooks")
        return {key: value for key, value in self.__dict__.items() if key not in session}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_session()

    # Results

    @property
    def total_joules(self) -> float | None:
        """Joules so far, restarts included; None where nothing was read. `summary` says how it was got."""
        return self._totals().joules()

    def summary(self) -> dict[str, Any]:
        """The run so far in plain types, valid during and after `fit`; joules that nobody read are None."""
        totals, steps, samples = self._totals(), self._base_steps + self._steps, self._all_samples()
        train_j = totals.joules(stage=TRAIN)
        used: dict[tuple[str, str], dict[DeviceId, str]] = {}
        for cell in totals.energy_uj:
            used.setdefault((cell.source, cell.method), {}).setdefault(cell.device, "")
        for source in self._opened:
            used.setdefault((source.name, source.method), {}).update(source.devices)
        methods = {method for _, method in used}
        return {
            "total_joules": totals.joules(),
            "measured_joules": totals.joules(estimated=False),
            "estimated_joules": totals.joules(estimated=True),
            "by_domain": {kind: totals.joules(kind=kind) for kind in KINDS},
            "by_phase": {label: totals.joules(label=label) for label in totals.labels()},
            "seconds_by_phase": {
                label: sum(ns for (name, _), ns in totals.window_ns.items() if name == label) / 1e9
                for label in totals.labels()
            },
            "train_joules": train_j,
            "val_joules": totals.joules(stage=VAL),
            "seconds": totals.seconds,
            "coverage_ratio": totals.coverage_ratio,
            "gaps": totals.gaps,
            "segments": totals.segments,
            "sources": [
                {
                    "name": name,
                    "method": method,
                    "devices": [
                        {"host": d.host, "kind": d.kind, "uid": d.uid, "name": text} for d, text in devices.items()
                    ],
                }
                for (name, method), devices in used.items()
            ],
            "absent": [{"name": a.name, "status": a.status.value, "reason": a.reason} for a in self._absent],
            "method": "none" if not methods else methods.pop() if len(methods) == 1 else "mixed",
            "steps": steps,
            "joules_per_step": train_j / steps if train_j is not None and steps else None,
            "samples": samples,
            "joules_per_sample": train_j / samples if train_j is not None and samples else None,
        }

    # Checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Totals of the whole run so far. In a distributed fit, call it on all ranks, as Lightning does."""
        if self._meter is not None and self._trainer is not None:
            self._meter.read()
            self._exchange(self._trainer)
        return {
            "totals": self._totals().state_dict(),
            "steps": self._base_steps + self._steps,
            "samples": self._all_samples(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the checkpoint's totals in place of what this object held; this fit comes on top.

        So it makes no difference whether it arrives before or after `on_fit_start`, or twice.
        """
        if self._stage not in (None, "fit"):
            return  # `trainer.test(ckpt_path="best")` must not take back the joules of the fit before it
        self._base = Totals.from_state_dict(state_dict["totals"])
        self._base_steps = int(state_dict["steps"])
        self._base_samples = state_dict["samples"]

    # Hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note what the trainer does."""
        self._stage = stage

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the sources, start reading, and say once what is measured."""
        self._close()
        self._trainer = trainer
        self._window = (self._phase(trainer), TRAIN)
        self._meter = Meter(resolve(self._sources), interval_s=self._interval_s)
        self._meter.start(*self._window, select=lambda source, devices: _own_devices(trainer, source, devices))
        self._opened, self._absent = self._meter.opened, self._meter.absent
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "register_step_post_hook"):
                self._hooks.append(optimizer.register_step_post_hook(self._count_step))
        self._exchange(trainer)
        rank_zero_info(_announcement(self._opened, self._absent))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A phase that changed at the last batch's end begins here, whatever the order of callbacks."""
        self._enter(trainer, TRAIN)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count samples; log when Lightning logs."""
        if self._meter is None:
            return
        size = _batch_size(batch)
        self._samples = None if size is None or self._samples is None else self._samples + size
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
        """A last reading, logged; the thread ends."""
        if self._meter is None:
            return
        self._synchronize(trainer)
        self._meter.stop()  # first, so that what is logged last is what `summary` says
        self._log(trainer)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The thread ends; what was read stays."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Whatever happened, nothing is left running."""
        self._close()
        self._stage = None

    # Inside

    def _enter(self, trainer: Trainer, stage: str) -> None:
        window = (self._phase(trainer), stage)
        if self._meter is None or window == self._window:
            return
        self._synchronize(trainer)  # else the kernels queued so far are booked on the next window
        self._meter.mark(*window)
        self._window = window

    def _phase(self, trainer: Trainer) -> str:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            phase = getattr(callback, "phase", None)
            if callback is not self and isinstance(phase, str):
                return phase or "setup"
        return TRAIN

    def _synchronize(self, trainer: Trainer) -> None:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _count_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Lightning steps the optimizer also where training_step returned None; no gradient, no step.
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            self._steps += 1

    def _totals(self) -> Totals:
        totals = self._base
        if self._meter is not None:
            totals = totals.add(self._meter.totals())
        return totals.add(self._others, wall=False)

    def _all_samples(self) -> int | None:
        parts = (self._base_samples, self._samples, self._other_samples)
        return None if any(part is None for part in parts) else sum(part for part in parts if part is not None)

    def _exchange(self, trainer: Trainer) -> None:
        """Learn the other ranks' sums. All ranks call this at the same points of the loop."""
        distributed = torch.distributed
        if trainer.world_size < 2 or not (distributed.is_available() and distributed.is_initialized()):
            return
        assert self._meter is not None
        own = (self._meter.totals(), self._samples, self._meter.opened)
        every: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(every, own)
        others = [each for rank, each in enumerate(every) if rank != distributed.get_rank()]
        self._others, self._other_samples = Totals(), 0
        self._opened = list(self._meter.opened)
        for totals, samples, opened in others:
            self._others = self._others.add(totals, wall=False)
            self._other_samples = (
                None if samples is None or self._other_samples is None else self._other_samples + samples
            )
            self._opened += opened

    def _log(self, trainer: Trainer) -> None:
        if self._meter is None:
            return
        self._meter.read()
        self._exchange(trainer)
        watts = self._meter.watts()
        if not trainer.is_global_zero:
            return
        metrics = _metrics(
            self._totals(), self._base_steps + self._steps, self._all_samples(), watts, self._meter.opened
        )
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            separator = logger.group_separator
            logger.log_metrics({name.replace("/", separator): value for name, value in metrics.items()}, step=step)

    def _close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._meter is not None:
            self._meter.stop()
            self._base = self._totals()
            self._base_steps += self._steps
            self._base_samples = self._all_samples()
            self._others, self._steps, self._samples, self._other_samples = Totals(), 0, 0, 0
        self._reset_session()


def _own_devices(trainer: Trainer, source: EnergySource, devices: Mapping[DeviceId, str]) -> Collection[DeviceId]:
    """The rank's own GPU; on local rank 0, what the machine shares; on each, what covers the process."""
    if source.scope == "process":
        return list(devices)
    root = trainer.strategy.root_device
    gpus = [d for d in devices if d.kind == "gpu"]
    if root.type == "cuda" and not torch.version.hip:
        uuid = str(torch.cuda.get_device_properties(root).uuid)
        own = [d for d in gpus if d.uid.removeprefix("GPU-") == uuid]
        # No match is a MIG slice, whose parent has another UUID: then all that this process sees is its own.
        gpus = own or gpus
        shared = [] if trainer.local_rank else [d for d in devices if d.kind != "gpu"]
        return [*gpus, *shared]
    return [] if trainer.local_rank else list(devices)


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


def _metrics(
    totals: Totals, steps: int, samples: int | None, watts: Mapping[DeviceId, float], opened: list[Opened]
) -> dict[str, float]:
    """All that is logged; a figure that nobody read is left out, one with an estimated part is named so."""
    metrics: dict[str, float] = {"energy/seconds": totals.seconds}

    def put(name: str, per: int | None = 1, **which: str) -> None:
        joules = totals.joules(**which)  # type: ignore[arg-type]
        if joules is not None and per:
            estimated = totals.joules(estimated=True, **which) is not None
            metrics[name + "_estimated" * estimated] = joules / per

    put("energy/total_joules")
    for kind in KINDS:
        put(f"energy/{kind}_joules", kind=kind)
    for stage in (TRAIN, VAL):
        put(f"energy/{stage}_joules", stage=stage)
    for label in totals.labels():
        put(f"energy/phase/{label}_joules", label=label)
    put("energy/joules_per_step", per=steps, stage=TRAIN)
    put("energy/joules_per_sample", per=samples, stage=TRAIN)

    methods = {device: source.method for source in opened for device in source.devices}
    for name, kinds in (*((kind, {kind}) for kind in KINDS), ("total", set(KINDS))):
        devices = [d for d in methods if d.kind in kinds]
        if devices and all(d in watts for d in devices):  # a sum with a device missing would look like a saving
            suffix = "_estimated" if any(methods[d] == "estimated" for d in devices) else ""
            metrics[f"power/{name}_watts{suffix}"] = sum(watts[d] for d in devices)
    if totals.expected_ns:
        metrics["energy/coverage_ratio"] = totals.coverage_ratio
        metrics["energy/gaps"] = totals.gaps
    return metrics


def _announcement(opened: list[Opened], absent: list[Absent]) -> str:
    lines = []
    if opened:
        lines.append("Energy of this run:")
    else:
        lines.append("Energy of this run: no joules, seconds only, because no source could be used:")
    for source in opened:
        for device, text in source.devices.items():
            word = source.method if source.method != "estimated" else "ESTIMATED, not measured"
            lines.append(f"  {device.kind}: {source.name} ({word}): {text} [{device.uid}]")
    lines += [f"  not used: {a.name} ({a.status.value}): {a.reason}" for a in absent]
    return "\n".join(lines)
