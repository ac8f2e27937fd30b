"""Overhead of `EnergyMonitor`: steps of a small GPT with it against the same steps without it."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from lightning_estdgm.callbacks.energy import EnergyMonitor
from lightning_estdgm.recipes.gpt import ByteGPT
from lightning_estdgm.tools._quiet import QUIET_TRAINER, quiet_lightning
from lightning_estdgm.tools.bench._environment import device_name

WARMUP_STEPS = 5
"""Steps of a run that are not timed."""


@dataclass(frozen=True)
class EnergyBenchConfig:
    """Byte-level GPT whose steps are timed, and number of runs.

    Attributes:
        width: width of the model.
        layers: number of decoder blocks.
        batch_size: sequences a step.
        context: tokens a sequence.
        steps: timed steps of each run; the monitor logs once in as many.
        pairs: number of runs with the monitor and without, in turns; the ratio is the median over them.

    """

    width: int = 256
    layers: int = 2
    batch_size: int = 8
    context: int = 128
    steps: int = 50
    pairs: int = 40


def measure_energy_overhead(config: EnergyBenchConfig) -> dict[str, Any]:
    """Time short runs of a real Trainer with the monitor and without it, each with a CSV logger.

    Returns:
        "overhead" (median over the pairs of the ratio of their times, minus 1), "overhead_95" (its confidence interval
        from order statistics; None below 6 pairs), "plain_step_s" and "monitored_step_s" (medians), the "sources" that
        were read, "device" and the configuration.
    """
    seconds: dict[bool, list[float]] = {False: [], True: []}
    sources: list[str] = []
    for pair in range(config.pairs):
        for monitored in (False, True) if pair % 2 else (True, False):  # a drift of the machine hits both alike
            took_s, names = _run(config, monitored)
            seconds[monitored].append(took_s)
            sources = names or sources
    ratios = sorted(with_it / plain - 1.0 for plain, with_it in zip(seconds[False], seconds[True], strict=True))
    return {
        "config": asdict(config),
        "device": device_name(),
        "sources": sources,
        "plain_step_s": statistics.median(seconds[False]) / config.steps,
        "monitored_step_s": statistics.median(seconds[True]) / config.steps,
        "overhead": statistics.median(ratios),
        "overhead_95": _interval_of_median(ratios),
    }


def energy_table(result: dict[str, Any]) -> Table:
    """Return the results of `measure_energy_overhead` as a table for the terminal."""
    config = result["config"]
    sources = ", ".join(result["sources"]) or "no source"
    table = Table(title=f"EnergyMonitor ({sources}), one log in {config['steps']} steps")
    for column in ("plain step, ms", "monitored step, ms", "overhead", "95 % interval", "pairs"):
        table.add_column(column, justify="right")
    interval = result["overhead_95"]
    table.add_row(
        f"{result['plain_step_s'] * 1e3:.2f}",
        f"{result['monitored_step_s'] * 1e3:.2f}",
        f"{result['overhead']:+.2%}",
        "-" if interval is None else f"{interval[0]:+.2%} to {interval[1]:+.2%}",
        str(config["pairs"]),
    )
    return table


def _interval_of_median(ordered: Sequence[float]) -> list[float] | None:
    """Return the 95 % interval of the median of independent samples, by the normal approximation to the binomial."""
    n = len(ordered)
    if n < 6:
        return None
    low = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    return [ordered[low], ordered[n - 1 - low]]


def _run(config: EnergyBenchConfig, monitored: bool) -> tuple[float, list[str]]:
    """Return seconds of `config.steps` steps, and the names of the sources that the monitor read."""
    torch.manual_seed(0)
    model = ByteGPT(config.width, config.layers, heads=8, context=config.context)
    steps = WARMUP_STEPS + config.steps + 1
    tokens = torch.randint(0, 256, (config.batch_size * steps, config.context))
    clock, monitor = _Clock(config.steps), EnergyMonitor()
    loader = DataLoader(TensorDataset(tokens, tokens), batch_size=config.batch_size)
    with tempfile.TemporaryDirectory() as folder, quiet_lightning():
        Trainer(
            **QUIET_TRAINER | {"accelerator": "auto"},
            max_steps=steps,
            devices=1,
            logger=CSVLogger(folder, ""),
            log_every_n_steps=config.steps,
            callbacks=[clock, *([monitor] if monitored else [])],  # the clock first: what it times holds the others
            limit_val_batches=0,
        ).fit(model, loader, loader)
    names = [source["name"] for source in monitor.summary()["sources"]] if monitored else []
    return clock.seconds, names


class _Clock(Callback):
    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._begin = 0.0
        self.seconds = math.nan

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx not in (WARMUP_STEPS, WARMUP_STEPS + self._steps):
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        if batch_idx == WARMUP_STEPS:
            self._begin = now
        else:
            self.seconds = now - self._begin
