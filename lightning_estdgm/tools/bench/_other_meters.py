"""Joules of `EnergyMeter` against those of nvidia-smi and Zeus in the same stretch of training."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table

from lightning_estdgm.energy._energy_meter import EnergyMeter
from lightning_estdgm.energy._reading import torch_ids
from lightning_estdgm.recipes.gpt import ByteGPT
from lightning_estdgm.tools.bench._energy import WARMUP_STEPS, EnergyBenchConfig
from lightning_estdgm.tools.bench._environment import device_name


def measure_against(seconds: float, config: EnergyBenchConfig) -> dict[str, Any]:
    """Measure one stretch of training on an NVIDIA GPU by `EnergyMeter`, Zeus and nvidia-smi at the same time.

    nvidia-smi's power draw is sampled every 100 ms and integrated by trapezoids.

    Returns:
        "seconds", "device", and for each meter "joules" and "ratio" (its joules over EnergyMeter's).

    Raises:
        RuntimeError: if there is no NVIDIA GPU, nvidia-smi or Zeus here, or one of the three measured nothing.
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
        "device": device_name(),
        "uuid": uuid,
        "config": asdict(config),
        "meters": {name: {"joules": value, "ratio": value / ours} for name, value in joules.items() if value},
    }


def against_table(result: dict[str, Any]) -> Table:
    """Return the results of `measure_against` as a table for the terminal."""
    table = Table(title=f"{result['seconds']:.0f} s of training on {result['device']}")
    for column in ("meter", "joules", "against EnergyMeter"):
        table.add_column(column, justify="left" if column == "meter" else "right")
    for name, row in result["meters"].items():
        table.add_row(name, f"{row['joules']:.1f}", f"{row['ratio'] - 1:+.2%}")
    return table


def integrate_samples(samples: Sequence[tuple[float, float]], begin_s: float, end_s: float) -> float | None:
    """Return joules over [begin_s, end_s] by trapezoids, from (second, watts).

    The first and last watts reach to its ends. None where no sample lies in it.
    """
    inside = [(t, w) for t, w in samples if begin_s <= t <= end_s]
    if not inside:
        return None
    points = [(begin_s, inside[0][1]), *inside, (end_s, inside[-1][1])]
    return sum((t1 - t0) * (w0 + w1) / 2 for (t0, w0), (t1, w1) in itertools.pairwise(points))


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
