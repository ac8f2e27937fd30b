"""Communication hook for DDP that all-reduces the gradients of active units only.

Registered on a `DistributedDataParallel` model::

    state = ActiveUnits(controller.masked_weights, lambda: controller.observing)
    model.register_comm_hook(state, active_units_hook)

Each bucket is packed: all gradients of dense parameters, and those of active units of masked weights. The packed
tensor is averaged over the ranks as DDP does it, and unpacked with zeros for inactive units, whose gradients the method
masks anyway. In an observation window, which needs them, nothing is packed.
"""
# No `from __future__ import annotations`: DDP compares the annotations of a hook with the classes themselves.

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from lightning_estdgm.distributed._shard import Shard
from lightning_estdgm.method._masks import BlockSize, unit_view

WIRE_DTYPES: dict[Callable[..., Any], torch.dtype | None] = {
    default_hooks.allreduce_hook: None,
    default_hooks.fp16_compress_hook: torch.float16,
    default_hooks.bf16_compress_hook: torch.bfloat16,
}
"""Dtype that each of torch's element-wise hooks sends in; ``None``: the gradients' own.

Others, such as PowerSGD, depend on a bucket's layout, and cannot be combined with packing.
"""


class CommunicatedWeight(Protocol):
    """Masked weight as the hook sees it; `engine.MaskedWeight` is one."""

    @property
    def parameter(self) -> Tensor:
        """The weight as stored."""

    @property
    def mask(self) -> Tensor:
        """Mask over units, bool; a new tensor whenever it changes."""

    @property
    def block_size(self) -> BlockSize:
        """Side of a unit."""

    @property
    def is_dense(self) -> bool:
        """Whether every unit is active."""

    @property
    def shard(self) -> Shard:
        """Layout of the weight over ranks; under DDP it is whole on all of them."""


class _Packer:
    """Positions of the active units of one weight in its stretch of a bucket, for one mask."""

    def __init__(self, weight: CommunicatedWeight) -> None:
        self.mask = weight.mask
        self._weight = weight
        parameter = weight.parameter
        if weight.block_size != 1:
            self._rows, self._columns = weight.mask.nonzero(as_tuple=True)
            self.numel = self._rows.numel() * (parameter.numel() // weight.mask.numel())
        else:
            laid_out = torch.empty_like(parameter, dtype=torch.bool)  # in the bucket's order, which is the parameter's
            weight.shard.local(laid_out).copy_(weight.mask)
            memory = laid_out.as_strided((laid_out.numel(),), (1,))
            self._positions = memory.nonzero().squeeze(1).to(_index_dtype(parameter.numel()))
            self.numel = self._positions.numel()

    def pack(self, stretch: Tensor) -> Tensor:
        """Return the gradients of active units, flat."""
        if self._weight.block_size == 1:
            return stretch.index_select(0, self._positions)
        return self._units(stretch)[self._rows, :, self._columns].flatten()

    def unpack_(self, stretch: Tensor, packed: Tensor) -> None:
        """Write packed gradients to a stretch, and zeros elsewhere."""
        stretch.zero_()
        if self._weight.block_size == 1:
            stretch.index_add_(0, self._positions, packed)  # unlike index_copy_, it takes 32-bit positions
        else:
            units = self._units(stretch)
            units[self._rows, :, self._columns] = packed.view(self._rows.numel(), units.shape[1], *units.shape[3:])

    def _units(self, stretch: Tensor) -> Tensor:
        parameter = self._weight.parameter
        stored = stretch.as_strided(parameter.shape, parameter.stride(), stretch.storage_offset())
        return unit_view(self._weight.shard.local(stored), self._weight.block_size)


def _index_dtype(numel: int) -> torch.dtype:
    return torch.int32 if numel <= torch.iinfo(torch.int32).max else torch.int64


@dataclass(frozen=True)
class _Stretch:
    """One parameter's gradient in a bucket: elements `first` to `last`, the latter excluded."""

    first: int
    last: int
    packer: _Packer | None


class ActiveUnits:
    """State of `active_units_hook`.

    Args:
        weights: masked weights of the model.
        observing: function that returns whether gradients are needed whole now, the same on all ranks.
        wire_dtype: dtype to send in; ``None``: the gradients' own.
        group: process group; ``None``: all ranks.

    Attributes:
        bytes: number of bytes that this rank has handed to all-reduce so far.

    """

    def __init__(
        self,
        weights: Iterable[CommunicatedWeight],
        observing: Callable[[], bool],
        *,
        wire_dtype: torch.dtype | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.bytes = 0
        self._weights = {id(weight.parameter): weight for weight in weights}
        self._observing = observing
        self._wire_dtype = wire_dtype
        self._group = group
        self._packers: dict[int, _Packer] = {}

    def average(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """Average one bucket over the ranks."""
        buffer = bucket.buffer()
        stretches = () if buffer.is_sparse else tuple(self._stretches(bucket.parameters()))
        is_packed = any(stretch.packer for stretch in stretches)
        sent = self._pack(buffer, stretches) if is_packed else buffer
        wire = sent if self._wire_dtype is None else sent.to(self._wire_dtype)
        wire.mul_(1.0 / dist.get_world_size(self._group))  # as DDP does: dividing would round differently for 3 ranks
        self.bytes += wire.numel() * wire.element_size()
        future = dist.all_reduce(wire, group=self._group, async_op=True).get_future()

        def received(done: torch.futures.Future[list[Tensor]]) -> Tensor:
            reduced = done.value()[0]
            if is_packed:
                self._unpack_(buffer, stretches, reduced.to(buffer.dtype))
            elif reduced is not buffer:
                buffer.copy_(reduced)
            return buffer

        return future.then(received)

    def close(self) -> None:
        """Release the weights; from now on every bucket is averaged whole."""
        self._weights.clear()
        self._packers.clear()

    def _stretches(self, parameters: Sequence[Tensor]) -> Iterator[_Stretch]:
        """Yield the stretches of a bucket: gradients one after the other, each in its parameter's memory order."""
        first = 0
        whole = self._observing()
        for parameter in parameters:
            weight = None if whole else self._weights.get(id(parameter))
            packer = None if weight is None or weight.is_dense else self._packer(weight)
            yield _Stretch(first, first + parameter.numel(), packer)
            first += parameter.numel()

    def _packer(self, weight: CommunicatedWeight) -> _Packer:
        key = id(weight.parameter)
        if key not in self._packers or self._packers[key].mask is not weight.mask:
            self._packers[key] = _Packer(weight)
        return self._packers[key]

    @staticmethod
    def _pack(buffer: Tensor, stretches: Sequence[_Stretch]) -> Tensor:
        pieces = (buffer[s.first : s.last] for s in stretches)
        return torch.cat([s.packer.pack(x) if s.packer else x for s, x in zip(stretches, pieces, strict=True)])

    @staticmethod
    def _unpack_(buffer: Tensor, stretches: Sequence[_Stretch], packed: Tensor) -> None:
        sizes = [s.packer.numel if s.packer else s.last - s.first for s in stretches]
        for stretch, part in zip(stretches, packed.split(sizes), strict=True):
            here = buffer[stretch.first : stretch.last]
            if stretch.packer:
                stretch.packer.unpack_(here, part)
            else:
                here.copy_(part)


def active_units_hook(
    state: ActiveUnits,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Average the gradients of active units and of dense parameters; those of inactive units become 0.

    For two ranks the averages equal DDP's own to the bit. For more, the ring adds the ranks up in an order that depends
    on where in the tensor an element lies, so the last bits may differ; all ranks get the same in any case.
    """
    return state.average(bucket)
