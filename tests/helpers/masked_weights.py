"""Single masked weights, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_estdgm.distributed.adapters.fsdp1 import RangeShard
from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.method._backward_set import BackwardSet
from lightning_estdgm.modules._candidates import Candidate, find_candidates


def candidates_of(*shapes: Sequence[int], names: Sequence[str] = ()) -> tuple[Candidate, ...]:
    """Return linear layers of these ``(out, in)`` shapes, the last of which is the head, as candidates of one model."""
    layers = {str(i): nn.Linear(inner, out, bias=False) for i, (out, inner) in enumerate(shapes)}
    if names:
        layers = dict(zip(names, layers.values(), strict=True))
    return find_candidates(nn.ModuleDict(layers))


def masked_weight(
    values: Tensor,
    mask: Tensor,
    *,
    block_size: int = 1,
    inactive: Literal["zero", "frozen"] | BackwardSet = "zero",
) -> MaskedWeight:
    """Return the weight of a layer "0" with these values and this mask."""
    candidate = candidates_of(values.shape, (2, 2))[0]
    with torch.no_grad():
        candidate.weight.copy_(values)
    weight = MaskedWeight(candidate, block_size, inactive=inactive)
    weight.set_mask(mask)
    return weight


def numbered(mask: Sequence[Sequence[int]], **settings: Any) -> MaskedWeight:
    """Return the weight whose elements are 1, 2, 3, ... in memory, with a mask given as zeros and ones."""
    rows = torch.tensor(mask, dtype=torch.bool)
    side = settings.get("block_size", 1)
    shape = (rows.shape[0] * side, rows.shape[1] * side)
    return masked_weight(torch.arange(1.0, 1.0 + shape[0] * shape[1]).view(shape), rows, **settings)


def sharded_weight(shape: tuple[int, int], *, block_size: int = 1, **settings: Any) -> MaskedWeight:
    """Return a weight all of which lies on this rank, but which is one of several ranks' as far as it is told."""
    candidate = candidates_of(shape, (2, 2))[0]
    size = shape[0] * shape[1]
    shard = RangeShard(shape, 0, size, groups=("some ranks",))
    return MaskedWeight(replace(candidate, shard=shard, weight=nn.Parameter(torch.ones(size))), block_size, **settings)
