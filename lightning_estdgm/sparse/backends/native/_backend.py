"""The backend that calls the compiled operator: linear layers here, convolutions in `conv`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_estdgm.method._masks import size_words
from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends.native import _conv as conv
from lightning_estdgm.sparse.backends.native._build import DTYPES, check, function, library
from lightning_estdgm.sparse.backends.native._conv import BLOCK
from lightning_estdgm.sparse.backends.native._conv_units import SCATTERED
from lightning_estdgm.sparse.backends.native._kept import KeptWeight, KeptWeights
from lightning_estdgm.sparse.backends.native._plans import Plans, index_lists

_UNITS = ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (4, 4), (8, 8))
_AREA = 20_000  # from the first to the last tap of a convolution
_WHOLE, _BY_ROW, _BY_COLUMN = range(3)  # how a weight is stored: as `Stored` of places.h
_UNIT_WORDS = "1, 2 x 1, 4 x 1, 8 x 1, 16 x 1, 4, 8 or a multiple of 16"


def _rows(matrix: Tensor) -> Tensor:
    """Return the matrix with adjacent columns in memory: as it is, or a copy."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _in_units(dtype: torch.dtype, topology: BlockTopology) -> bool:
    """Whether forward and input gradient are computed with tokens as the vector.

    For float32 blocks of 16 that is faster than outputs as the vector: a block row of 16 is one vector wide.
    """
    least = min(topology.sides)
    return least < BLOCK or (least == BLOCK and dtype is torch.float32)


