"""Weights that the native loops keep in the order of use while they do not change, as in validation."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends.native._build import library
from lightning_estdgm.sparse.backends.native._plans import Tap, tap_array

_MOST_BYTES = 1 << 30
_ONE_TAP: tuple[Tap, ...] = ((0, 0, 0),)  # of a linear layer


class KeptWeight:
    """A weight in the order of use, filled by the first call that is given it, freed with this object.

    Attributes:
        address: of what the compiled library fills and reads.

    """

    def __init__(self) -> None:
        loaded = library()
        assert not isinstance(loaded, str)
        self.address: int | None = loaded.estdgm_kept_new()
        if self.address is not None:
            weakref.finalize(self, loaded.estdgm_kept_free, ctypes.c_void_p(self.address))


@dataclass
class _Entry:
    """A weight as the last call found it."""

    state: tuple[Any, ...]
    row_ptr: weakref.ref[Tensor]
    nbytes: int
    weight_sum: int | None = None
    kept: KeptWeight | None = None


class KeptWeights:
    """Which weights are as they were at the last call.

    A weight is the same while its storage, its address and its version counter are, and those of its topology. Writes
    through ``.data``, and strategies that gather weights into the same memory, do not count as versions: so a sum over
    the active weights is compared too, which the change of any of them changes. In training each step makes another
    version, so nothing is kept between steps, and what was kept is freed by the first forward after one. Active units
    are kept as float32, `_MOST_BYTES` in all.
    """

    def __init__(self) -> None:
        self._entries = WeakTensorKeyDictionary()

    def of(self, weight: Tensor, topology: BlockTopology, taps: Sequence[Tap] = _ONE_TAP) -> KeptWeight | None:
        """Return what to fill or to read, or None where the weight is not known to be that of the last call.

        Args:
            weight: ``(out, in, ...)``, of any strides.
            topology: its units, whose columns are inputs, or taps of inputs.
            taps: taps of a convolution, whose places decide the order of use too.

        """
        row_ptr = topology.row_ptr
        if weight.is_inference() or row_ptr.is_inference():  # no versions
            return None
        state = (
            StorageWeakRef(weight.untyped_storage()), weight.data_ptr(), weight._version, weight.stride(), weight.dtype,
            row_ptr._version, topology.col_idx.data_ptr(), topology.sides, tuple(taps),
        )  # fmt: skip
        entry: _Entry | None = self._entries.get(weight)
        if entry is None or entry.state != state or entry.row_ptr() is not row_ptr:
            self._entries[weight] = _Entry(state, weakref.ref(row_ptr), 0)
            return None
        depth = topology.shape[1] // weight.shape[1]
        weight_sum = _weight_sum(weight, topology, taps, depth)
        if entry.weight_sum != weight_sum:
            entry.weight_sum, entry.kept = weight_sum, None  # freed before another is made
            rows, columns = topology.sides
            entry.nbytes = int(row_ptr[-1]) * rows * columns * len(taps) // depth * 4
            others = sum(other.nbytes for other in self._entries.values() if other.kept is not None)
            if others + entry.nbytes <= _MOST_BYTES:
                entry.kept = KeptWeight()
        return entry.kept


def _weight_sum(weight: Tensor, topology: BlockTopology, taps: Sequence[Tap], depth: int) -> int:
    """Return a sum over the active weights and their places; an input has `depth` columns of the topology."""
    loaded = library()
    assert not isinstance(loaded, str)
    found: int = loaded.estdgm_weight_sum(
        weight.data_ptr(),
        weight.element_size(),
        *weight.stride()[:2],
        tap_array(taps),
        len(taps),
        depth,
        topology.row_ptr.data_ptr(),
        topology.col_idx.data_ptr(),
        topology.block_rows,
        *topology.sides,
        torch.get_num_threads(),
    )
    return found
