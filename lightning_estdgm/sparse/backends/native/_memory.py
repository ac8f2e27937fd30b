"""Loops around the products: zeros outside a mask, and single elements read and written.

Each does what torch does, sooner, where the compiled operators are in use and fit, and says whether it has.
"""

from __future__ import annotations

import math

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


def gather_(out: Tensor, tensor: Tensor, places: Tensor) -> bool:
    """Read elements of a tensor into a vector.

    Args:
        out: vector of as many elements as `places`, of the tensor's dtype.
        tensor: tensor whose elements lie in order.
        places: int32, flat indices into it; none is checked.

    Returns:
        Whether it was done.

    """
    return _move("estdgm_gather", out, tensor, places)


def scatter_(tensor: Tensor, places: Tensor, values: Tensor) -> bool:
    """Write a vector over elements of a tensor.

    Args:
        tensor: tensor whose elements lie in order.
        places: int32, flat indices, none twice; none is checked.
        values: vector of as many elements, of the tensor's dtype.

    Returns:
        Whether it was done.

    """
    return _move("estdgm_scatter", tensor, values, places)


def _move(name: str, to: Tensor, source: Tensor, places: Tensor) -> bool:
    loaded = library_in_use()
    if loaded is None or not (_is_plain(to) and _is_plain(source) and to.is_contiguous() and source.is_contiguous()):
        return False
    if to.dtype != source.dtype or places.device.type != "cpu":
        return False
    size, threads = to.element_size(), torch.get_num_threads()
    getattr(loaded, name)(to.data_ptr(), source.data_ptr(), size, places.data_ptr(), len(places), threads)
    _count_write(to)
    return True


def _count_write(tensor: Tensor) -> None:
    """Count a write as torch does for its own operators: by that count others see that a tensor has changed."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.element_size() in _SIZES and type(tensor.detach()) is Tensor
