"""Blocked products on the CPU: library GEMMs on strided views of the dense matrices, and library convolutions."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_estdgm.method._masks import size_words
from lightning_estdgm.sparse._conv_geometry import ConvGeometry, empty_image, library_gradient
from lightning_estdgm.sparse._topology import BlockTopology

MIN_BLOCK = 8
"""Below this a GEMM call costs more than the few multiplications inside it."""

_WIDE = (torch.float32, torch.float64)
_NARROW = (torch.bfloat16, torch.float16)


def _spans(ptr: Tensor, idx: Tensor, block_size: int) -> list[list[tuple[int, int]]]:
    """Per block row, the active columns as ``[start, stop)`` spans in elements, adjacent blocks merged."""
    bounds = ptr.tolist()
    cols = idx[: bounds[-1]].tolist()
    rows = []
    for begin, end in itertools.pairwise(bounds):
        spans: list[tuple[int, int]] = []
        for col in cols[begin:end]:
            start = col * block_size
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], start + block_size)
            else:
                spans.append((start, start + block_size))
        rows.append(spans)
    return rows


def _gemm_ready(matrix: Tensor) -> Tensor:
    """The matrix itself if the GEMM reads slices of it in place, else one copy now instead of one a slice."""
    rows, cols = matrix.shape
    row_major = matrix.stride(1) == 1 and matrix.stride(0) >= cols
    column_major = matrix.stride(0) == 1 and matrix.stride(1) >= rows
    return matrix if row_major or column_major else matrix.contiguous()


def _channels(tensor: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """The spans of dimension 1 side by side, in channels-last memory: what the library's convolutions read."""
    parts = [tensor[:, i:j] for i, j in spans]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return joined.contiguous(memory_format=torch.channels_last)


