"""Collectives over the ranks that weights are spread over: sums, votes, gathers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_estdgm.distributed._shard import Shard


def all_reduce(shards: Sequence[Shard], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum each tensor over the ranks that its weight is spread over; one collective for all of the same groups.

    Args:
        shards: layout of the weight that each tensor belongs to.
        tensors: tensors of any shapes; those of whole weights are returned as they are.

    """
    results = list(tensors)
    batches: dict[tuple[Any, ...], list[int]] = {}
    for i, (shard, tensor) in enumerate(zip(shards, tensors, strict=True)):
        if shard.groups:
            batches.setdefault((*map(id, shard.groups), tensor.dtype), []).append(i)
    for members in batches.values():
        first = shards[members[0]]
        buffer = first.sum_(torch.cat([tensors[i].flatten().to(first.device) for i in members]))
        for i, summed in zip(members, buffer.split([tensors[i].numel() for i in members]), strict=True):
            results[i] = summed.view(tensors[i].shape).to(tensors[i].device)
    return results


def agree(shards: Sequence[Shard], flag: bool) -> bool:
    """Return whether `flag` holds on any rank that holds a part of one of the weights."""
    seen: set[tuple[int, ...]] = set()
    for shard in shards:
        key = tuple(map(id, shard.groups))
        if key and key not in seen:
            seen.add(key)
            flag = bool(shard.sum_(torch.tensor(float(flag), device=shard.device)).item() > 0)
    return flag


def from_any_rank(shard: Shard, values: list[Any]) -> list[Any]:
    """Return each value from the first rank that holds a part of the weight and has one that is not empty."""
    for group in shard.groups:
        found: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, values, group)
        values = [next(filter(None, of_all), of_all[0]) for of_all in zip(*found, strict=True)]
    return values


def gather(shard: Shard, local: Tensor) -> Tensor:
    """Return the whole of a local tensor, on the CPU of every rank; the device holds it in passing."""
    if not shard.groups:
        return local.cpu().clone()
    number = local.to(torch.uint8) if local.dtype == torch.bool else local
    whole = shard.sum_(shard.spread(number.to(shard.device)))
    return whole.to(device="cpu", dtype=local.dtype)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be a DTensor."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
