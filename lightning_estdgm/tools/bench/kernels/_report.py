"""Rows of ``estdgm bench kernels`` as a table and as a picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich.table import Table

from lightning_estdgm.tools._plotting import COLOURS, MARKERS, new_figure, save
from lightning_estdgm.tools.bench._output import Columns, terminal_table
from lightning_estdgm.tools.bench.kernels._rows import PRODUCTS

Row = Mapping[str, Any]
_LINES = ("-", "--", ":", "-.")


def shape_name(row: Row) -> str:
    """Return the layer of a row in a few characters."""
    if row["kind"] == "linear":
        return " x ".join(str(row[name]) for name in ("tokens", "out_features", "in_features"))
    kernel = "x".join(map(str, row["kernel_size"]))
    stride = f"/{row['stride'][0]}" if row["stride"] != [1, 1] else ""
    size = f"{row['height']}x{row['width']}"
    return f"{row['in_channels']} to {row['out_channels']}, {kernel}{stride}, {row['batch']} of {size}"


def kernels_columns(rows: Sequence[Row]) -> Columns:
    """Return head and cells of the table of rows."""
    head = ["dtype", "backend", "layer", "block", "density", "dense, ms", "sparse, ms", "speed-up", "efficiency"]
    head += [f"{product} eff." for product in PRODUCTS]
    cells = []
    for row in rows:
        products = [row["products"].get(name) or {} for name in PRODUCTS]
        cells.append(
            [
                row["dtype"],
                row["backend"],
                shape_name(row),
                "-" if row["block_size"] is None else str(row["block_size"]),
                f"{row['density']:.3f}",
                *(_number(row[name], "{:.2f}", 1e3) for name in ("dense_s", "sparse_s")),
                _failure(row) or _number(row["speedup"], "{:.2f}x"),
                _number(row["efficiency"], "{:.2f}"),
                *(_number(product.get("efficiency"), "{:.2f}") for product in products),
            ]
        )
    return head, cells


def kernels_table(rows: Sequence[Row]) -> Table:
    """Return the rows as a table for the terminal."""
    title = "sparse against dense: forward and backward of one layer, and efficiency of each product"
    return terminal_table(title, kernels_columns(rows), left=(0, 1, 2), wrapped=(2,))


def draw_kernels(rows: Sequence[Row], path: Path, machine: str) -> None:
    """Write a PNG: efficiency against density, a panel for each dtype and block size.

    Lines are backends (colours) and layers (dashes, markers); convolutions in thin lines, all of a net in a thick one.

    Raises:
        ValueError: if no row has an efficiency to draw.
    """
    drawn = drawable(rows)
    if not drawn:
        raise ValueError("expected rows with an efficiency, or with that of Y, to draw; got none")
    found = {row["block_size"] for row in drawn if row["block_size"] is not None}
    blocks = sorted(found, key=lambda size: (isinstance(size, str), size)) or [None]
    panels = list(itertools.product(dict.fromkeys(row["dtype"] for row in drawn), blocks))
    columns = min(len(blocks), 4)
    lines = math.ceil(len(panels) / columns)
    figure = new_figure(3.6 * columns + 3.2, 3.0 * lines + 0.9)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    names = list(dict.fromkeys(row["backend"] for row in drawn))
    colours = dict(zip(names, itertools.cycle(COLOURS), strict=False))
    layers = list(dict.fromkeys(shape_name(row) for row in drawn if row["kind"] == "linear"))
    handles: dict[str, Any] = {}
    for index, (dtype, block_size) in enumerate(panels):
        axes = grid[index // columns][index % columns]
        mine = [r for r in drawn if r["dtype"] == dtype and r["block_size"] in (block_size, None)]
        handles |= _panel(axes, mine, colours, layers)
        axes.set_title(f"{dtype}, block {block_size}" if block_size else dtype)
        axes.set_ylim(bottom=0.0)
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    figure.supxlabel("density (active share of the weights)")
    figure.supylabel("efficiency (useful FLOP/s over dense FLOP/s)")
    figure.suptitle(f"sparse products, forward and backward together (peers without gradients: Y) - {machine}")
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    save(figure, path)


def drawable(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that have an efficiency, or that of Y."""
    return [row for row in rows if _value(row) is not None]


def _panel(axes: Axes, rows: Sequence[Row], colours: Mapping[str, str], layers: Sequence[str]) -> dict[str, Any]:
    handles: dict[str, Any] = {}
    densities = [row["density"] for row in rows]
    handles["dense library's rate"] = axes.axhline(1.0, color="0.3", lw=1.2)
    slope = sorted({0.0, *densities})
    handles["below this line: slower than dense"] = axes.plot(slope, slope, color="0.6", lw=1.0, ls="--")[0]
    by_line: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in rows:
        value = _value(row)
        if value is not None:
            key = (row["kind"], row["backend"], shape_name(row))
            by_line.setdefault(key, []).append((row["density"], value))
    for (kind, backend, layer), points in by_line.items():
        xs, ys = zip(*sorted(points), strict=True)
        if kind == "linear":
            index = layers.index(layer)
            style: dict[str, Any] = {"ls": _LINES[index % len(_LINES)], "marker": MARKERS[index % len(MARKERS)]}
            label = f"{backend}, {layer}"
        else:
            style, label = {"lw": 0.6, "alpha": 0.5, "marker": "."}, f"{backend}, one convolution"
        handles[label] = axes.plot(xs, ys, color=colours[backend], ms=4, **style)[0]
    for backend, (densities, efficiencies) in _whole_nets(rows).items():
        handles[f"{backend}, all convolutions"] = axes.plot(
            densities, efficiencies, color=colours[backend], lw=3, marker="o"
        )[0]
    return handles


def _whole_nets(rows: Sequence[Row]) -> dict[str, tuple[list[float], list[float]]]:
    """Densities and efficiencies of all convolutions of the net together, each as often as the net has it."""
    sums: dict[tuple[str, float], tuple[float, float]] = {}
    for row in rows:
        if row["kind"] == "convolution" and row["speedup"] is not None:
            key = row["backend"], round(row["density"], 2)
            dense_s, sparse_s = sums.get(key, (0.0, 0.0))
            sums[key] = dense_s + row["count"] * row["dense_s"], sparse_s + row["count"] * row["sparse_s"]
    found: dict[str, tuple[list[float], list[float]]] = {}
    for (backend, density), (dense_s, sparse_s) in sorted(sums.items()):
        xs, ys = found.setdefault(backend, ([], []))
        xs.append(density)
        ys.append(density * dense_s / sparse_s)
    return found


def _failure(row: Row) -> str:
    return "FAILED" if "failed" in row["notes"] else "WRONG" if row["wrong"] else ""


def _value(row: Row) -> float | None:
    output = row["products"].get("Y") or {}
    return row["efficiency"] if row["efficiency"] is not None else output.get("efficiency")


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else form.format(factor * value)
