"""Operands of the sparse operators: the topology as flat arguments, autocast, and checks."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from lightning_estdgm.method._masks import block_size_of
from lightning_estdgm.sparse._topology import BlockTopology

TOPOLOGY_SCHEMA = "Tensor row_ptr, Tensor col_idx, Tensor col_ptr, Tensor row_idx, int[] sides, str backend"
"""A topology and a backend's name in the schema of an operator, since one of torch's cannot take a BlockTopology."""


def topology_arguments(topology: BlockTopology) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """Take a topology apart for an operator: the only place that does."""
    return topology.row_ptr, topology.col_idx, topology.col_ptr, topology.row_idx, list(topology.sides)


def topology_of(row_ptr: Tensor, col_idx: Tensor, col_ptr: Tensor, row_idx: Tensor, sides: list[int]) -> BlockTopology:
    """Inside an operator, put the topology together again from its `topology_arguments`."""
    block_size = block_size_of(*sides)
    return BlockTopology(block_size, row_ptr.shape[0] - 1, col_ptr.shape[0] - 1, row_ptr, col_idx, col_ptr, row_idx)


def _autocast_on(kind: str) -> bool:
    # Asking about a device that knows no autocast ("meta") raises. Dynamo of torch 2.6 has to break its graph for
    # `is_autocast_available`; what is compiled for is a device that knows autocast.
    known = kind != "meta" and (torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind))
    return known and torch.is_autocast_enabled(kind)


def as_given(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside, products keep the dtype of their operands, even where backward() is called under autocast."""
    kind = tensor.device.type
    if _autocast_on(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # As torch's own autocast: floating-point operands are cast, float64 is left alone.
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def prepared(
    x: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the operands in the dtype that autocast asks for.

    Raises:
        TypeError: Dtypes differ.
        ValueError: Devices differ.
    """
    kind = x.device.type
    if _autocast_on(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = _cast(x, dtype), _cast(weight, dtype)
        bias = None if bias is None else _cast(bias, dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"x and {name} must have one dtype, got {x.dtype} and {tensor.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias), ("topology", topology.row_ptr)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x and {name} must be on one device, got {x.device} and {tensor.device}")
    return x, weight, bias
