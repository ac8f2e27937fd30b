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


def serve_goals(result: Mapping[str, Any]) -> list[Goal]:
    """Return the goals of serving in one thread, width 1024, density 0.1, against the fastest dense fp32 runtime."""
    config, rows = result["config"], {row["runtime"]: row for row in result["rows"]}
    if (config["width"], config["density"], config["threads"]) != (1024, 0.1, 1) or "torch" not in rows:
        return []
    name = f"{config['network']}, units of {config['block_size']}"
    return [*_speed_goals(name, result, rows), *_size_goals(name, config["block_size"], rows)]


def goals_columns(goals: Iterable[Goal]) -> Columns:
    """Return head and cells of the table of goals."""
    head = ["what", "backend", "goal", "measured", ""]
    cells = []
    for goal in goals:
        limit = f"{'at most ' if goal.get('at_most') else ''}{goal['goal']:g}"
        digits = 3 if goal.get("at_most") else 2
        short = "reached" if goal["reached"] else f"not reached: {goal['measured'] / goal['goal'] - 1:.0%}"
        cells.append([goal["what"], goal["backend"], limit, f"{goal['measured']:.{digits}f}", short])
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


_DENSE = ("torch", "onnx", "openvino")  # runtimes in fp32 that compute zeros too
_SPEED = {
    "1": (6.0, 3.0),
    "16": (5.0, 2.5),
    "256": (5.0, 1.8),
    "2048": (4.0, 1.2),
}  # units of 16 and more; single weights
_SIZE = {"weight_bytes": ("resident weights over dense", 0.12, 0.16), "file_bytes": ("file over dense", 0.11, 0.14)}


def _speed_goals(name: str, result: Mapping[str, Any], rows: Mapping[str, Any]) -> Iterable[Goal]:
    def seconds(runtime: str, tokens: str) -> float:
        return rows[runtime]["seconds"][tokens]

    side, measured = result["config"]["block_size"], {str(n) for n in result["config"]["tokens"]}
    exceeds = result["cache_bytes"] is not None and rows["torch"]["weight_bytes"] > result["cache_bytes"]
    own = {"packed", "aoti"} & rows.keys()
    for tokens, (units, singles) in _SPEED.items():
        if tokens not in measured or not (side >= 16 or side == 1) or not own:
            continue
        goal = singles if side == 1 else 9.0 if tokens == "1" and exceeds else units
        dense = min((seconds(runtime, tokens), runtime) for runtime in _DENSE if runtime in rows)
        best = min((seconds(runtime, tokens), runtime) for runtime in own)
        what = f"{name}, {tokens} token{'s' if tokens != '1' else ''}: times {dense[1]}, the fastest dense"
        yield _goal(what, goal, dense[0] / best[0], best[1])
    halves = [(seconds(runtime, "1"), runtime) for runtime in ("packed-bf16", "aoti-bf16") if runtime in rows]
    if "1" in measured and side >= 16 and halves and "packed" in rows:
        ratio = min(seconds(runtime, "1") for runtime in own) / min(halves)[0]
        yield _goal(f"{name}, 1 token: bf16 values over fp32", 1.4, ratio, min(halves)[1])
    if {"packed", "packed-twice"} <= rows.keys() and "256" in measured:
        ratio = seconds("packed", "256") / seconds("packed-twice", "256")
        yield _goal(f"{name}, 256 tokens: two threads over one", 1.6, ratio, "packed-twice")


def _size_goals(name: str, side: int, rows: Mapping[str, Any]) -> Iterable[Goal]:
    for key, (what, units, singles) in _SIZE.items():
        if "packed" in rows and (side >= 16 or side == 1):
            share = rows["packed"][key] / rows["torch"][key]
            yield _goal(f"{name}: {what}", singles if side == 1 else units, share, "packed", at_most=True)
    if "packed-int8" in rows and side >= 16:
        share = rows["packed-int8"]["file_bytes"] / rows["torch"]["file_bytes"]
        yield _goal(f"{name}: int8 file over dense", 0.05, share, "packed-int8", at_most=True)


def _goal(what: str, goal: float, measured: float, backend: str, at_most: bool = False) -> Goal:
    reached = measured <= goal if at_most else measured >= goal
    found = {"what": what, "goal": goal, "measured": measured, "reached": reached, "backend": backend}
    return found | {"at_most": True} if at_most else found
