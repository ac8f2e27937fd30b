"""The sparse products against the dense library: forward and backward of one linear layer, shape by shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table

from lightning_estdgm.ops.selection import DENSE, Case, measure_case, refusals

__all__ = ["KernelsConfig", "kernels_table", "measure_kernels"]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class KernelsConfig:
    """The grid to measure.

    Attributes:
        shapes: (tokens, out_features, in_features).
        block_sizes: sides of a block.
        densities: active shares.
        dtypes: names of torch dtypes.
        device: where; the GPU if there is one.
        rounds: timed repetitions of each; the fastest counts.

    """

    shapes: Sequence[tuple[int, int, int]] = ((1024, 1536, 512), (1024, 2048, 512), (2048, 1024, 1024))
    block_sizes: Sequence[int] = (16, 32, 64, 128)
    densities: Sequence[float] = (0.125, 0.25, 0.5)
    dtypes: Sequence[str] = ("float32", "bfloat16")
    device: str = field(default_factory=_device)
    rounds: int = 5


def measure_kernels(config: KernelsConfig) -> Iterator[dict[str, Any]]:
    """Yield a row for each case: seconds dense and sparse (forward, dX and dW), and two ratios.

    ``speedup`` is dense over sparse time; ``efficiency`` is ``speedup * density``: the rate of useful FLOPs over the
    dense library's.
    """
    device = torch.device(config.device)
    for dtype in config.dtypes:
        for tokens, out_features, in_features in config.shapes:
            for block_size in config.block_sizes:
                for density in config.densities:
                    case = Case(tokens, out_features, in_features, block_size, density, getattr(torch, dtype), device)
                    yield from _rows(case, dtype, config.rounds)


def kernels_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Lay out the rows of `measure_kernels`."""
    table = Table(title="forward, input gradient and weight gradient of one linear layer, sparse against dense")
    for column in ("dtype", "backend", "tokens x out x in", "block", "density", "dense, ms", "sparse, ms"):
        table.add_column(column, justify="left" if column in ("dtype", "backend") else "right", no_wrap=True)
    table.add_column("speed-up", justify="right", no_wrap=True)
    table.add_column("efficiency", justify="right", no_wrap=True)
    for row in rows:
        shape = " x ".join(str(row[name]) for name in ("tokens", "out_features", "in_features"))
        times = (f"{row[name] * 1e3:.2f}" for name in ("dense_s", "sparse_s"))
        table.add_row(
            row["dtype"],
            row["backend"],
            shape,
            str(row["block_size"]),
            f"{row['density']:.3f}",
            *times,
            f"{row['speedup']:.2f}x",
            f"{row['efficiency']:.2f}",
        )
    return table


def _rows(case: Case, dtype: str, rounds: int) -> Iterator[dict[str, Any]]:
    names = [name for name, reason in refusals(case).items() if reason is None]
    density = case.topology().density
    seconds = measure_case(case, [DENSE, *names], rounds=rounds)
    for name in names:
        speedup = seconds[DENSE] / seconds[name]
        yield {
            "dtype": dtype,
            "tokens": case.tokens,
            "out_features": case.out_features,
            "in_features": case.in_features,
            "block_size": case.block_size,
            "density": density,
            "backend": name,
            "dense_s": seconds[DENSE],
            "sparse_s": seconds[name],
            "speedup": speedup,
            "efficiency": speedup * density,
        }