class NativeBackend:
    """Register-blocked loops over the active blocks, in parallel over tokens or blocks.

    Takes whole weights and packed values alike. Only active blocks of the weight are read: forward and input gradient
    copy them once a call into the order in which they are used. The forward of a whole weight, of a linear layer or a
    convolution, keeps that copy from the second call on, until the weight or the mask changes. Sums are in float32.
    Results do not depend on the number of threads. Blocks of 16 and more have outputs as the vector, finer units
    tokens.
    """

    name = "native"

    def __init__(self) -> None:
        self._plans = Plans()
        self._kept = KeptWeights()

    def unsupported(self, device: torch.device, dtype: torch.dtype, topology: BlockTopology) -> str | None:
        """Reason why a case cannot be run, or None. The first call compiles (a few seconds, once a machine)."""
        if device.type != "cpu":
            return f"runs on CPU tensors only, got device {device}"
        if dtype not in DTYPES:
            return f"needs float32 or bfloat16, got {dtype}"
        rows, columns = topology.sides
        is_block = rows == columns and rows % BLOCK == 0
        if not is_block and (max(rows, columns), min(rows, columns)) not in _UNITS:
            return f"needs units of {_UNIT_WORDS}, got {size_words(topology.block_size)}"
        compiled = library()
        if isinstance(compiled, str):
            return f"could not be compiled: {compiled}"
        if dtype is torch.bfloat16 and not compiled.estdgm_has_bfloat16():
            return "needs a CPU with AVX512_BF16 for bfloat16"
        return None

    def build(self, device: torch.device) -> str | None:
        """Name of the compiled library for that device, or None: two builds may differ in speed."""
        compiled = library() if device.type == "cpu" else ""
        return None if isinstance(compiled, str) else Path(compiled._name).stem

    def conv_unsupported(
        self, device: torch.device, dtype: torch.dtype, topology: BlockTopology, geometry: ConvGeometry
    ) -> str | None:
        """Reason why a case cannot be run, or None."""
        (height, width), (down, across) = geometry.kernel_size, geometry.dilation
        area = (down * (height - 1) + 1) * (across * (width - 1) + 1)
        if area > _AREA and min(topology.sides) < BLOCK:
            return f"needs taps within {_AREA} pixels for units finer than {BLOCK}, got {area}"
        return self.unsupported(device, dtype, topology)

    def linear(self, x2d: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology) -> Tensor:
        """``Y[:, r] = sum over active c of X[:, c] W[r, c]^T + bias[r]``: ``[T, in] -> [T, out]``."""
        kept = self._kept.of(weight, topology)
        return self._linear(x2d, weight, weight.stride()[:2], bias, topology, _WHOLE, kept=kept)

    def pointwise(self, pixels: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology) -> Tensor:
        """As `linear`, with a weight ``(out, in, 1, 1)``, which is known at the next call."""
        return self.linear(pixels, weight, bias, topology)

    def grad_input(self, dy2d: Tensor, weight: Tensor, topology: BlockTopology) -> Tensor:
        """``dX[:, c] = sum over active r of dY[:, r] W[r, c]``: ``[T, out] -> [T, in]``."""
        weight = weight.t()
        return self._linear(dy2d, weight, weight.stride(), None, topology.transpose(), _WHOLE)

    def grad_weight(self, dy2d: Tensor, x2d: Tensor, topology: BlockTopology) -> Tensor:
        """``dW[r, c] = dY[:, r]^T X[:, c]`` where active, else 0: ``[T, out], [T, in] -> [out, in]``."""
        return self._grad_weight(dy2d, x2d, topology, topology.shape, _WHOLE)

    def packed_linear(
        self, x2d: Tensor, values: Tensor, bias: Tensor | None, order: Tensor | None, topology: BlockTopology
    ) -> Tensor:
        """``Y = X W^T + bias`` of the active units alone: ``[T, in] -> [T, out]``."""
        return self._linear(x2d, values.contiguous(), (topology.sides[1], 1), bias, topology, _BY_ROW, order)

    def packed_grad_input(self, dy2d: Tensor, values: Tensor, order: Tensor | None, topology: BlockTopology) -> Tensor:
        """``dX = dY W`` of the active units alone: ``[T, out] -> [T, in]``."""
        strides = 1, topology.sides[1]
        return self._linear(dy2d, values.contiguous(), strides, None, topology.transpose(), _BY_COLUMN, order)

    def packed_grad_values(
        self, dy2d: Tensor, x2d: Tensor, order: Tensor | None, topology: BlockTopology, units: int
    ) -> Tensor:
        """Active units of ``dY^T X``, written as they are stored: ``[T, out], [T, in] -> [units, rows, columns]``."""
        return self._grad_weight(dy2d, x2d, topology, (units, *topology.sides), _BY_ROW, order)

    def _linear(
        self,
        x2d: Tensor,
        weight: Tensor,
        strides: Sequence[int],
        bias: Tensor | None,
        topology: BlockTopology,
        stored: int,
        order: Tensor | None = None,
        kept: KeptWeight | None = None,
    ) -> Tensor:
        """Product of a whole weight or of packed values; `strides` are the weight's, or those of a unit."""
        y = x2d.new_empty(x2d.shape[0], topology.shape[0])
        if y.numel() == 0:
            return y
        x2d = _rows(x2d)
        bias = None if bias is None else bias.contiguous()
        rows, columns = topology.sides
        numbers = None if order is None else order.data_ptr()
        of_units: tuple[int | None, ...] = (rows, stored, numbers)
        name = "linear"
        if _in_units(x2d.dtype, topology):
            name = "units_linear"
            plan = self._plans.linear(topology) if rows == 1 and columns < SCATTERED else None
            of_units = rows, columns, stored, numbers, None if plan is None else plan.address
        failed = function(name, x2d.dtype)(
            x2d.data_ptr(),
            x2d.stride(0),
            x2d.shape[0],
            weight.data_ptr(),
            *strides,
            None if bias is None else bias.data_ptr(),
            *index_lists(topology),
            topology.block_rows,
            topology.block_cols,
            *of_units,
            y.data_ptr(),
            y.stride(0),
            None if kept is None else kept.address,
            torch.get_num_threads(),
        )
        check(failed)
        return y

    def _grad_weight(
        self,
        dy2d: Tensor,
        x2d: Tensor,
        topology: BlockTopology,
        shape: Sequence[int],
        stored: int,
        order: Tensor | None = None,
    ) -> Tensor:
        """Gradient of a whole weight or of packed values, of that shape."""
        if x2d.shape[0] == 0:
            return x2d.new_zeros(shape)
        dw = x2d.new_empty(shape)
        dy2d, x2d = _rows(dy2d), _rows(x2d)
        finer = min(topology.sides) < BLOCK
        lists = index_lists(topology)
        failed = function("units_grad_weight" if finer else "grad_weight", x2d.dtype)(
            dy2d.data_ptr(),
            dy2d.stride(0),
            x2d.data_ptr(),
            x2d.stride(0),
            x2d.shape[0],
            *(lists if finer else lists[:2]),
            topology.block_rows,
            topology.block_cols,
            *(topology.sides if finer else topology.sides[:1]),
            stored,
            None if order is None else order.data_ptr(),
            dw.data_ptr(),
            torch.get_num_threads(),
        )
        check(failed)
        return dw

    def conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology, geometry: ConvGeometry
    ) -> Tensor:
        """``Y = conv2d(X, W * M) + bias``: ``[N, in, H, W] -> [N, out, H', W']``."""
        return conv.conv(self._plans, self._kept, x, weight, bias, topology, geometry)

    def conv_grad_input(
        self, dy: Tensor, weight: Tensor, size: tuple[int, int], topology: BlockTopology, geometry: ConvGeometry
    ) -> Tensor:
        """Gradient of the input: ``[N, out, H', W'] -> [N, in, *size]``."""
        return conv.conv_grad_input(self._plans, dy, weight, size, topology, geometry)

    def conv_grad_weight(self, dy: Tensor, x: Tensor, topology: BlockTopology, geometry: ConvGeometry) -> Tensor:
        """Gradient of the weight, ``(out, in, kh, kw)``, 0 in inactive blocks."""
        return conv.conv_grad_weight(dy, x, topology, geometry)


BACKEND = NativeBackend()
