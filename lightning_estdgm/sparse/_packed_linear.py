"""`packed_linear`: a linear layer on a weight of which only the active units are stored."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_estdgm.sparse._topology import BlockTopology


def packed_linear(inputs: Tensor, values: Tensor, topology: BlockTopology, bias: Tensor | None = None) -> Tensor:
    """Return ``inputs W^T + bias``, where only the active units of ``W`` are stored.

    Args:
        inputs: ``[..., in]``.
        values: ``[units, rows, columns]``, in the order of the topology's ``col_idx``.
        topology: active units; ``topology.shape`` is ``(out, in)``.
        bias: ``[out]``, or None.

    Returns:
        ``[..., out]``; differentiable in inputs, values and bias.

    """
    return F.linear(inputs, expand(values, topology), bias)


def expand(values: Tensor, topology: BlockTopology) -> Tensor:
    """Return the weight ``(out, in)`` of packed values, 0 outside the active units; differentiable."""
    rows, columns = topology.sides
    units = values.new_zeros(topology.block_rows * topology.block_cols, rows, columns)
    grid = units.index_copy(0, _places(topology), values).view(topology.block_rows, topology.block_cols, rows, columns)
    return grid.transpose(1, 2).reshape(topology.shape)


def gather(weight: Tensor, topology: BlockTopology) -> Tensor:
    """Return the active units of a weight ``(out, in)``, ``[units, rows, columns]``: the inverse of `expand`."""
    rows, columns = topology.sides
    grid = weight.reshape(topology.block_rows, rows, topology.block_cols, columns).transpose(1, 2)
    return grid.reshape(-1, rows, columns).index_select(0, _places(topology))


def _places(topology: BlockTopology) -> Tensor:
    """Return the place of each active unit in the flattened grid of all, int64."""
    counts = topology.row_ptr.diff().long()
    rows = torch.repeat_interleave(torch.arange(topology.block_rows, device=topology.device), counts)
    return rows * topology.block_cols + topology.col_idx[: rows.numel()].long()
