"""FLOPs of the sparse operators, for torch's `FlopCounterMode` and what counts by it (Lightning's `measure_flops`).

Torch counts nothing for an operator that it has no formula for. As in its own formulas, a multiplication and an
addition are two, and a bias is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

DENSE_BACKENDS = ("dense", "reference")
"""Names of backends that skip nothing: they multiply zeros."""


def counts_multiplications(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Return a decorator for a function that returns the multiplications of an operator ``estdgm::name``.

    It takes the operator's arguments, and as ``out_val`` what the operator returned.
    """
    operator = getattr(torch.ops.estdgm, name)

    def register(multiplications: Callable[..., int]) -> Callable[..., int]:
        flop_registry.pop(operator, None)  # of a module that is loaded again
        register_flop_formula(operator, get_raw=True)(lambda *args, **kwargs: 2 * multiplications(*args, **kwargs))
        return multiplications

    return register


def of_active(whole: int, arguments: Sequence[Any], *, dense: bool = False) -> int:
    """Return the multiplications of a product on active units.

    Args:
        whole: multiplications of the product with all units.
        arguments: an operator's from `TOPOLOGY_SCHEMA` on.
        dense: whether the product is with all units.

    """
    row_ptr, _, col_ptr, _, _, backend = arguments[:6]
    if dense or backend in DENSE_BACKENDS or not can_read(row_ptr):
        return whole
    return whole * int(row_ptr[-1]) // ((row_ptr.shape[0] - 1) * (col_ptr.shape[0] - 1))


def can_read(tensor: Any) -> bool:
    """Whether a tensor has values: it is no fake one, by which compilers estimate; there the whole product counts."""
    return type(tensor) is Tensor and tensor.device.type != "meta"
