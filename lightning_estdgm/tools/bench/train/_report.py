"""Results of ``estdgm bench train`` as tables and as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lightning_estdgm.tools._plotting import COLOURS, new_figure, save
from lightning_estdgm.tools.bench._output import Columns, terminal_table
from lightning_estdgm.tools.bench.train._profile import PARTS

Result = Mapping[str, Any]
_PART_COLOURS = dict(zip(PARTS, (*COLOURS[1:], "#c9c9c9"), strict=True))


def train_columns(result: Result) -> Columns:
    """Return head and cells of one result's table: dense, each phase, the whole schedule."""
    unit = result["workload"]["unit"]
    head = ["", "step, ms", f"{unit}/s", "over dense", "between windows", "range over rounds", "joules a step"]
    dense = result["dense"]
    cells = [["dense", _ms(dense["step_s"]), f"{dense['items_per_s']:,.0f}", "1.00x", "1.00x", "", _joules(dense)]]
    for name, phase in result["phases"].items():
        cells.append(
            [
                name,
                _ms(phase["step_s"]),
                f"{phase['items_per_s']:,.0f}",
                f"{phase['speedup']:.2f}x",
                f"{phase['plain_speedup']:.2f}x",
                _range(result, name),
                _joules(phase),
            ]
        )
    whole = result["whole"]
    step_s = whole["seconds"] / whole["steps"]
    joules = "-" if whole["joules"] is None else f"{whole['joules'] / whole['steps']:.2f}"
    times = [_ms(step_s), f"{whole['items_per_s']:,.0f}", f"{whole['speedup']:.2f}x", "", _range(result, "whole")]
    cells.append(["whole schedule", *times, joules])
    return head, cells


def train_table(result: Result) -> Table:
    """Return one result as a table for the terminal."""
    title = f"{result['name']}, {result['mode']}, {result['settings']['precision']}; joules: {energy_words(result)}"
    once = f"once a run: {sum(result['one_off'].values()):.1f} s; final backends: {backends_used(result)}"
    return terminal_table(title, train_columns(result), left=(0,), caption=once)


def energy_words(result: Result) -> str:
    """Return the sources of a result's joules in words, or why there are none."""
    return result["energy"] if isinstance(result["energy"], str) else "by " + ", ".join(result["energy"])


def backends_used(result: Result) -> str:
    """Return the number of masked layers that end on each backend, in words."""
    counts = Counter(decision["backend"] for decision in result["decisions"] if decision["masked"])
    return ", ".join(f"{name}: {count}" for name, count in counts.most_common()) or "none"


def profile_columns(profiled: Mapping[str, Any]) -> Columns:
    """Return head and cells of the table of a step's time by part, dense and in refinement."""
    head = ["part of a step", *(f"{arm}, {what}" for arm in profiled for what in ("ms", "share"))]
    cells = []
    for part in PARTS:
        values = [
            text
            for arm in profiled.values()
            for text in (f"{1e3 * arm['seconds'][part]:.2f}", f"{arm['share'][part]:.1%}")
        ]
        cells.append([part, *values])
    return head, cells


def profile_table(result: Result) -> Table:
    """Return the parts of a step's time as a table for the terminal."""
    title = f"where the time goes: {result['name']}, {result['mode']}, under torch's profiler"
    return terminal_table(title, profile_columns(result["profile"]), left=(0,))


def draw_train(results: Sequence[Result], path: Path, machine: str) -> None:
    """Write a PNG: for each result the speed of each phase over dense, and below it where the time of a step goes.

    Raises:
        ValueError: if there are no results.
    """
    if not results:
        raise ValueError("expected at least one result to draw, got none")
    figure = new_figure(max(6.5, 4.2 * len(results) + 1.5), 7.0)
    grid = figure.subplots(2, len(results), squeeze=False)
    most = max(phase["speedup"] for result in results for phase in result["phases"].values())
    for column, result in enumerate(results):
        axes = grid[0][column]
        ratios = {"dense": 1.0} | {name: phase["speedup"] for name, phase in result["phases"].items()}
        ratios["whole"] = result["whole"]["speedup"]
        bars = axes.bar(list(ratios), list(ratios.values()), color=("0.6", *COLOURS[1:4], COLOURS[0]))
        axes.bar_label(bars, fmt="%.2f", fontsize=9)
        axes.axhline(1.0, color="0.3", lw=1)
        axes.set_ylim(0, 1.15 * max(1.0, most))
        axes.tick_params(axis="x", labelsize=8, rotation=20)
        axes.set_title(f"{result['name']}\n{result['mode']}", fontsize=9)
        axes.set_ylabel(f"{result['workload']['unit']} per second over dense")
        _draw_profile(grid[1][column], result.get("profile") or {})
    handles = list(grid[1][0].containers)
    if handles:
        figure.legend(handles, [handle.get_label() for handle in handles], loc="outside lower center", ncols=4)
    figure.suptitle(f"training by EST-DGM against dense - {machine}", fontsize=10)
    save(figure, path)


def _draw_profile(axes: Any, profiled: Mapping[str, Any]) -> None:
    if not profiled:
        axes.remove()
        return
    left = dict.fromkeys(profiled, 0.0)
    for part in PARTS:
        widths = [1e3 * max(0.0, arm["seconds"][part]) for arm in profiled.values()]
        axes.barh(list(profiled), widths, left=list(left.values()), color=_PART_COLOURS[part], label=part)
        left = {arm: left[arm] + width for arm, width in zip(left, widths, strict=True)}
    axes.invert_yaxis()
    axes.set_xlabel("ms a step, under torch's profiler")


def _range(result: Result, name: str) -> str:
    values = [ratios[name] for ratios in result["by_round"]]
    return f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else "one round"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def _joules(row: Mapping[str, Any]) -> str:
    return "-" if row["watts"] is None else f"{row['watts'] * row['step_s']:.2f}"
