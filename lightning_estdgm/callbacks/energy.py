"""`EnergyMonitor`: the joules of a Lightning run, by device, phase, training and validation.

It has a method for each hook of Lightning and properties for users, so more than other classes, and only delegates.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from torch.optim import Optimizer

from lightning_estdgm.callbacks._internal.energy_fit import EnergyFit
from lightning_estdgm.callbacks._internal.run_description import (
    describe_method,
    describe_model,
    phase_of,
    run_folder,
)
from lightning_estdgm.callbacks._internal.work_counters import check_per
from lightning_estdgm.energy._device_assignment import ActiveSource, UnavailableSource, gpu_names
from lightning_estdgm.energy._export import EnergyMeasurement, check_prometheus, measurements
from lightning_estdgm.energy._footprint import Footprint
from lightning_estdgm.energy._ledger import Ledger
from lightning_estdgm.energy._reading import DeviceId
from lightning_estdgm.energy._run_file import (
    EXCEPTION,
    FILE_NAME,
    FINISHED,
    RUNNING,
    run_file_content,
    write_run_file,
)
from lightning_estdgm.energy._sampler import check_seconds
from lightning_estdgm.energy._summary import TRAIN, VAL, announcement, metrics, summary
from lightning_estdgm.energy.sources._protocol import EnergySource, listed, resolve


class EnergyMonitor(Callback):
    """Measures the energy of `Trainer.fit` and logs it to every logger at Lightning's own cadence.

    Logged (docs/guides/energy.md has the whole list): ``energy/total_joules``, ``energy/{gpu,cpu,dram}_joules``,
    ``energy/{train,val}_joules``, ``energy/phase/<phase>_joules``, ``energy/joules_per_step``,
    ``energy/joules_per_sample``, ``power/*_watts``, ``power/gpu/<node>/<local>_watts``,
    ``energy/coverage_ratio``, ``energy/gaps``, ``energy/seconds``. A figure with any estimated part ends in
    ``_estimated``. Totals are in the checkpoint, so restarts add up. At each checkpoint, at the end, and after an
    exception, ``energy.json`` is written to the first logger's folder (its `log_dir`, else the folder that holds the
    run's checkpoints), or to the trainer's root where there is no logger. The file of another run is left as it is:
    this one's is then ``energy-1.json``.

    Whatever fails here (a source, a logger, a file, a GPU that is lost) costs joules and a warning, never the run;
    what the functions of `per` raise is raised.

    A Trainer takes one of them, since two would log by the same names: name all sources in it.

    The phase is the `phase` (a str) of another callback of the trainer, such as `DGMCallback`; without one
    it is "train". Each device is read by one process of its host, and rank 0 logs the sums of all.

    Args:
        sources: Names ("nvml", "rapl", "cpu-estimate") or `EnergySource` objects; None takes all that work
            here, and the CPU estimate only where the CPU is not measured.
        interval_s: Seconds between two readings of the background thread.
        per: Further counts of each training batch: by the unit's name in the singular, a function of the batch
            that returns the number. ``{"token": lambda batch: batch["input_ids"].numel()}`` logs
            ``energy/joules_per_token``. "sample" replaces the count of samples, which otherwise is the batch
            size that all tensors of the batch agree on.
        idle_s: Seconds to measure before training starts; joules above that idle baseline are reported beside
            the gross ones, as ``energy/net_joules``.
        footprint: Factors for CO2 and cost, which are logged as ``footprint/*``.
        prometheus: File for the textfile collector of Prometheus's node exporter, rewritten at every log.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `interval_s` or `idle_s` is not positive, no source has that name, or a unit is no name.
        ModuleNotFoundError: `prometheus` is given and `prometheus_client` is not installed.

    Example:
        >>> from lightning_estdgm.callbacks.energy import EnergyMonitor
        >>> monitor = EnergyMonitor(["cpu-estimate"], interval_s=0.5)
        >>> monitor.total_joules is None
        True
    """

    def __init__(
        self,
        sources: Iterable[str | EnergySource] | str | None = None,  # a str is refused with a hint, also from YAML
        interval_s: float = 1.0,
        *,
        per: Mapping[str, Callable[[Any], int]] | None = None,
        idle_s: float | None = None,
        footprint: Footprint | None = None,
        prometheus: str | os.PathLike[str] | None = None,
    ) -> None:
        self._interval_s = check_seconds("interval_s", interval_s)
        self._sources = listed(sources)
        resolve(self._sources)  # a bad argument shows here, not after an hour in the queue
        self._per = check_per(per)
        self._idle_s = None if idle_s is None else check_seconds("idle_s", idle_s, "seconds or None")
        if footprint is not None and not isinstance(footprint, Footprint):
            raise TypeError(f"footprint must be a Footprint or None, got {footprint!r}")
        self._footprint = footprint
        if prometheus is not None:
            check_prometheus()
        self._prometheus = None if prometheus is None else Path(prometheus)
        self._ledger = Ledger()
        self._assigned: list[list[ActiveSource]] = []  # by rank
        self._unavailable: list[UnavailableSource] = []
        self._failing: frozenset[DeviceId] = frozenset()
        self._idle_w: dict[DeviceId, float] = {}
        self._power_w: dict[DeviceId, float] = {}  # as last logged
        self._model: dict[str, Any] | None = None
        self._stage: str | None = None
        self._fit: EnergyFit | None = None
        self._restored = False  # since the fit before
        self._measured: tuple[weakref.ref[Any], ...] = ()  # Trainer and module of the last fit
        self._is_other = False  # whether those of the fit before were others

    def __getstate__(self) -> dict[str, Any]:
        # Threads, locks and library handles stay in the process that made them (ddp_spawn pickles callbacks).
        return {**self.__dict__, "_fit": None, "_measured": ()}

    # Results

    @property
    def total_joules(self) -> float | None:
        """Joules so far, restarts included; None if nothing was read. `summary` has the estimated part."""
        return self._ledger.total().joules()

    def summary(self) -> dict[str, Any]:
        """Return the run so far in plain types, during and after `fit`; joules that nobody read are None."""
        if self._fit is not None:
            self._failing = self._fit.failing()
        return summary(
            self._ledger.total(),
            self._active(),
            self._unavailable,
            failing=self._failing,
            idle_w=None if self._idle_s is None else self._idle_w,
            footprint=self._footprint,
        )

    def measurements(self) -> list[EnergyMeasurement]:
        """Return the run so far under OpenTelemetry's names; watts are those of the last log."""
        return measurements(self._ledger.total(), self._active(), self._power_w)

    # Checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Return the totals of the run so far. In a distributed fit, call it on all ranks, as Lightning does."""
        if self._fit is not None:
            self._fit.read()
            self._exchange(self._fit)
        return self._ledger.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace the totals by those of the checkpoint; the current fit comes on top.

        It may be called before or after `on_fit_start`, and twice.
        """
        if self._stage not in (None, "fit"):
            return  # `trainer.test(ckpt_path="best")` must not take back the joules of the fit before it
        self._restored = True
        try:
            self._ledger.load_state_dict(state_dict)
        except (AttributeError, LookupError, TypeError, ValueError) as e:
            rank_zero_warn(
                f"the energy in the checkpoint cannot be read ({type(e).__name__}: {e}): "
                "the joules before it are missing from this run's totals"
            )

    # Hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second monitor; note the stage of the Trainer, and the model before a strategy shards it."""
        count = sum(isinstance(callback, EnergyMonitor) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if count > 1:
            raise ValueError(
                f"expected one EnergyMonitor in the Trainer, got {count}: they would log by the same names. One "
                'takes several sources: EnergyMonitor(["nvml", "rapl"])'
            )
        self._stage = stage
        self._model = describe_model(pl_module) if next(pl_module.parameters(), None) is not None else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the sources, assign devices to ranks, start reading, and announce once what is measured."""
        self._close()
        self._is_other = [each() for each in self._measured] != [trainer, pl_module]
        self._measured = weakref.ref(trainer), weakref.ref(pl_module)
        self._fit = fit = EnergyFit(trainer, resolve(self._sources), interval_s=self._interval_s, per=self._per)
        fit.start(self._phase(trainer), TRAIN, idle_s=self._idle_s)
        self._power_w = {}  # of the devices of the fit before
        self._assigned, self._unavailable = fit.assigned, fit.unavailable
        self._ledger.begin(fit.key, fit.totals)
        self._exchange(fit)
        try:
            fit.describe(pl_module, self._model)
        except Exception as e:
            rank_zero_warn(f"the run cannot be described, so it writes no {FILE_NAME}: {type(e).__name__}: {e}")
        rank_zero_info(announcement(self._active(), self._unavailable, self._idle_w))
        if trainer.is_global_zero:
            fit.log.add_layout(with_gpus=bool(gpu_names(self._assigned)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where the figures hold an earlier fit by another Trainer, or of another model; all is restored now."""
        if self._fit is not None and len(self._ledger.fits()) > 1 and self._is_other and not self._restored:
            self._fit.log.warn_of_earlier_fits()
        self._restored = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Enter a phase that changed at the end of the last batch, whatever the order of callbacks."""
        self._enter(trainer, TRAIN)
        if self._fit is not None:
            self._fit.begin_batch()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note that the step that comes next has gradients, which it may clear itself."""
        if self._fit is not None:
            self._fit.note_gradients(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count samples; log when Lightning logs."""
        if self._fit is None:
            return
        self._fit.count(batch)
        # Lightning's condition holds on every micro-batch of a step that is due: log on the last one.
        if trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate():
            self._log(trainer, self._fit)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attribute energy to validation."""
        self._enter(trainer, VAL)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attribute energy to training again."""
        self._enter(trainer, TRAIN)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the run's file, so that a run that is killed later can be reported; `state_dict` has read before."""
        if self._fit is not None:
            self._write(trainer, self._fit, RUNNING)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the run's file where checkpoints hold weights alone, of which Lightning does not tell callbacks."""
        if self._fit is not None and any(getattr(c, "save_weights_only", False) for c in trainer.checkpoint_callbacks):
            self._fit.read()
            self._exchange(self._fit)
            self._write(trainer, self._fit, RUNNING)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read a last time, log it, write the run's file; the thread ends."""
        if self._fit is None:
            return
        self._fit.synchronize()
        self._fit.stop()  # first, so that the last values logged are those of `summary`
        self._log(trainer, self._fit)
        self._write(trainer, self._fit, FINISHED)
        if trainer.is_global_zero:
            self._fit.log.add_hparams(lambda: describe_method(self._others(trainer)))
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the readings so far and write the run's file; the thread ends."""
        if self._fit is not None:
            self._fit.stop()
            self._write(trainer, self._fit, EXCEPTION)
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing running, whatever happened."""
        self._close()
        self._stage = None

    # Inside

    def _active(self) -> list[ActiveSource]:
        return [source for sources in self._assigned for source in sources]

    def _others(self, trainer: Trainer) -> list[Callback]:
        return [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]

    def _phase(self, trainer: Trainer) -> str:
        return phase_of(self._others(trainer)) or TRAIN

    def _enter(self, trainer: Trainer, stage: str) -> None:
        if self._fit is not None:
            self._fit.enter(self._phase(trainer), stage)

    def _exchange(self, fit: EnergyFit) -> None:
        """Exchange sums with the other ranks. All ranks call this at the same points of the loop."""
        self._ledger.others, idle_w = fit.exchange()
        self._idle_w.update(idle_w)

    def _log(self, trainer: Trainer, fit: EnergyFit) -> None:
        fit.read()
        self._exchange(fit)
        fit.warn_of_failures()
        if not trainer.is_global_zero:
            return
        self._power_w = fit.mean_power.since_last(self._ledger.fit())
        gpus = gpu_names(self._assigned)
        fit.log.log_metrics(metrics(self._ledger.total(), self._active(), self._power_w, gpus, self._footprint))
        if self._prometheus is not None:
            fit.log.write_prometheus(self._prometheus, self.measurements())

    def _write(self, trainer: Trainer, fit: EnergyFit, status: str) -> None:
        """Write `energy.json` on rank 0; a run does not end for a summary that cannot be written."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            run = fit.description(self._ledger.fits())
            if run is None:
                return
            method = describe_method(self._others(trainer))
            content = run_file_content(status=status, run=run, method=method, energy=self.summary())
            fit.log.warn_of_another_file(write_run_file(run_folder(trainer), content))
        except Exception as e:
            rank_zero_warn(f"the energy summary cannot be written: {type(e).__name__}: {e}")

    def _close(self) -> None:
        if self._fit is not None:
            self._failing = self._fit.failing()
            self._fit.close()
        self._ledger.end()
        self._fit = None
