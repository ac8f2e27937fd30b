"""Dense and sparse runs of one workload in turns, and what their steps say about a whole run."""

from __future__ import annotations

import contextlib
import gc
import io
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_estdgm.callbacks.dgm import DGMCallback
from lightning_estdgm.config import DGMConfig, Selection, Units
from lightning_estdgm.energy.energy_meter import EnergyMeter
from lightning_estdgm.energy.reading import SourceUnavailable
from lightning_estdgm.energy.sources.protocol import discover
from lightning_estdgm.method.schedules import EstDgm, Schedule
from lightning_estdgm.tools.bench.train.clock import DENSE, StepClock
from lightning_estdgm.tools.bench.train.train_config import (
    NOMINAL_STEPS,
    SETTLE_STEPS,
    TrainConfig,
    compressed_schedule,
)
from lightning_estdgm.tools.bench.train.whole import PhaseTimes, Step, phase_times, plain_seconds, whole_run
from lightning_estdgm.tools.bench.train.workloads import Workload, compile_blocks
from lightning_estdgm.tools.quiet import quiet_lightning

__all__ = ["counters", "dgm_config", "fit", "measure_train", "summarise"]


def measure_train(
    workload: Workload, config: TrainConfig, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Train dense and by EST-DGM in turns (dense, sparse, dense, sparse, dense, ...), and compare their steps.

    Returns:
        what `summarise` returns; with ``"decisions"``, what each layer ran on at the end, and the settings.
    """
    with contextlib.ExitStack() as stack:
        sources = counters()
        meter = stack.enter_context(EnergyMeter(sources, interval_s=0.1)) if sources else None
        dense: list[list[Step]] = []
        sparse: list[list[Step]] = []
        booked: dict[str, int] = {}
        decisions: list[dict[str, Any]] = []
        steps = SETTLE_STEPS + config.dense_steps + 1
        peaks = {DENSE: 0, "sparse": 0}
        for index in range(2 * config.rounds + 1):
            is_sparse = index % 2 == 1
            schedule = compressed_schedule(config) if is_sparse else None
            length = 3 * config.densities * config.interval if is_sparse else steps
            dgm = None if schedule is None else DGMCallback(dgm_config(workload, config, schedule))
            clock = StepClock(dgm, meter)
            say(f"{workload.name}, {config.mode}: run {index + 1} of {2 * config.rounds + 1}, {length} steps")
            peak = fit(workload, config, length, [clock, *([dgm] if dgm else [])])
            (sparse if is_sparse else dense).append(clock.steps())
            peaks["sparse" if is_sparse else DENSE] = max(peak, peaks["sparse" if is_sparse else DENSE])
            for label, count in clock.booked_steps.items():
                booked[label] = booked.get(label, 0) + count
            if dgm is not None:
                decisions = [asdict(decision) for decision in dgm.decisions()]
        energy = None if meter is None else _watts(meter, booked)
    result = summarise(dense, sparse, workload.items, energy)
    return {
        "workload": workload.describe(),
        "name": workload.name,
        "mode": config.mode,
        "settings": {**asdict(config), "precision": config.precision},
        **result,
        "peak_memory_bytes": peaks if config.device != "cpu" else None,
        "decisions": decisions,
    }


def summarise(
    dense: Sequence[Sequence[Step]],
    sparse: Sequence[Sequence[Step]],
    items: int,
    energy: dict[str, Any] | None,
    schedule: Schedule | None = None,
) -> dict[str, Any]:
    """Compare one more dense runs than sparse ones that lay between them.

    Args:
        dense: steps of the dense runs.
        sparse: steps of the sparse runs.
        items: tokens or images of a step.
        energy: "watts" by phase and for "dense", and "sources"; None without a counter.
        schedule: of the whole run; by default `NOMINAL_STEPS` of the default schedule.

    Returns:
        "dense", "phases" and "whole", each with seconds, ``items_per_s`` and joules; ``speedup`` is dense seconds over
        sparse ones for the same steps. "by_round" repeats the ratios for each sparse run and its two neighbours.
        "one_off" is what the first of its kind took beyond others in the first sparse run, by what it was the first of:
        choosing backends, tuning, compiling; it is in no ratio.
    """
    schedule = schedule or EstDgm().resolve(NOMINAL_STEPS)
    watts = {} if energy is None else energy["watts"]
    dense_s = plain_seconds(step for run in dense for step in run)
    times = phase_times([step for run in sparse for step in run])
    phases = whole_run(times, schedule)
    for name, phase in phases.items():
        phase |= {
            "step_s": phase["seconds"] / phase["steps"],
            "items_per_s": items * phase["steps"] / phase["seconds"],
            "speedup": dense_s * phase["steps"] / phase["seconds"],
            "plain_speedup": dense_s * phase["steps"] / phase["plain_s"],
            "watts": watts.get(name),
            "joules": _times(watts.get(name), phase["seconds"]),
            "measured": {
                "plain_s": dict(times[name].plain_s),
                "observing_s": dict(times[name].observing_s),
                "update_s": times[name].update_s,
            },
        }
    seconds = sum(phase["seconds"] for phase in phases.values())
    joules = [phase["joules"] for phase in phases.values()]
    dense_joules = _times(watts.get(DENSE), dense_s * schedule.total_steps)
    whole_joules = None if None in joules else sum(joules)
    return {
        "dense": {"step_s": dense_s, "items_per_s": items / dense_s, "watts": watts.get(DENSE)},
        "phases": phases,
        "whole": {
            "steps": schedule.total_steps,
            "seconds": seconds,
            "dense_seconds": dense_s * schedule.total_steps,
            "items_per_s": items * schedule.total_steps / seconds,
            "speedup": dense_s * schedule.total_steps / seconds,
            "joules": whole_joules,
            "dense_joules": dense_joules,
            "joules_ratio": dense_joules / whole_joules if dense_joules and whole_joules else None,
        },
        "by_round": [
            _ratios(before, run, after, schedule) for before, run, after in zip(dense, sparse, dense[1:], strict=False)
        ],
        "one_off": _one_off(sparse[0], times),
        "energy": "no counter" if energy is None else energy["sources"],
    }


def _ratios(before: Sequence[Step], run: Sequence[Step], after: Sequence[Step], schedule: Schedule) -> dict[str, float]:
    dense_s = statistics.fmean((plain_seconds(before), plain_seconds(after)))
    phases = whole_run(phase_times(run), schedule)
    ratios = {name: dense_s * phase["steps"] / phase["seconds"] for name, phase in phases.items()}
    return {
        "dense_step_s": dense_s,
        **ratios,
        "whole": dense_s * schedule.total_steps / sum(p["seconds"] for p in phases.values()),
    }


def _one_off(run: Sequence[Step], times: dict[str, PhaseTimes]) -> dict[str, float]:
    found = {"run_s": 0.0, "mask_s": 0.0, "window_s": 0.0}
    for index, step in enumerate(run):
        usual_s = dict(times[step.phase].plain_s)[step.density]
        if not step.counts:
            found["run_s" if index < SETTLE_STEPS else "mask_s"] += max(0.0, step.seconds - usual_s)
        elif step.observed and not run[index - 1].observed:
            usual_s += dict(times[step.phase].observing_s).get(step.density, 0.0)
            found["window_s"] += max(0.0, step.seconds - usual_s)
    return found


# ---- one run


def fit(workload: Workload, config: TrainConfig, steps: int, callbacks: Sequence[Callback], **settings: Any) -> int:
    """Train fresh weights for so many steps on one batch that lies on the device already.

    Returns:
        the most bytes that torch had allocated on the GPU; 0 on a CPU.
    """
    device = torch.device(config.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with (
        torch.random.fork_rng(devices=[]),
        quiet_lightning(),
        contextlib.redirect_stdout(io.StringIO()),
        _dynamo(config),
    ):
        torch.manual_seed(0)
        with device:
            module = workload.module()
        if config.compiled:
            compile_blocks(module)
        loader = DataLoader(_Same(workload.batch(device)), batch_size=None)
        trainer = Trainer(
            accelerator="cpu" if device.type == "cpu" else "gpu",
            devices=1,
            precision=config.precision,  # type: ignore[arg-type]
            max_steps=steps,
            callbacks=list(callbacks),
            gradient_clip_val=workload.clip,
            logger=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **settings,
        )
        trainer.fit(module, loader, loader)  # the second is not used, but Lightning wants one
    del trainer, module, loader
    gc.collect()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        return peak
    return 0


@contextlib.contextmanager
def _dynamo(config: TrainConfig) -> Iterator[None]:
    """Room for one version of a block for each density, and an error rather than a silent return to eager."""
    if not config.compiled:
        yield
        return
    import torch._dynamo

    with warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor")  # torch's own look at it
        yield


class _Same(IterableDataset[Any]):
    """One batch, again and again: loading it takes no time, dense or sparse."""

    def __init__(self, batch: tuple[Tensor, ...]) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        while True:
            yield self.batch


def dgm_config(workload: Workload, config: TrainConfig, schedule: EstDgm) -> DGMConfig:
    """The callback's settings: defaults but for the schedule, and what was asked for."""
    exclude = () if config.block_size in ("auto", 1) else workload.without_blocks
    return DGMConfig(
        schedule=schedule,
        units=Units(size=config.block_size),  # type: ignore[arg-type]
        backend=config.backend,
        selection=Selection(exclude=exclude),
    )


# ---- joules


def counters() -> list[str]:
    """Names of the energy sources that measure here; estimates are none."""
    names = []
    for name, source in discover():
        if isinstance(source, SourceUnavailable) or source.method == "estimated":
            continue
        try:
            source.open()
            if source.devices():
                names.append(name)
            source.close()
        except SourceUnavailable:
            continue
        except Exception:  # a vendor's library may fail in any way: then it is no counter
            continue
    return names


def _watts(meter: EnergyMeter, booked: dict[str, int]) -> dict[str, Any] | None:
    summary = meter.summary()
    seconds = summary["seconds_by_window"]
    watts = {
        label: joules / seconds[label]
        for label, joules in summary["by_window"].items()
        if label in booked and joules is not None and seconds[label] > 0
    }
    names = [source["name"] for source in summary["sources"]]
    return {"watts": watts, "sources": names} if watts else None


def _times(watts: float | None, seconds: float) -> float | None:
    return None if watts is None else watts * seconds
