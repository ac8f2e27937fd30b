"""A plan as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from lightning_estdgm.method._masks import size_words
from lightning_estdgm.tools.planner._memory import added_bytes, dense_bytes
from lightning_estdgm.tools.planner._storage import fits_words


def plan_tables(result: Mapping[str, Any]) -> list[Table]:
    """Lay a plan out for printing: layers, memory, storage, traffic, mask updates."""
    setup, strategies = result["setup"], result["strategies"]
    columns = [_heading(strategy, setup) for strategy in strategies]

    def table(title: str, key: str, rows: Mapping[str, Sequence[float]]) -> Table:
        drawn = Table(title=title, title_justify="left")
        drawn.add_column(key)
        for column in columns:
            drawn.add_column(column, justify="right")
        for name, values in rows.items():
            if any(values):
                drawn.add_row(name, *(amount(name, value) for value in values))
        return drawn

    def rows_of(kind: str) -> dict[str, list[float]]:
        names = dict.fromkeys(name for s in strategies.values() for name in s[kind])
        return {name: [s[kind].get(name, 0.0) for s in strategies.values()] for name in names}

    held = rows_of("memory_bytes")
    totals = {
        "dense training": [dense_bytes(s["memory_bytes"]) for s in strategies.values()],
        "EST-DGM adds, at most": [added_bytes(s["memory_bytes"]) for s in strategies.values()],
    }
    layers: dict[str, list[str]] = {}
    for strategy, numbers in strategies.items():
        layers.setdefault(str(numbers["layers"]), []).append(strategy)
    return [
        *(_layer_table(strategies[names[0]], [_heading(name, setup) for name in names]) for names in layers.values()),
        table("Memory of one GPU, without activations", "held", held | totals),
        _storage_table(result["storage"]),
        table(
            "Traffic of one GPU in a step", "handed to collectives, sent by a ring", rows_of("traffic_bytes_per_step")
        ),
        table("Mask work of one GPU", "work", rows_of("mask_work")),
    ]


def _layer_table(numbers: Mapping[str, Any], headings: Sequence[str]) -> Table:
    n, masked = numbers["parameters"], numbers["masked_weights"]
    table = Table(
        title=f"{'; '.join(headings)}: {n:,} parameters, {masked:,} of them masked ({masked / n:.1%}), "
        f"density {numbers['density']:.3f}",
        title_justify="left",
    )
    for column in ("count", "layers", "shape", "unit", "density", "why"):
        table.add_column(column, justify="right" if column in ("count", "density") else "left", overflow="fold")
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for layer in numbers["layers"]:
        groups.setdefault((layer["shape"], layer["block_size"], layer["why"]), []).append(layer)
    for (shape, block_size, why), group in groups.items():
        names = [layer["name"] for layer in group]
        lowest, highest = (f"{pick(layer['density'] for layer in group):.3f}" for pick in (min, max))
        table.add_row(
            str(len(names)),
            ", ".join(names) if len(names) < 4 else f"{names[0]} ... {names[-1]}",
            " x ".join(map(str, shape)),
            "-" if not block_size else "weight" if block_size == 1 else size_words(block_size),
            "dense" if not block_size else lowest if lowest == highest else f"{lowest} to {highest}",
            why,
        )
    return table


def _storage_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        title="Storage and schedule: memory of one GPU under DDP, without activations; and the largest GPT that trains "
        "in a GPU",
        caption="density: the highest, and the mean over steps; of dense: of training without the method",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("storage", "schedule"):
        table.add_column(column, no_wrap=True)
    for column in ("density", "mean", "at most", "of dense", "at the end", "fits into", *rows[0]["largest_gpt"]):
        table.add_column(column, justify="right")
    for row in rows:
        density = row["density"]
        table.add_row(
            row["storage"],
            row["schedule"],
            *(f"{density[name]:.2f}" if row["storage"] == "packed" else "-" for name in ("highest", "mean")),
            amount("", sum(row["peak_bytes"].values())),
            f"{row['against_dense']:.2f}",
            amount("", sum(row["end_bytes"].values())),
            fits_words(row),
            *(f"{parameters / 1e9:.1f}B" for parameters in row["largest_gpt"].values()),
        )
    return table


def _heading(strategy: str, setup: Mapping[str, Any]) -> str:
    gpus, tensor = setup["gpus"], setup["tensor_parallel"]
    named = {"ddp": f"DDP, {gpus} GPUs", "fsdp2": f"FSDP2, {gpus} GPUs", "2d": f"2-D, {gpus // tensor} x {tensor} GPUs"}
    return named[strategy]


def amount(name: str, value: float) -> str:
    """Write bytes in the largest unit below them; ratios as such."""
    if name == "against the optimizer":
        return f"{value:.2f} times"
    if name == "FLOPs of observing":
        return f"{value:.2%}"
    if value == 0:
        return "-"
    unit = "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{float(f'{value:.3g}'):g} {unit}"
