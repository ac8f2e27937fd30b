"""Order in which the native loops use single weights: found once a mask, not once a call."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.weak import WeakTensorKeyDictionary

from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends.native._build import library

Tap = tuple[int, int, int]
"""A tap's row and column in the image for output pixel (0, 0), and where its weights start, in elements."""


def tap_array(taps: Sequence[Tap]) -> ctypes.Array[ctypes.c_int64]:
    """Return taps as the compiled loops read them."""
    return _numbers([number for tap in taps for number in tap])


def index_lists(topology: BlockTopology) -> tuple[int, int, int, int]:
    """Return the addresses of a topology's index lists: units by row, then by column."""
    return (
        topology.row_ptr.data_ptr(),
        topology.col_idx.data_ptr(),
        topology.col_ptr.data_ptr(),
        topology.row_idx.data_ptr(),
    )


def _numbers(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(numbers))(*numbers)


class Plan:
    """A plan of the compiled library, freed with this object."""

    def __init__(self, address: int | None) -> None:
        if address is None:
            raise MemoryError("the native backend found no memory for the order of a layer's weights")
        self.address = address
        weakref.finalize(self, _library().estdgm_units_free, ctypes.c_void_p(address))


class Plans:
    """Plans by topology, made anew when a mask has changed.

    A mask is known by its first index list and that list's version counter, as `BlockTopology.update_` writes in place.
    Tensors made in inference mode have no counter: their plan lives for one call.
    """

    def __init__(self) -> None:
        self._plans = WeakTensorKeyDictionary()

    def linear(self, topology: BlockTopology) -> Plan:
        """Return the plan of a linear layer with one output a unit."""
        (_, columns), (_, inner) = topology.sides, topology.shape
        return self._of(topology, (columns,), lambda lists: _library().estdgm_units_plan(*lists, columns, inner))

    def conv(self, topology: BlockTopology, taps: Sequence[Tap], depth: int, which: Sequence[int] = ()) -> Plan:
        """Return the plan of a convolution with one output a unit.

        Args:
            topology: Units, whose columns are inputs, or taps of inputs.
            taps: Taps that are used.
            depth: Columns of the topology that an input has: 1, or all taps of the kernel.
            which: Where that is more than 1, indices of these taps for the gradient of the input; none: for the output.

        """
        (_, columns), (_, inner) = topology.sides, topology.shape
        places = tuple((row, column) for row, column, _ in taps)
        return self._of(
            topology,
            (columns, places, depth, tuple(which)),
            lambda lists: _library().estdgm_units_conv_plan(
                *lists, inner // depth, columns, tap_array(taps), len(taps), depth, _numbers(which) if which else None
            ),
        )

    def _of(self, topology: BlockTopology, key: tuple[Any, ...], make: Callable[[tuple[int, ...]], int | None]) -> Plan:
        known = topology.row_ptr
        lists = known.data_ptr(), topology.col_idx.data_ptr(), topology.block_rows
        if known.is_inference():
            return Plan(make(lists))
        version, plans = self._plans.get(known, (None, {}))
        if version != known._version:
            version, plans = known._version, {}
            self._plans[known] = version, plans
        if key not in plans:
            plans[key] = Plan(make(lists))
        found: Plan = plans[key]
        return found


def _library() -> ctypes.CDLL:
    loaded = library()
    assert not isinstance(loaded, str)
    return loaded
