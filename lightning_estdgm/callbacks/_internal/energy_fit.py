"""Measurement of one fit: the sources of all ranks, the sampler of this one, and the counters of its work."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_estdgm.callbacks._internal.energy_log import EnergyLog
from lightning_estdgm.callbacks._internal.run_description import describe_model, describe_run
from lightning_estdgm.callbacks._internal.work_counters import BatchCounter, StepCounter
from lightning_estdgm.energy._device_assignment import ActiveSource, UnavailableSource, assign_devices
from lightning_estdgm.energy._mean_power import MeanPower
from lightning_estdgm.energy._reading import DeviceId, DeviceInfo, SourceUnavailable, hostname, own_gpus, torch_ids
from lightning_estdgm.energy._sampler import Sampler
from lightning_estdgm.energy._totals import Totals
from lightning_estdgm.energy.sources._protocol import EnergySource


class EnergyFit:
    """Measurement of one fit in one process; the ranks agree on which of them reads which device.

    Args:
        trainer: Trainer at the start of the fit.
        sources: Names with sources, or with the reason why there is none, as `resolve` gives them.
        interval_s: Seconds between two readings of the background thread.
        per: By unit, a function that counts it in a batch.

    Attributes:
        key: Id that no other fit has, the same on all ranks.
        assigned: By rank, the sources it reads.
        unavailable: Sources that are not used.
        log: Output of this fit.
        mean_power: Mean watts of all ranks' devices.
    """

    def __init__(
        self,
        trainer: Trainer,
        sources: Iterable[tuple[str, EnergySource | SourceUnavailable]],
        *,
        interval_s: float,
        per: Mapping[str, Callable[[Any], int]],
    ) -> None:
        self._trainer = trainer
        self._sampler = Sampler(sources, interval_s=interval_s)
        self._batches = BatchCounter(per, counting=_counts_batches(trainer))
        self._steps = StepCounter([])
        self._window = ("", "")
        self._places: list[tuple[str, str]] = []  # host and device, by rank
        self._run: dict[str, Any] | None = None
        self._failing_elsewhere: set[DeviceId] = set()  # as of the last exchange
        self.key = ""
        self.assigned: list[list[ActiveSource]] = []
        self.unavailable: list[UnavailableSource] = []
        self.log = EnergyLog(trainer)
        self.mean_power = MeanPower()

    def start(self, label: str, stage: str, *, idle_s: float | None) -> None:
        """Open the sources, assign devices to ranks, measure the idle baseline, start reading. Call it on all ranks."""
        trainer, sampler = self._trainer, self._sampler
        sampler.open(select=lambda source, devices: own_devices(trainer, devices))
        own = (uuid.uuid4().hex, hostname(), _device_name(trainer.strategy.root_device))
        every = _gather(trainer, (own, sampler.active, sampler.unavailable))
        self.key = every[0][0][0]
        self._places = [(host, device) for (_, host, device), _, _ in every]
        self.assigned = assign_devices([active for _, active, _ in every])
        self.unavailable = list(dict.fromkeys(source for _, _, found in every for source in found))
        sampler.keep(self.assigned[[each for each, _, _ in every].index(own)])
        if idle_s is not None:
            self.synchronize()
            sampler.measure_idle(idle_s)
        self._window = (label, stage)
        sampler.start(label, stage)
        self.mean_power = MeanPower(source for sources in self.assigned for source in sources)
        self._steps = StepCounter(trainer.optimizers)

    def enter(self, label: str, stage: str) -> None:
        """Attribute energy from now on to (label, stage)."""
        if (label, stage) != self._window:
            self.synchronize()  # else the kernels queued so far are counted in the next window
            self._sampler.mark(label, stage)
            self._window = (label, stage)

    def note_gradients(self, optimizer: Any) -> None:
        """Note that `optimizer` has its gradients and steps next."""
        self._steps.note_gradients(optimizer)

    def begin_batch(self) -> None:
        """Note that a training batch begins."""
        self._steps.begin_batch(self._trainer.optimizers)

    def count(self, batch: Any) -> None:
        """Count the samples and units of a training batch."""
        self._batches.count(batch)

    def read(self) -> None:
        """Read now."""
        self._sampler.read()

    def totals(self) -> Totals:
        """Return the sums of this process."""
        totals = self._sampler.totals()
        totals.steps, totals.counts = self._steps.steps, dict(self._batches.counts)
        return totals

    def exchange(self) -> tuple[Totals, dict[DeviceId, float]]:
        """Return the sums of the other ranks, and the idle watts of all. All ranks call it at the same points."""
        others, idle_w = Totals(), {}
        own = (self.totals(), self._sampler.idle_watts, self._sampler.failing())
        self._failing_elsewhere.clear()
        for rank, (totals, watts, failing) in enumerate(_gather(self._trainer, own)):
            idle_w.update(watts)
            if rank != self._trainer.global_rank:
                others = others.add(totals, beside=True)
                self._failing_elsewhere.update(failing)
        return others, idle_w

    def failing(self) -> frozenset[DeviceId]:
        """Return the devices of all ranks whose last reading failed."""
        return frozenset(self._sampler.failing()) | self._failing_elsewhere

    def warn_of_failures(self) -> None:
        """Warn once of each device that cannot be read any more."""
        self.log.warn_of(self._sampler.failing())

    def describe(self, pl_module: LightningModule, model: Mapping[str, Any] | None) -> None:
        """Note the description of the run for its file.

        Args:
            pl_module: Module of the fit.
            model: Description of the module before a strategy sharded it; None describes it as it is.
        """
        self._run = {
            **describe_run(self._trainer, pl_module),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "hosts": len({host for host, _ in self._places}),
            "devices": [device for _, device in self._places],
            "model": model or describe_model(pl_module),
        }

    def description(self, fits: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """Return the description of the run and its progress; None before `describe`.

        Args:
            fits: Fits whose joules the run holds, with their times; the last one is this one.
        """
        if self._run is None:
            return None
        return {
            **self._run,
            "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "fits": list(fits),
            "batch_size": self._batches.batch_size,
            "global_step": self._trainer.global_step,
            "epochs": self._trainer.current_epoch,
        }

    def synchronize(self) -> None:
        """Wait for the kernels that are queued on the rank's GPU."""
        device = self._trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def stop(self) -> None:
        """Read a last time and end the thread. May be called twice."""
        self._sampler.stop()

    def close(self) -> None:
        """Stop and remove all hooks. May be called twice."""
        self._steps.close()
        self._sampler.stop()


def own_devices(trainer: Trainer, devices: Mapping[DeviceId, DeviceInfo]) -> Collection[DeviceId]:
    """Return the rank's own GPU, and all that is no GPU; all devices where the run is not on GPUs."""
    root = trainer.strategy.root_device
    if root.type != "cuda":
        return list(devices)
    own = own_gpus(devices, *torch_ids(torch.cuda.get_device_properties(root)))
    return [d for d in devices if d.kind != "gpu" or d in own or not own]


def _gather(trainer: Trainer, own: Any) -> list[Any]:
    """Return every rank's object, by rank."""
    distributed = torch.distributed
    if trainer.world_size < 2 or not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, own)
    return every


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _counts_batches(trainer: Trainer) -> bool:
    """Return False where the batch is another rank's too (tensor parallelism): the group's first rank counts."""
    replicas = getattr(trainer.strategy, "distributed_sampler_kwargs", {}).get("num_replicas", trainer.world_size)
    return trainer.global_rank % (trainer.world_size // replicas) == 0
