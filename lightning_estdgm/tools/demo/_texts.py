"""What the demo says between its tables: what it is about to do, how a run ended, what to look at next."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_estdgm.tools.demo._demo_config import DemoConfig
from lightning_estdgm.tools.demo._records import TITLES, RunRecord
from lightning_estdgm.tools.report._finished_run import kind_of


def announcement(config: DemoConfig, content: Mapping[str, Any]) -> str:
    """Return what will be trained, on what, and how often."""
    data, machine = content["data"], content["environment"]
    source = f"Python's {data['source']}" if config.text is None else data["source"]
    pairs = f"{config.seeds} seeds, " if config.seeds > 1 else ""
    return (
        f"A small GPT of width {config.width} learns {source} ({data['bytes']['train'] / 1e6:.1f} MB) byte by byte, on "
        f"{machine['cpu']}, {machine['threads']} thread(s).\n"
        f"It does so twice on the same batches: dense, then by EST-DGM ({pairs}{config.steps} steps each). Then a "
        f"smaller dense GPT, with as many weights to serve, has as many joules as EST-DGM. Files go to {config.out}."
    )


def result_line(run: RunRecord) -> str:
    """Return the outcome of a run in a line."""
    joules = run.energy.get("train_joules")
    energy = "" if joules is None else f", {joules:,.0f} J ({kind_of(run.energy)})"
    return (
        f"{TITLES[run.mode]}, seed {run.seed}: {len(run.steps)} steps in {math.fsum(run.steps.wall_s):.1f} s{energy}, "
        f"validation loss {run.validation[-1].loss:.4f}"
    )


def next_steps(json: Path, png: Path, report: Path, logs: Path) -> str:
    """Return where the results are, and what to open first."""
    return (
        "Next:\n"
        f"  open {report} in a browser: the joules of dense and EST-DGM to the same loss, with all that they rest on\n"
        f"  open {png}: loss over joules and over weights to serve, densities, masks\n"
        f"  {_beside_python('tensorboard')} --logdir {logs}  (then http://localhost:6006/#custom_scalars)\n"
        f"  every step in numbers: {json}\n"
        "For a training of your own: Trainer(callbacks=[DGMCallback(), EnergyMonitor()]), as in README.md"
    )


def _beside_python(program: str) -> str:
    """Return how a program that was installed with this package is called, on the PATH or not."""
    path = Path(sys.executable).with_name(program)
    if shutil.which(program) or not path.exists():
        return program
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
