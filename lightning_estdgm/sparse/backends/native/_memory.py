"""Loops around the products: zeros outside a mask, and single elements read and written.

Each does what torch does, sooner, where the compiled operators are in use and fit, and says whether it has.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_estdgm.method._masks import BlockSize, sides
from lightning_estdgm.sparse.backends.native._build import library_in_use

_SIZES = (1, 2, 4, 8)  # bytes of an element


def zero_outside_(weight: Tensor, active: Tensor, block_size: BlockSize) -> bool:
    """Do as `method._masks.keep_active_` does.

    What lies outside is nearly always zero already, so that reading is nearly all that there is to do.

    Args:
        weight: weight or gradient, ``(out, in, ...)``.
        active: bool, the mask of its units.
        block_size: sides of a unit.

    Returns:
        Whether it was done.

    """
    loaded = library_in_use()
    if loaded is None or not _is_plain(weight) or active.device.type != "cpu" or weight.element_size() == 1:
        return False
    if weight.dim() == 2 and not weight.is_contiguous():
        weight, active, block_size = weight.t(), active.t(), sides(block_size)[::-1]
    if weight.dim() < 2 or not weight.is_contiguous():
        return False
    if block_size == 1 and active.shape == weight.shape:  # a flag for each element
        weight, active = weight.flatten(1), active.flatten(1)
    rows, columns = sides(block_size)
    if weight.shape[:2] != (active.shape[0] * rows, active.shape[1] * columns):
        return False
    loaded.estdgm_zero_outside(
        weight.data_ptr(),
        weight.element_size(),
        active.shape[0],
        rows,
        active.shape[1],
        columns * math.prod(weight.shape[2:]),
        active.data_ptr(),
        *active.stride(),
        torch.get_num_threads(),
    )
    _count_write(weight)
    return True


def gather_(vector: Tensor, order: Tensor, tensors: Sequence[Tensor], places: Sequence[Tensor]) -> bool:
    """Read elements of several tensors into one vector.

    Args:
        vector: vector of as many elements as `order`, of the tensors' dtype.
        order: int32, for each element its place in the vector; those of the first tensor, then of the next.
        tensors: tensors whose elements lie in order.
        places: for each tensor int32, flat indices into it; none is checked.

    Returns:
        Whether it was done.

    """
    return _move("estdgm_gather", tensors, places, vector, order)


def scatter_(tensors: Sequence[Tensor], places: Sequence[Tensor], vector: Tensor, order: Tensor) -> bool:
    """Write a vector over elements of several tensors; arguments and result are those of `gather_`.

    No index may be there twice.
    """
    done = _move("estdgm_scatter", tensors, places, vector, order)
    if done:
        for tensor in tensors:
            _count_write(tensor)
    return done


def _move(name: str, tensors: Sequence[Tensor], places: Sequence[Tensor], vector: Tensor, order: Tensor) -> bool:
    loaded = library_in_use()
    if loaded is None or order.device.type != "cpu":
        return False
    if not all(_is_plain(t) and t.is_contiguous() and t.dtype == vector.dtype for t in (vector, *tensors)):
        return False
    count = len(tensors)
    getattr(loaded, name)(
        (ctypes.c_void_p * count)(*(tensor.data_ptr() for tensor in tensors)),
        (ctypes.c_void_p * count)(*(own.data_ptr() for own in places)),
        (ctypes.c_int64 * count)(*(own.numel() for own in places)),
        count,
        vector.data_ptr(),
        order.data_ptr(),
        vector.element_size(),
        torch.get_num_threads(),
    )
    return True


def _count_write(tensor: Tensor) -> None:
    """Count a write as torch does for its own operators: by that count others see that a tensor has changed."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.element_size() in _SIZES and type(tensor.detach()) is Tensor
