"""Rows of ``estdgm bench kernels``: seconds of one case and backend, and their ratios."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_estdgm.method._masks import BlockSize, size_entry

PRODUCTS = ("Y", "dX", "dW")
"""Output, gradient of the input, gradient of the weight."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_TF32 = 1e-2


def row(
    kind: str,
    shape: Mapping[str, Any],
    dtype: torch.dtype,
    block_size: BlockSize | None,
    density: float,
    backend: str,
    seconds: tuple[float, float] | None,
    products: Mapping[str, Mapping[str, Any] | None],
    notes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the row of one case and implementation.

    Ratios are None where there was no time, or where a product came out wrong.
    ``speedup`` is dense over sparse time, ``efficiency`` is ``speedup * density``: the rate of useful FLOPs over the
    dense library's. Of the whole layer, and in ``products`` of each product.

    Args:
        kind: "linear" or "convolution".
        shape: the layer's sizes, by name.
        dtype: dtype of the products.
        block_size: side of a block, or a pair, in the row as words; None where the layout has none.
        density: active share.
        backend: name of the backend or peer.
        seconds: dense and sparse seconds of forward and backward together with autograd; None if it cannot do all of
            it.
        products: rows of the products by name of `PRODUCTS`, as `product_row` makes them.
        notes: remarks by subject.

    """
    wrong = any(found is not None and found["wrong"] for found in products.values())
    dense_s, sparse_s = seconds or (None, None)
    speedup = dense_s / sparse_s if dense_s and sparse_s and not wrong else None
    return {
        "kind": kind,
        "dtype": str(dtype).removeprefix("torch."),
        **shape,
        "block_size": None if block_size is None else size_entry(block_size),
        "density": density,
        "backend": backend,
        "dense_s": dense_s,
        "sparse_s": sparse_s,
        "speedup": speedup,
        "efficiency": None if speedup is None else speedup * density,
        "products": {name: products.get(name) for name in PRODUCTS},
        "wrong": wrong,
        "notes": dict(notes or {}),
    }


def product_row(dense_s: float, sparse_s: float, flops: float, density: float, error: float, wrong: bool) -> Any:
    """Return the row of one product: seconds, FLOPs a second (of the sparse one: useful ones), and their ratio.

    Args:
        dense_s: seconds of the dense product.
        sparse_s: seconds of the sparse product.
        flops: FLOPs of the dense product; the useful ones are `density` times as many.
        density: active share.
        error: largest difference from the dense product with the mask applied, over its largest value.
        wrong: whether that is more than rounding; then there are no ratios.
    """
    dense_rate, useful_rate = flops / dense_s, density * flops / sparse_s
    return {
        "dense_s": dense_s,
        "sparse_s": sparse_s,
        "dense_flop_per_s": dense_rate,
        "useful_flop_per_s": None if wrong else useful_rate,
        "speedup": None if wrong else dense_s / sparse_s,
        "efficiency": None if wrong else useful_rate / dense_rate,
        "relative_error": error,
        "wrong": wrong,
    }


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected value; infinite where the result is not finite."""
    if result.shape != expected.shape:
        return float("inf")
    result, expected = result.double() if result.device.type == "cpu" else result.float(), expected.float()
    difference = (result - expected).abs().max()
    return float(difference / expected.abs().max().clamp_min(1e-30)) if bool(difference.isfinite()) else float("inf")


def is_wrong(error: float, dtype: torch.dtype) -> bool:
    """Whether an error is more than what `dtype` rounds off."""
    tf32 = dtype == torch.float32 and torch.cuda.is_available() and torch.get_float32_matmul_precision() != "highest"
    return not error <= (_TF32 if tf32 else _TOLERANCE.get(dtype, 4e-2))
