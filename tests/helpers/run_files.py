"""Folders of finished runs, as EnergyMonitor and CSVLogger leave them."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_estdgm.tools.report import read_run
from lightning_estdgm.tools.report._finished_run import FinishedRun

MODEL = {"class": "ByteGPT", "parameters": 1234, "fingerprint": "ab" * 32}
DGM = {
    "name": "EST-DGM",
    "schedule": {"cycles": 1},
    "final_density": 0.1,
    "density": 0.1,
    "flops_ratio": 0.4,
    "flops_executed_ratio": 0.5,
    "phases": ["exploration", "consolidation", "refinement"],
    "block_sizes": {"16": 4},
    "backends": {"cpu": 3, "dense": 1},
    "sparse_operators_ran": True,
}


def deep(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The dictionary with some of its values replaced, at any depth."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = deep(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return result


def summary(
    watts: float = 50.0,
    seconds: float = 20.0,
    method: dict[str, Any] | None = None,
    seed: int | None = 0,
    estimated: bool = False,
    started: str = "2026-11-23T08:00:00+00:00",
    **changes: Any,
) -> dict[str, Any]:
    """The content of an energy.json. ``changes`` replace parts of "run", "energy", "method" or the top."""
    joules = watts * seconds
    phases = method["phases"] if method else ["train"]
    source = {
        "name": "cpu-estimate" if estimated else "rapl",
        "method": "estimated" if estimated else "counter",
        "driver": "" if estimated else "intel-rapl 6.1",
        "devices": [
            {"host": "node", "kind": "cpu", "uid": "package-0", "name": "a CPU", "shared": False}
            | {"joules": joules, "watts": watts}
        ],
    }
    content = {
        "version": 1,
        "format": "lightning_estdgm.energy",
        "status": "finished",
        "run": {
            "name": "run",
            "started": started,
            "host": "node",
            "hosts": 1,
            "world_size": 1,
            "strategy": "SingleDeviceStrategy",
            "accelerator": "cpu",
            "precision": "32-true",
            "accumulate_grad_batches": 1,
            "model": MODEL,
            "batch_size": 16,
            "global_step": 100,
            "epochs": 1,
            "compiled": False,
            "seed": seed,
            "versions": {"python": "3.11.7", "torch": "2.13.0", "lightning": "2.6.6", "lightning_estdgm": "0.1.0"},
            "devices": ["cpu"],
        },
        "method": method,
        "energy": {
            "total_joules": joules,
            "measured_joules": None if estimated else joules,
            "estimated_joules": joules if estimated else None,
            "by_domain": {"gpu": None, "cpu": joules, "dram": None},
            "by_phase": {phase: joules / len(phases) for phase in phases},
            "seconds_by_phase": {phase: seconds / len(phases) for phase in phases},
            "train_joules": 0.9 * joules,
            "val_joules": 0.1 * joules,
            "seconds": seconds,
            "coverage_ratio": 0.999,
            "gaps": 0,
            "segments": 1,
            "sources": [source],
            "absent": [{"name": "nvml", "status": "unavailable", "reason": "no library"}],
            "method": source["method"],
            "steps": 100,
            "samples": 1600,
            "joules_per_step": 0.9 * joules / 100,
            "joules_per_sample": 0.9 * joules / 1600,
            "idle": None,
            "footprint": None,
        },
    }
    return deep(content, changes)


def write_run(
    folder: Path, losses: dict[int, float], every: int = 10, steps: int = 100, metric: str = "val_loss", **settings: Any
) -> Path:
    """A run at constant power: its energy.json, and a metrics.csv with a metric at some steps.

    Joules, seconds and watts are logged every ``every`` steps, at 9, 19, ..., and after the last step, at ``steps``.
    """
    content = summary(**deep({"run": {"global_step": steps}}, settings))
    folder.mkdir(parents=True)
    (folder / "energy.json").write_text(json.dumps(content))
    energy, method = content["energy"], content["method"]
    mark = "_estimated" if energy["estimated_joules"] is not None else ""
    rows = []
    for step in (*range(every - 1, steps, every), steps):
        share = min(steps, step + 1) / steps
        row = {"step": step, "energy/seconds": share * energy["seconds"]}
        if energy["total_joules"] is not None:
            row[f"energy/total_joules{mark}"] = share * energy["total_joules"]
            row[f"power/total_watts{mark}"] = energy["total_joules"] / energy["seconds"]
        if method:
            row["dgm/phase"] = min(2, int(3 * share))
        rows.append(row)
    rows += [{"step": step, "epoch": 0, metric: loss} for step, loss in losses.items()]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def at(day: int, *hours: tuple[float, float], ids: str = "") -> dict[str, Any]:
    """The part of an energy.json that tells when its fits ran, in hours of a day."""

    def time(hour: float) -> str:
        return f"2026-11-{day:02d}T{int(hour):02d}:{round(hour % 1 * 60):02d}:00.000+00:00"

    fits = [
        {"id": ids[i : i + 1] or f"{day}/{begin}-{end}", "started": time(begin), "ended": time(end), "steps": 100}
        for i, (begin, end) in enumerate(hours)
    ]
    return {"run": {"fits": fits, "started": fits[-1]["started"], "ended": fits[-1]["ended"]}}


def falling(end: float, start: float = 5.0) -> dict[int, float]:
    """Losses at steps 9, 19, ..., 99, in equal steps from ``start`` down to ``end``."""
    return {10 * i + 9: start + (end - start) * i / 9 for i in range(10)}


def write_arms(root: Path, seeds: int = 3, losses: tuple[float, float] = (2.0, 1.0), **settings: Any) -> list[Path]:
    """Dense and DGM in turns: 1000 J in 20 s down to the first loss, 600 J in 15 s to the second, more a seed."""
    folders = []
    for seed in range(seeds):
        for i, (name, method, watts, seconds) in enumerate((("dense", None, 50.0, 20.0), ("dgm", DGM, 40.0, 15.0))):
            started = f"2026-11-23T{8 + 2 * seed + i:02d}:00:00+00:00"
            each = {"method": method, "watts": watts + seed, "seconds": seconds, "seed": seed, "started": started}
            folders.append(write_run(root / f"{name}{seed}", falling(losses[i]), **deep(each, settings)))
    return folders


def read_runs(folders: Iterable[Path]) -> list[FinishedRun]:
    """The runs of these folders, without labels."""
    return [read_run(folder) for folder in folders]


def pair(
    root: Path,
    dense: dict[str, Any] | None = None,
    dgm: dict[str, Any] | None = None,
    losses: tuple[float, float] = (2.0, 1.0),
) -> list[FinishedRun]:
    """One dense and one DGM run, with settings of each."""
    first = write_run(root / "dense", falling(losses[0]), **(dense or {}))
    second = {"watts": 40.0, "seconds": 15.0, "method": DGM, **(dgm or {})}
    return read_runs([first, write_run(root / "dgm", falling(losses[1]), **second)])
