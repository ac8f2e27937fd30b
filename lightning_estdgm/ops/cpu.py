"""Blocked products on the CPU: library GEMMs on strided views of the dense matrices, active blocks only."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lightning_estdgm.topology import BlockTopology

__all__ = ["BACKEND", "CPUBackend"]

MIN_BLOCK = 8
"""Below this a GEMM call costs more than the few multiplications inside it."""

_WIDE = (torch.float32, torch.float64)
_NARROW = (torch.bfloat16, torch.float16)


def _runs(ptr: Tensor, idx: Tensor, block_size: int) -> list[list[tuple[int, int]]]:
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


class CPUBackend:
    """One GEMM per run of adjacent active blocks, read and written in place: no gather, no packed weight.

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
        if topology.block_size < MIN_BLOCK:
            return (
                f"needs blocks of at least {MIN_BLOCK} (a GEMM call on less costs more than it saves), "
                f"got block size {topology.block_size}"
            )
        return None

    def linear(self, x2d: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology) -> Tensor:
        """``Y[:, r] = sum over active c of X[:, c] W[r, c]^T + bias[r]``: ``[T, in] -> [T, out]``."""
        b = topology.block_size
        y = x2d.new_empty(x2d.shape[0], topology.shape[0])
        if y.numel() == 0:
            return y
        x2d = _gemm_ready(x2d)
        for r, spans in enumerate(_runs(topology.row_ptr, topology.col_idx, b)):
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
            x_run, w_run = terms[0]
            if b_row is None:
                torch.mm(x_run, w_run.t(), out=out)
            else:
                torch.addmm(b_row, x_run, w_run.t(), out=out)
            for x_run, w_run in terms[1:]:
                out.addmm_(x_run, w_run.t())
        return y

    def grad_input(self, dy2d: Tensor, weight: Tensor, topology: BlockTopology) -> Tensor:
        """``dX[:, c] = sum over active r of dY[:, r] W[r, c]``: ``[T, out] -> [T, in]``."""
        return self.linear(dy2d, weight.t(), None, topology.transpose())

    def grad_weight(self, dy2d: Tensor, x2d: Tensor, topology: BlockTopology) -> Tensor:
        """``dW[r, c] = dY[:, r]^T X[:, c]`` where active, else 0: ``[T, out], [T, in] -> [out, in]``."""
        b = topology.block_size
        dw = x2d.new_zeros(topology.shape)
        if x2d.shape[0] == 0:
            return dw
        dy2d, x2d = _gemm_ready(dy2d), _gemm_ready(x2d)
        for r, spans in enumerate(_runs(topology.row_ptr, topology.col_idx, b)):
            rows = slice(r * b, (r + 1) * b)
            for i, j in spans:
                torch.mm(dy2d[:, rows].t(), x2d[:, i:j], out=dw[rows, i:j])
        return dw


BACKEND = CPUBackend()
