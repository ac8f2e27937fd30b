"""Dense oracle of every backend, on any device and for any block size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_estdgm.sparse._conv_geometry import ConvGeometry, library_gradient
from lightning_estdgm.sparse._topology import BlockTopology


def _active(dense: Tensor, topology: BlockTopology) -> Tensor:
    # Selecting, not multiplying: 0 * nan is nan, and inactive blocks may hold anything.
    mask = topology.mask_over(dense.shape)
    return torch.where(mask, dense, torch.zeros((), dtype=dense.dtype, device=dense.device))


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

    def conv_unsupported(
        self, device: torch.device, dtype: torch.dtype, topology: BlockTopology, geometry: ConvGeometry
    ) -> str | None:
        """Reason why a case cannot be run, or None."""
        return self.unsupported(device, dtype, topology)

    def conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology, geometry: ConvGeometry
    ) -> Tensor:
        """``Y = conv2d(X, W * M) + bias``."""
        return F.conv2d(x, _active(weight, topology), bias, geometry.stride, geometry.padding, geometry.dilation)

    def conv_grad_input(
        self, dy: Tensor, weight: Tensor, size: tuple[int, int], topology: BlockTopology, geometry: ConvGeometry
    ) -> Tensor:
        """Gradient of the input by the library, with the masked weight."""
        x = dy.new_empty(dy.shape[0], weight.shape[1], *size)  # its shape is what counts
        return library_gradient(dy, x, _active(weight, topology), geometry, (True, False, False))[0]

    def conv_grad_weight(self, dy: Tensor, x: Tensor, topology: BlockTopology, geometry: ConvGeometry) -> Tensor:
        """Gradient of the weight by the library, then masked."""
        weight = x.new_empty(dy.shape[1], x.shape[1], *geometry.kernel_size)
        return _active(library_gradient(dy, x, weight, geometry, (False, True, False))[1], topology)


BACKEND = ReferenceBackend()
