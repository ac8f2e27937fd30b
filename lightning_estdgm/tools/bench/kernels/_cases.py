"""One case by one backend: its products timed and checked, a backend that fails noted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_estdgm.sparse.autotune._cases import DENSE, Case, ConvCase
from lightning_estdgm.sparse.autotune._timing import measure_case
from lightning_estdgm.tools.bench.kernels._rows import is_wrong, product_row, relative_error, row
from lightning_estdgm.tools.bench.kernels._timing import take_turns


def attempt(
    kind: str,
    shape: Mapping[str, Any],
    case: Case | ConvCase,
    name: str,
    products: Callable[[], Mapping[str, Any]],
    rounds: int,
) -> dict[str, Any]:
    """Measure one backend, products and whole layer; one that raises makes a row that says so, and the rest goes on."""
    density = case.topology().density
    try:
        found = products()
        seconds = measure_case(case, [DENSE, name], rounds=rounds).seconds
    except Exception as e:  # a kernel on a new device may fail in any way
        reason = f"{type(e).__name__}: {e}"[:500]
        return row(kind, shape, case.dtype, case.block_size, density, name, None, {}, {"failed": reason})
    times = seconds[DENSE], seconds[name]
    return row(kind, shape, case.dtype, case.block_size, density, name, times, found)


def timed_product(
    dense: Callable[[], Tensor],
    sparse: Callable[[], Tensor],
    mask: Tensor | None,
    flops: float,
    case: Case | ConvCase,
    rounds: int,
) -> Any:
    """Time two calls in turns and compare their results, the dense one with `mask` applied; as `product_row`."""
    expected = dense()
    if mask is not None:
        expected = torch.where(mask, expected, torch.zeros_like(expected))
    error = relative_error(sparse(), expected)
    seconds = take_turns({"dense": dense, "sparse": sparse}, case.device, rounds)
    wrong = is_wrong(error, case.dtype)
    return product_row(seconds["dense"], seconds["sparse"], flops, case.topology().density, error, wrong)
