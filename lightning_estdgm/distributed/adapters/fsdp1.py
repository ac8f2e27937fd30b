"""FSDP1 (``FullyShardedDataParallel``): each rank holds a stretch of every flattened weight, possibly empty."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from lightning_estdgm.distributed._shard import Shard, pool_box
from lightning_estdgm.method._masks import BlockSize, sides


class RangeShard:
    """A stretch of the flattened weight: `numel` elements as stored, from `start`; local tensors are flat.

    Args:
        shape: shape of the whole weight, oriented ``(out, in, ...)``.
        start: index of the stretch's first element.
        numel: number of elements of the stretch, possibly 0.
        transposed: whether the weight is stored ``(in, out)``.
        groups: process groups that the weight is spread over.
        device: device that collectives run on.

    """

    why_dense = ""  # FSDP gathers whole weights for the forward

    def __init__(
        self,
        shape: tuple[int, ...],
        start: int,
        numel: int,
        *,
        transposed: bool = False,
        groups: tuple[Any, ...] = (),
        device: torch.device | None = None,
    ) -> None:
        self.shape, self.groups, self.device = shape, groups, device or torch.device("cpu")
        self._start, self._numel, self._transposed = start, numel, transposed
        stored = shape[::-1] if transposed else shape
        self._rows, self._row = stored[0], math.prod(stored[1:])
        # The stretch lies in these rows of the stored matrix, `_before` elements after their begin.
        self._first_row, self._before = divmod(start, self._row) if numel else (0, 0)
        self._row_count = -(-(self._before + numel) // self._row)

    def _unit(self, block_size: BlockSize) -> tuple[int, int]:
        """Return the numbers of rows and columns of a unit in the stored matrix."""
        rows, columns = sides(block_size)[::-1] if self._transposed else sides(block_size)
        return rows, columns * math.prod(self.shape[2:])

    def stacked(self) -> RangeShard:
        """Return the layout of a stack ``(experts, rows, columns)`` taken as ``(experts * rows, columns)``."""
        shape = (math.prod(self.shape[:-1]), self.shape[-1])
        return RangeShard(shape, self._start, self._numel, groups=self.groups, device=self.device)

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is flattened and cut as this weight is; inside ``no_sync`` gradients are not yet."""
        return tensor.dim() == 1 and tensor.numel() == self._numel

    def local(self, tensor: Tensor) -> Tensor:
        """Return the tensor itself, which is the stretch."""
        return tensor.detach()

    def part(self, whole: Tensor) -> Tensor:
        """Return a copy of the stretch."""
        stored = whole.t() if self._transposed else whole
        return stored.reshape(-1)[self._start : self._start + self._numel].clone()

    def spread(self, local: Tensor) -> Tensor:
        """Return a whole tensor with the stretch in its place."""
        flat = local.new_zeros(math.prod(self.shape))
        flat[self._start : self._start + self._numel] = local
        return flat.view(self.shape[::-1]).t() if self._transposed else flat.view(self.shape)

    def index(self, device: torch.device) -> Tensor:
        """Return the stretch's positions in the flattened, oriented whole."""
        stored = torch.arange(self._start, self._start + self._numel, device=device)
        return stored % self._row * self._rows + stored // self._row if self._transposed else stored

    def expand(self, units: Tensor, block_size: BlockSize) -> Tensor:
        """Return a flat mask over the stretch."""
        if block_size == 1:
            return units
        height, width = self._unit(block_size)
        grid = units.t() if self._transposed else units
        rows = torch.arange(self._first_row, self._first_row + self._row_count, device=units.device) // height
        flat = grid[rows].repeat_interleave(width, 1).flatten()
        return flat[self._before : self._before + self._numel].clone()

    def grain(self, block_size: BlockSize) -> BlockSize:
        """Return 1."""
        return 1

    def pool(self, squares: Tensor, block_size: BlockSize) -> Tensor:
        """Sum the stretch over the units that it reaches into."""
        after = self._row_count * self._row - self._before - self._numel
        rows = F.pad(squares, (self._before, after)).view(self._row_count, self._row)
        units = pool_box(rows, (self._first_row, 0), self._unit(block_size), (self._rows, self._row))
        return units.t() if self._transposed else units

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that hold the other stretches."""
        for group in self.groups:
            dist.all_reduce(tensor, group=group)
        return tensor


class FSDP1Adapter:
    """``FullyShardedDataParallel`` with ``use_orig_params=True``, which is Lightning's default."""

    name = "fsdp1"
    strategies = ("FSDPStrategy",)

    def check(self, strategy: Any) -> None:
        """Refuse ``use_orig_params=False``, which leaves no weights to mask."""
        settings = getattr(strategy, "kwargs", None) or getattr(strategy, "_fsdp_kwargs", None) or {}
        if settings.get("use_orig_params") is False:
            raise ValueError(_NEEDS_ORIG_PARAMS)

    def model(self, strategy: Any) -> nn.Module:
        """Return the wrapped module: only the wrappers know how weights were cut."""
        return strategy.model

    def shard(self, model: nn.Module, module: nn.Module, weight_name: str, transposed: bool) -> Shard | None:
        """Return the stretch of a flattened weight."""
        handle, index = _handle_of(model, module, weight_name)
        if handle is None:
            return None
        if not handle._use_orig_params:
            raise ValueError(_NEEDS_ORIG_PARAMS)
        if not handle.uses_sharded_strategy:  # NO_SHARD, or a single rank: as DDP
            return None
        flat = handle.flat_param
        if not flat._contiguities[index]:
            raise ValueError(
                f"the weight of a {type(module).__name__} must be contiguous before FSDP flattens it (or the layer "
                f"excluded), got strides {flat._strides[index]} for shape {tuple(flat._shapes[index])}"
            )
        shape = tuple(flat._shapes[index])
        info = flat._shard_param_infos[index]
        return RangeShard(
            shape[::-1] if transposed else shape,
            info.intra_param_start_idx if info.in_shard else 0,
            info.numel_in_shard if info.in_shard else 0,
            transposed=transposed,
            groups=(handle.process_group,),
            device=handle.device,
        )


_NEEDS_ORIG_PARAMS = (
    "FSDP keeps a layer's weight as a parameter only with use_orig_params=True, got use_orig_params=False: leave "
    "FSDPStrategy's default, or set use_orig_params=True"
)


def _handle_of(model: nn.Module, module: nn.Module, weight_name: str) -> tuple[Any, int]:
    """Return the handle of the flat parameter that a weight was put into, and its index there; None without one."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without it there is no wrapper, and loading it takes time
    if fsdp is not None:
        for wrapper in model.modules():
            if isinstance(wrapper, fsdp.FullyShardedDataParallel) and wrapper._handle is not None:
                flat = wrapper._handle.flat_param
                owner, name = module, weight_name
                for shared in flat._shared_param_infos:
                    if shared.module is module and shared.param_name == weight_name:
                        owner, name = shared.prim_module, shared.prim_param_name
                for index, info in enumerate(flat._param_infos):
                    if info.module is owner and info.param_name == name:
                        return wrapper._handle, index
    return None, 0


ADAPTER = FSDP1Adapter()
