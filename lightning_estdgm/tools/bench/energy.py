"""What measuring costs: steps of a small GPT with `EnergyMonitor` against the same steps without it.

On an NVIDIA GPU also what it measures, against nvidia-smi and Zeus in the same run.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import shutil
import statistics
import subprocess
import tempfile
import threading
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
from lightning_estdgm.energy.energy_meter import EnergyMeter
from lightning_estdgm.energy.reading import torch_ids
from lightning_estdgm.recipes.gpt import ByteGPT
from lightning_estdgm.tools.quiet import quiet_lightning

__all__ = [
    "EnergyBenchConfig",
    "against_table",
    "energy_table",
    "integrate_samples",
    "measure_against",
    "measure_energy_overhead",
]

WARMUP_STEPS = 5


@dataclass(frozen=True)
class EnergyBenchConfig:
    """A byte-level GPT, and how its steps are paired.

    Attributes:
        width: of the model.
        layers: decoder blocks.
        batch_size: sequences a step.
        context: tokens a sequence.
        steps: timed in each run; the monitor logs once in as many.
        pairs: runs with the monitor and without, in turns; the ratio is the median over them.
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
        "device": _device(),
        "sources": sources,
        "plain_step_s": statistics.median(seconds[False]) / config.steps,
        "monitored_step_s": statistics.median(seconds[True]) / config.steps,
        "overhead": statistics.median(ratios),
        "overhead_95": _interval_of_median(ratios),
    }


def energy_table(result: dict[str, Any]) -> Table:
    """Lay out what `measure_energy_overhead` returned."""
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


def measure_against(seconds: float, config: EnergyBenchConfig) -> dict[str, Any]:
    """Measure one stretch of training on an NVIDIA GPU by `EnergyMeter`, Zeus and nvidia-smi at the same time.

    nvidia-smi's power draw is sampled every 100 ms and integrated by trapezoids.

    Returns:
        "seconds", "device", and for each meter "joules" and "ratio" (its joules over EnergyMeter's).

    Raises:
        RuntimeError: there is no NVIDIA GPU, nvidia-smi or Zeus here, or one of the three measured nothing.
    """
    if not torch.cuda.is_available() or torch.version.hip:
        raise RuntimeError("a comparison with nvidia-smi and Zeus needs an NVIDIA GPU; torch sees none here")
    if shutil.which("nvidia-smi") is None:
        raise RuntimeError("nvidia-smi is not on the PATH")
    if importlib.util.find_spec("zeus") is None:
        raise RuntimeError("Zeus is not installed: pip install zeus")
    from zeus.monitor import ZeusMonitor

    index = torch.cuda.current_device()
    uuid = f"GPU-{torch_ids(torch.cuda.get_device_properties(index))[0]}"
    model = ByteGPT(config.width, config.layers, heads=8, context=config.context).cuda()
    tokens = torch.randint(0, 256, (config.batch_size, config.context), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model.loss((tokens, tokens)).backward()
        optimizer.step()

    for _ in range(WARMUP_STEPS):
        step()
    zeus = ZeusMonitor(gpu_indices=[index], cpu_indices=[])
    with _NvidiaSmi(uuid) as smi, EnergyMeter(["nvml"], interval_s=0.1) as meter:
        zeus.begin_window("run")
        begin = time.monotonic()
        while time.monotonic() - begin < seconds:
            for _ in range(20):
                step()
            torch.cuda.synchronize()
        end = time.monotonic()
        measured = zeus.end_window("run")
    devices = [d for source in meter.summary()["sources"] for d in source["devices"]]
    ours = next((d["joules"] for d in devices if d["uid"].lower() == uuid.lower()), None)
    joules = {
        "EnergyMeter": ours,
        "Zeus": measured.gpu_energy.get(index),
        "nvidia-smi": integrate_samples(smi.samples, begin, end),
    }
    missing = [name for name, value in joules.items() if not value]
    if missing:
        raise RuntimeError(f"no energy measured by {', '.join(missing)} on {uuid}")
    assert ours is not None
    return {
        "seconds": end - begin,
        "device": _device(),
        "uuid": uuid,
        "config": asdict(config),
        "meters": {name: {"joules": value, "ratio": value / ours} for name, value in joules.items() if value},
    }


def against_table(result: dict[str, Any]) -> Table:
    """Lay out what `measure_against` returned."""
    table = Table(title=f"{result['seconds']:.0f} s of training on {result['device']}")
    for column in ("meter", "joules", "against EnergyMeter"):
        table.add_column(column, justify="left" if column == "meter" else "right")
    for name, row in result["meters"].items():
        table.add_row(name, f"{row['joules']:.1f}", f"{row['ratio'] - 1:+.2%}")
    return table


def integrate_samples(samples: Sequence[tuple[float, float]], begin_s: float, end_s: float) -> float | None:
    """Joules from (second, watts) by trapezoids over [begin_s, end_s]; the first and last watts reach to its ends.

    Returns None where no sample lies in it.
    """
    inside = [(t, w) for t, w in samples if begin_s <= t <= end_s]
    if not inside:
        return None
    points = [(begin_s, inside[0][1]), *inside, (end_s, inside[-1][1])]
    return sum((t1 - t0) * (w0 + w1) / 2 for (t0, w0), (t1, w1) in itertools.pairwise(points))


def _interval_of_median(ordered: Sequence[float]) -> list[float] | None:
    """95 % interval of the median of independent samples, by the normal approximation to the binomial."""
    n = len(ordered)
    if n < 6:
        return None
    low = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    return [ordered[low], ordered[n - 1 - low]]


def _run(config: EnergyBenchConfig, monitored: bool) -> tuple[float, list[str]]:
    """Seconds of `config.steps` steps, and the names of the sources that the monitor read."""
    torch.manual_seed(0)
    model = ByteGPT(config.width, config.layers, heads=8, context=config.context)
    steps = WARMUP_STEPS + config.steps + 1
    tokens = torch.randint(0, 256, (config.batch_size * steps, config.context))
    clock, monitor = _Clock(config.steps), EnergyMonitor()
    loader = DataLoader(TensorDataset(tokens, tokens), batch_size=config.batch_size)
    with tempfile.TemporaryDirectory() as folder, quiet_lightning():
        Trainer(
            max_steps=steps,
            devices=1,
            logger=CSVLogger(folder, ""),
            log_every_n_steps=config.steps,
            callbacks=[clock, *([monitor] if monitored else [])],  # the clock first: what it times holds the others
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
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


class _NvidiaSmi:
    """Power draw of one GPU as nvidia-smi prints it: (seconds on the monotonic clock, watts)."""

    def __init__(self, uuid: str) -> None:
        self._command = [
            *("nvidia-smi", "-i", uuid, "--query-gpu=power.draw", "--format=csv,noheader,nounits", "-lms", "100")
        ]
        self.samples: list[tuple[float, float]] = []

    def __enter__(self) -> _NvidiaSmi:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._thread.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                self.samples.append((time.monotonic(), float(line)))
            except ValueError:  # "[N/A]"
                continue


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