class CPUBackend:
    """One GEMM per run of adjacent active blocks, read and written in place: no gather, no packed weight.

    Of a convolution, one library convolution per block row (block column for the input gradient), on a copy of the
    channels that it needs.

    Accumulation is in the dtype itself for float32 and float64, and in float32 (inside the GEMM) for bfloat16
    and float16.
    """

    name = "cpu"

    def unsupported(self, device: torch.device, dtype: torch.dtype, topology: BlockTopology) -> str | None:
        """Reason why a case cannot be run, or None."""
        if device.type != "cpu":
            return f"runs on CPU tensors only, got device {device}"
        if dtype not in _WIDE + _NARROW:
            return f"needs float32, float64, bfloat16 or float16, got {dtype}"
        if topology.sides[0] != topology.sides[1]:
            return f"needs square blocks, got {size_words(topology.block_size)}"
        if topology.side < MIN_BLOCK:
            return (
                f"needs blocks of at least {MIN_BLOCK} (a GEMM call on less costs more than it saves), "
                f"got block size {topology.side}"
            )
        return None

    def linear(self, x2d: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology) -> Tensor:
        """``Y[:, r] = sum over active c of X[:, c] W[r, c]^T + bias[r]``: ``[T, in] -> [T, out]``."""
        b = topology.side
        y = x2d.new_empty(x2d.shape[0], topology.shape[0])
        if y.numel() == 0:
            return y
        x2d = _gemm_ready(x2d)
        for r, spans in enumerate(_spans(topology.row_ptr, topology.col_idx, b)):
            out = y[:, r * b : (r + 1) * b]
            w_row = weight[r * b : (r + 1) * b]
            b_row = None if bias is None else bias[r * b : (r + 1) * b]
            if not spans:
                out.zero_() if b_row is None else out.copy_(b_row.expand_as(out))
                continue
            terms = [(x2d[:, i:j], w_row[:, i:j]) for i, j in spans]
            if len(terms) > 1 and x2d.dtype in _NARROW:
                # Several calls would round the sum to 16 bits after each of them; one call does not.
                terms = [(torch.cat([x for x, _ in terms], 1), torch.cat([w for _, w in terms], 1))]
            x_part, w_part = terms[0]
            if b_row is None:
                torch.mm(x_part, w_part.t(), out=out)
            else:
                torch.addmm(b_row, x_part, w_part.t(), out=out)
            for x_part, w_part in terms[1:]:
                out.addmm_(x_part, w_part.t())
        return y

    def grad_input(self, dy2d: Tensor, weight: Tensor, topology: BlockTopology) -> Tensor:
        """``dX[:, c] = sum over active r of dY[:, r] W[r, c]``: ``[T, out] -> [T, in]``."""
        return self.linear(dy2d, weight.t(), None, topology.transpose())

    def grad_weight(self, dy2d: Tensor, x2d: Tensor, topology: BlockTopology) -> Tensor:
        """``dW[r, c] = dY[:, r]^T X[:, c]`` where active, else 0: ``[T, out], [T, in] -> [out, in]``."""
        b = topology.side
        dw = x2d.new_zeros(topology.shape)
        if x2d.shape[0] == 0:
            return dw
        dy2d, x2d = _gemm_ready(dy2d), _gemm_ready(x2d)
        for r, spans in enumerate(_spans(topology.row_ptr, topology.col_idx, b)):
            rows = slice(r * b, (r + 1) * b)
            for i, j in spans:
                torch.mm(dy2d[:, rows].t(), x2d[:, i:j], out=dw[rows, i:j])
        return dw

    def conv_unsupported(
        self, device: torch.device, dtype: torch.dtype, topology: BlockTopology, geometry: ConvGeometry
    ) -> str | None:
        """Reason why a case cannot be run, or None: as for a linear layer."""
        return self.unsupported(device, dtype, topology)

    def conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology, geometry: ConvGeometry
    ) -> Tensor:
        """``Y[:, r] = conv2d(X[:, active], W[r, active]) + bias[r]``."""
        b = topology.side
        y = empty_image(x, x.shape[0], topology.shape[0], *geometry.output_size(x.shape[2], x.shape[3]))
        if y.numel() == 0:
            return y
        for r, spans in enumerate(_spans(topology.row_ptr, topology.col_idx, b)):
            rows = slice(r * b, (r + 1) * b)
            b_row = None if bias is None else bias[rows]
            if spans:
                w_row = _channels(weight[rows], spans)
                part = F.conv2d(_channels(x, spans), w_row, b_row, geometry.stride, geometry.padding, geometry.dilation)
            else:
                part = y.new_zeros(()) if b_row is None else b_row[:, None, None]
            y[:, rows] = part
        return y

    def conv_grad_input(
        self, dy: Tensor, weight: Tensor, size: tuple[int, int], topology: BlockTopology, geometry: ConvGeometry
    ) -> Tensor:
        """Gradient of the input, from ``dY[:, active]`` and ``W[active, c]`` for each block column."""
        b = topology.side
        dx = empty_image(dy, dy.shape[0], topology.shape[1], *size)
        if dx.numel() == 0:
            return dx
        for c, spans in enumerate(_spans(topology.col_ptr, topology.row_idx, b)):
            part = dx[:, c * b : (c + 1) * b]
            if spans:
                w_col = _channels(weight[:, c * b : (c + 1) * b].transpose(0, 1), spans).transpose(0, 1)
                part.copy_(library_gradient(_channels(dy, spans), part, w_col, geometry, (True, False, False))[0])
            else:
                part.zero_()
        return dx

    def conv_grad_weight(self, dy: Tensor, x: Tensor, topology: BlockTopology, geometry: ConvGeometry) -> Tensor:
        """Gradient of the weight from ``dY[:, r]`` and ``X[:, active]``, in channels-last memory."""
        b = topology.side
        dw = empty_image(x, *topology.shape, *geometry.kernel_size).zero_()
        if dy.numel() == 0:
            return dw
        for r, spans in enumerate(_spans(topology.row_ptr, topology.col_idx, b)):
            if not spans:
                continue
            rows = slice(r * b, (r + 1) * b)
            dy_row, x_row = _channels(dy, [(rows.start, rows.stop)]), _channels(x, spans)
            w_row = empty_image(x, b, x_row.shape[1], *geometry.kernel_size)  # its shape is what counts
            grad = library_gradient(dy_row, x_row, w_row, geometry, (False, True, False))[1]
            for (i, j), part in zip(spans, grad.split([j - i for i, j in spans], 1), strict=True):
                dw[rows, i:j] = part
        return dw


BACKEND = CPUBackend()
