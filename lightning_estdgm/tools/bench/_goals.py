"""Goals of the project, checked against the rows of a benchmark: pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from lightning_estdgm.tools.bench._output import Columns, terminal_table

Goal = dict[str, Any]


def kernel_goals(rows: Sequence[Mapping[str, Any]], gpu: str | None) -> list[Goal]:
    """Return the goals that these rows say something about, on an H100 or on a CPU; the best backend counts.

    Args:
        rows: rows of ``estdgm bench kernels``.
        gpu: name of the GPU; None for a CPU.

    Returns:
        "what", "goal", "measured", "reached" and the "backend" of each.
    """
    own = [r for r in rows if r["kind"] == "linear" and not r["backend"].startswith("torch ")]
    if gpu is None:
        return list(_cpu_kernel_goals(own))
    return list(_h100_kernel_goals(own)) if "H100" in gpu else []


def train_goals(results: Sequence[Mapping[str, Any]], gpu: str | None) -> list[Goal]:
    """Return the goals that results of ``estdgm bench train`` say something about, as `kernel_goals` does."""
    goals = []
    for result in results:
        workload = result["workload"]
        if workload["model"] != "gpt":
            continue
        is_small = gpu is None and workload["width"] == 1024
        is_large = gpu is not None and "H100" in gpu and workload["width"] == 2048 and result["mode"] == "compiled"
        if not (is_small or is_large):
            continue
        name = f"GPT, width {workload['width']}, {workload['layers']} layers, {result['mode']}"
        backend = result["settings"]["backend"]
        phase, whole = result["phases"]["refinement"]["speedup"], result["whole"]["speedup"]
        goals.append(_goal(f"{name}: refinement over dense", 4.0 if is_small else 3.5, phase, backend))
        goals.append(_goal(f"{name}: whole schedule over dense", 2.2 if is_small else 2.5, whole, backend))
    return goals


def goals_columns(goals: Iterable[Goal]) -> Columns:
    """Return head and cells of the table of goals."""
    head = ["what", "backend", "goal", "measured", ""]
    cells = []
    for goal in goals:
        short = "reached" if goal["reached"] else f"not reached: {goal['measured'] / goal['goal'] - 1:.0%}"
        cells.append([goal["what"], goal["backend"], f"{goal['goal']:g}", f"{goal['measured']:.2f}", short])
    return head, cells


def goals_table(goals: Sequence[Goal]) -> Table:
    """Return the goals as a table for the terminal."""
    return terminal_table("goals", goals_columns(goals), left=(0, 1, 4), wrapped=range(5))


def _h100_kernel_goals(rows: Sequence[Mapping[str, Any]]) -> Iterable[Goal]:
    def pick(block_size: int, density: float) -> list[Mapping[str, Any]]:
        wanted = ("bfloat16", 8192, 4096, 4096, block_size)
        keys = ("dtype", "tokens", "out_features", "in_features", "block_size")
        near = (r for r in rows if abs(r["density"] - density) < 0.01)
        return [r for r in near if tuple(r[key] for key in keys) == wanted]

    for block_size, least in ((128, 0.85), (64, 0.65)):
        for density in (0.25, 0.125):
            for product in ("Y", "dX", "dW"):
                found = [
                    (r["products"][product]["efficiency"], r["backend"])
                    for r in pick(block_size, density)
                    if r["products"][product] and r["products"][product]["efficiency"] is not None
                ]
                if found:
                    what = f"8192 x 4096 x 4096, bf16, block {block_size}, density {density}: efficiency of {product}"
                    yield _goal(what, least, *max(found))
    whole = [(r["speedup"], r["backend"]) for r in pick(32, 0.125) if r["speedup"] is not None]
    if whole:
        yield _goal("8192 x 4096 x 4096, bf16, block 32, density 0.125: faster than dense", 1.0, *max(whole))


def _cpu_kernel_goals(rows: Sequence[Mapping[str, Any]]) -> Iterable[Goal]:
    groups: dict[tuple[Any, ...], list[tuple[float, str]]] = {}
    for r in rows:
        is_large = r["tokens"] >= 2048 and min(r["out_features"], r["in_features"]) >= 1024
        if is_large and r["block_size"] in (64, 128) and r["density"] < 0.3 and r["efficiency"] is not None:
            shape = f"{r['tokens']} x {r['out_features']} x {r['in_features']}"
            key = shape, r["dtype"], r["block_size"], round(r["density"], 3)
            groups.setdefault(key, []).append((r["efficiency"], r["backend"]))
    for (shape, dtype, block_size, density), found in groups.items():
        what = f"{shape}, {dtype}, block {block_size}, density {density:g}: efficiency, forward and backward"
        yield _goal(what, 0.70 if block_size == 64 else 0.85, *max(found))


def _goal(what: str, goal: float, measured: float, backend: str) -> Goal:
    return {"what": what, "goal": goal, "measured": measured, "reached": measured >= goal, "backend": backend}
