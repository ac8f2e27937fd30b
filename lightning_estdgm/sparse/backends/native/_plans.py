"""Order in which the native loops use single weights: found once a mask, not once a call."""

from __future__ import annotations

import ctypes
import weakref

from torch.utils.weak import WeakTensorKeyDictionary

from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends.native._build import library


class Plan:
    """A plan of the compiled library, freed with this object."""

    def __init__(self, topology: BlockTopology) -> None:
        loaded = library()
        assert not isinstance(loaded, str)
        self.address: int | None = loaded.estdgm_units_plan(
            topology.row_ptr.data_ptr(),
            topology.col_idx.data_ptr(),
            topology.block_rows,
            topology.sides[1],
            topology.shape[1],
        )
        if self.address is None:
            raise MemoryError("the native backend found no memory for the order of a layer's weights")
        weakref.finalize(self, loaded.estdgm_units_free, ctypes.c_void_p(self.address))


class Plans:
    """Plans by topology, made anew when a mask has changed.

    A mask is known by its first index list and that list's version counter, as `BlockTopology.update_` writes in place.
    Tensors made in inference mode have no counter: their plan lives for one call.
    """

    def __init__(self) -> None:
        self._plans = WeakTensorKeyDictionary()

    def of(self, topology: BlockTopology) -> Plan:
        """Return the plan of a topology with one output a unit."""
        lists = topology.row_ptr
        if lists.is_inference():
            return Plan(topology)
        version, sides, plan = self._plans.get(lists, (None, None, None))
        if version != lists._version or sides != topology.sides:
            plan = Plan(topology)
            self._plans[lists] = lists._version, topology.sides, plan
        assert plan is not None
        return plan
