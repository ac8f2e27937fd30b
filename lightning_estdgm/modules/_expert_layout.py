"""Layout of stacked experts over ranks, as of one matrix with the experts one below the other."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_estdgm.distributed._shard import Shard
from lightning_estdgm.distributed.adapters._protocol import shard_of
from lightning_estdgm.distributed.adapters.whole import Whole
from lightning_estdgm.modules._kinds import LayerKind


def whole_shape(model: nn.Module, module: nn.Module, own: str) -> tuple[int, ...]:
    """Return the shape of a module's parameter; of one that FSDP1 has flattened, that of the whole."""
    weight = getattr(module, own)
    if weight.dim() == 1:
        try:
            return shard_of(model, module, own).shape
        except ValueError:  # it has one dimension
            pass
    return tuple(weight.shape)


def why_no_stack(model: nn.Module, module: nn.Module, kind: LayerKind) -> str:
    """Return the reason why stacked experts cannot be masked; empty where they can."""
    try:
        stack_shard(model, module, kind)
    except ValueError as error:
        return str(error)
    return ""


def stack_shard(model: nn.Module, module: nn.Module, kind: LayerKind) -> Shard:
    """Return the layout of stacked experts over ranks, as of one matrix ``(experts * rows, columns)``.

    Raises:
        ValueError: They are spread in a way that cannot be masked.

    """
    shard: Any = shard_of(model, module, kind.weight_name)
    if isinstance(shard, Whole):
        weight = getattr(module, kind.weight_name)
        if not weight.is_contiguous():
            raise ValueError("its experts do not lie one after the other in memory: make it contiguous")
        return Whole(weight, stacked=True)
    if not hasattr(shard, "stacked"):
        raise ValueError(
            f"stacked experts cannot be masked where a {type(shard).__name__} spreads them: use DDP or FSDP"
        )
    stacked: Shard = shard.stacked()
    return stacked
