"""The dense oracle: what every backend must compute, on any device and for any block size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_estdgm.topology import BlockTopology

__all__ = ["BACKEND", "ReferenceBackend", "expand_mask"]


def expand_mask(topology: BlockTopology) -> Tensor:
    """Weight mask, bool ``(out, in)``: each block's flag repeated over its ``b x b`` weights."""
    b = topology.block_size
    return topology.mask().repeat_interleave(b, 0).repeat_interleave(b, 1)


def _active(dense: Tensor, topology: BlockTopology) -> Tensor:
    # Selecting, not multiplying: 0 * nan is nan, and inactive blocks may hold anything.
    return torch.where(expand_mask(topology), dense, torch.zeros((), dtype=dense.dtype, device=dense.device))


class ReferenceBackend:
    """Dense products with the mask applied. Saves nothing; it defines what is right."""

    name = "reference"

    def unsupported(self, device: torch.device, dtype: torch.dtype, topology: BlockTopology) -> str | None:
        """Reason why a case cannot be run, or None."""
        return None if dtype.is_floating_point else f"needs a floating-point dtype, got {dtype}"

    def linear(self, x2d: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology) -> Tensor:
        """``Y = X (W * M)^T + bias``: ``[T, in] -> [T, out]``."""
        return F.linear(x2d, _active(weight, topology), bias)

    def grad_input(self, dy2d: Tensor, weight: Tensor, topology: BlockTopology) -> Tensor:
        """``dX = dY (W * M)``: ``[T, out] -> [T, in]``."""
        return dy2d @ _active(weight, topology)

    def grad_weight(self, dy2d: Tensor, x2d: Tensor, topology: BlockTopology) -> Tensor:
        """``dW = (dY^T X) * M``: ``[T, out], [T, in] -> [out, in]``."""
        return _active(dy2d.t() @ x2d, topology)


BACKEND = ReferenceBackend()
