"""FSDP2 and tensor parallelism: weights that are a torch ``DTensor``, of which each rank holds a box."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lightning_estdgm.distributed._collectives import local_tensor
from lightning_estdgm.distributed._shard import Shard, pool_box
from lightning_estdgm.method._masks import BlockSize, sides

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


_TENSOR_PARALLEL = "its weight stays spread in the forward (tensor parallelism)"


class BoxShard:
    """A box of the whole weight: `size` elements from `offset` in each dimension, oriented ``(out, in, ...)``.

    Args:
        shape: shape of the whole weight, oriented.
        offset: index of the box's first element in each dimension.
        size: number of elements in each dimension, possibly 0.
        transposed: whether the weight is stored ``(in, out)``.
        groups: process groups that the weight is spread over.
        device: device that collectives run on.
        why_dense: see `Shard`.
        stored: shape of the whole weight as stored, where it is none of these: that of a stack.

    """

    def __init__(
        self,
        shape: tuple[int, ...],
        offset: tuple[int, ...],
        size: tuple[int, ...],
        *,
        transposed: bool = False,
        groups: tuple[Any, ...] = (),
        device: torch.device | None = None,
        why_dense: str = "",
        stored: tuple[int, ...] | None = None,
    ) -> None:
        self.shape, self.groups, self.why_dense = shape, groups, why_dense
        self._stored = stored or ((shape[1], shape[0]) if transposed else shape)
        self.device = device or torch.device("cpu")
        self._offset, self._size, self._transposed = offset, size, transposed

    def _slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self._offset, self._size, strict=True))

    def stacked(self) -> BoxShard:
        """Return the layout of a stack ``(experts, rows, columns)`` taken as ``(experts * rows, columns)``.

        Raises:
            ValueError: if experts themselves are cut.

        """
        (experts, rows, columns), (first, *offset), (count, *size) = self.shape, self._offset, self._size
        if any(offset) or size != [rows, columns]:
            raise ValueError("its experts are cut in themselves: split the parameter along its first dimension")
        return BoxShard(
            (experts * rows, columns),
            (first * rows, 0),
            (count * rows, columns),
            groups=self.groups,
            device=self.device,
            why_dense=self.why_dense,
            stored=self.shape,
        )

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is spread as this weight is."""
        return _is_dtensor(tensor) and tuple(tensor.shape) == self._stored

    def local(self, tensor: Tensor) -> Tensor:
        """Return the box, sharing storage with the DTensor."""
        with torch.no_grad():
            local = local_tensor(tensor)
        if len(self._stored) > len(self.shape):
            return local.view(self._size)
        return local.t() if self._transposed else local

    def part(self, whole: Tensor) -> Tensor:
        """Return a copy of the box."""
        return whole[self._slices()].clone(memory_format=torch.contiguous_format)

    def spread(self, local: Tensor) -> Tensor:
        """Return a whole tensor with the box in its place."""
        whole = local.new_zeros(self.shape)
        whole[self._slices()] = local
        return whole

    def index(self, device: torch.device) -> Tensor:
        """Return the box's positions in the flattened whole."""
        index = torch.zeros((), dtype=torch.int64, device=device)
        for dim, (offset, size) in enumerate(zip(self._offset, self._size, strict=True)):
            along = torch.arange(offset, offset + size, device=device) * math.prod(self.shape[dim + 1 :])
            index = index[..., None] + along
        return index

    def expand(self, units: Tensor, block_size: BlockSize) -> Tensor:
        """Return a mask that broadcasts over the box."""
        if block_size == 1:
            return units
        rows, columns = (
            torch.arange(o, o + n, device=units.device) // side
            for o, n, side in zip(self._offset[:2], self._size[:2], sides(block_size), strict=True)
        )
        return units[rows][:, columns][(...,) + (None,) * (len(self.shape) - 2)]

    def grain(self, block_size: BlockSize) -> BlockSize:
        """Return 1."""
        return 1

    def pool(self, squares: Tensor, block_size: BlockSize) -> Tensor:
        """Sum the box over the units that it reaches into."""
        if squares.dim() > 2:
            squares = squares.flatten(2).sum(2)
        return pool_box(squares, self._offset, sides(block_size), self.shape)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that hold the other boxes."""
        for group in self.groups:
            dist.all_reduce(tensor, group=group)
        return tensor


class FSDP2Adapter:
    """``fully_shard`` (Lightning's ``ModelParallelStrategy``), HSDP, and weights that tensor parallelism spreads."""

    name = "fsdp2"
    strategies = ("ModelParallelStrategy",)

    def check(self, strategy: Any) -> None:
        """Accept every setting: weights that cannot be masked are refused by `shard`."""

    def model(self, strategy: Any) -> nn.Module:
        """Return the LightningModule, which ``configure_model`` shards in place."""
        return strategy.lightning_module

    def shard(self, model: nn.Module, module: nn.Module, weight_name: str, transposed: bool) -> Shard | None:
        """Return the box of a DTensor weight."""
        weight = getattr(module, weight_name)
        if not _is_dtensor(weight):
            return None
        where = f"the weight of a {type(module).__name__} of shape {tuple(weight.shape)}"
        return _box(weight, where, transposed, _stays_spread(model, weight))


def _box(weight: DTensor, where: str, transposed: bool, stays_spread: bool) -> BoxShard:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = weight.device_mesh, weight.placements
    groups, ways, dims = [], [1] * weight.dim(), []
    for mesh_dim, placement in enumerate(placements):
        if isinstance(placement, Replicate) or mesh.size(mesh_dim) == 1:
            continue
        dim = getattr(placement, "dim", None)  # Shard and _StridedShard
        if dim is None:
            raise ValueError(f"{where} must be sharded or replicated over its mesh, got placements {placements}")
        ways[dim] *= mesh.size(mesh_dim)
        dims.append(dim)
        groups.append(mesh.get_group(mesh_dim))
    for dim, count in enumerate(ways):
        # Two splits of one dimension that do not come out even leave ranks with several pieces, not with a box.
        if dims.count(dim) > 1 and weight.shape[dim] % count:
            raise ValueError(
                f"{where} is split {count} ways along dimension {dim} by more than one mesh dimension ({placements}): "
                f"expected a size divisible by {count}, got {weight.shape[dim]}. Split it along different dimensions "
                "(row-wise tensor parallelism), or exclude the layer"
            )
    size, offset = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
    shape: tuple[int, ...] = tuple(weight.shape)
    if transposed:
        shape, size, offset = shape[::-1], size[::-1], offset[::-1]
    return BoxShard(
        shape,
        tuple(int(o) if n else 0 for o, n in zip(offset, size, strict=True)),
        tuple(map(int, size)),
        transposed=transposed,
        groups=tuple(groups),
        device=torch.device(mesh.device_type),
        why_dense=_TENSOR_PARALLEL if stays_spread else "",
    )


def _is_dtensor(tensor: object) -> bool:
    # Without the module loaded there is no DTensor, and loading it takes time.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _stays_spread(model: nn.Module, weight: Tensor) -> bool:
    """Whether a weight is still a DTensor in its layer's forward: it is, unless FSDP2 gathers the whole of it."""
    for parameter in _fsdp_parameters(model):
        if parameter.sharded_param is weight:
            return bool(parameter.is_dtensor)
    return True


def _fsdp_parameters(model: nn.Module) -> Iterator[Any]:
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for group in filter(None, groups):
                yield from group.fsdp_params


ADAPTER = FSDP2Adapter()
