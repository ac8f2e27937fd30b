# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of linear layers whose units are 8 to 32 outputs of one input, and their launches. Imports Triton.

Such a unit is a short column of the weight. ``Y`` and ``dW`` gather inputs: those of one panel of outputs lie anywhere,
so the activations are laid out input by input first, which makes each of them one stretch of memory. ``dX`` cannot
gather, since two inputs share no unit: it takes inputs side by side in groups, and for each group the panels that are
active for any of them, with zeros for the rest (`grouped`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends.triton import _launch as launch
from lightning_estdgm.sparse.backends.triton import _linear as blocks
from lightning_estdgm.sparse.backends.triton._tiles import Tiles

CHUNK = 128
"""Units of a panel that one program packs."""


# ---- copies of what is read out of order: inputs side by side in memory, active weights alone


def _input_by_input(x2d: Tensor, multiple: int) -> Tensor:
    """``X^T [in, T]``, row-major, with zeros up to a multiple of tokens: no copy where it lies so already."""
    missing = -x2d.shape[0] % multiple
    return F.pad(x2d.t(), (0, missing)) if missing else x2d.t().contiguous()


@triton.jit
def _pack_kernel(
    out_ptr,
    w_ptr,
    row_ptr,
    col_idx,
    stride_wn,
    stride_wk,
    stride_out,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """CHUNK units of one panel, to ``[slot, UNIT]`` in the order of the list, or (IN_PLACE) to ``[out, in]``."""
    panel = tl.program_id(0)
    begin = tl.load(row_ptr + panel) + tl.program_id(1) * CHUNK
    slot = begin + tl.arange(0, CHUNK)
    exists = slot < tl.load(row_ptr + panel + 1)
    col = tl.load(col_idx + slot, mask=exists, other=0).to(tl.int64)
    i = tl.arange(0, UNIT)
    n = (panel * UNIT + i).to(tl.int64)
    w = tl.load(w_ptr + col[:, None] * stride_wk + n[None, :] * stride_wn, mask=exists[:, None], other=0.0)
    at = n[None, :] * stride_out + col[:, None] if IN_PLACE else slot.to(tl.int64)[:, None] * UNIT + i[None, :]
    tl.store(out_ptr + at, w, mask=exists[:, None])


def _pack(out: Tensor, weight: Tensor, topology: BlockTopology, *, in_place: bool) -> None:
    _pack_kernel[(topology.block_rows, triton.cdiv(topology.block_cols, CHUNK))](
        out,
        weight,
        topology.row_ptr,
        topology.col_idx,
        *weight.stride(),
        out.stride(0),
        UNIT=topology.sides[0],
        CHUNK=CHUNK,
        IN_PLACE=in_place,
        enable_fp_fusion=True,  # unnamed, Triton 3.9 warns that its default will change
    )


# ---- Y = X (W * M)^T + bias, units of several outputs


@triton.jit(do_not_specialize=["tokens", "panels"])
def _gather_kernel(
    y_ptr,
    x_ptr,
    values_ptr,
    bias_ptr,
    row_ptr,
    col_idx,
    tokens,
    panels,
    stride_x,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    SWIZZLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: ROWS tokens of one panel of UNIT outputs, from ``x [in, tokens]`` and ``values [slot, UNIT]``.

    The tile is WIDE columns, of which those past the panel are zeros and never written.
    """
    pid = tl.program_id(0)
    sweep = SWIZZLE * panels
    first_tile = pid // sweep * SWIZZLE
    tiles = tl.minimum(tl.cdiv(tokens, ROWS) - first_tile, SWIZZLE)
    tile = first_tile + pid % sweep % tiles
    panel = pid % sweep // tiles

    t = tile * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, WIDE)
    k = tl.arange(0, DEPTH)
    begin = tl.load(row_ptr + panel)
    end = tl.load(row_ptr + panel + 1)
    acc = tl.zeros((ROWS, WIDE), tl.float32)
    for first in range(begin, end, DEPTH):
        slot = first + k
        exists = slot < end
        col = tl.load(col_idx + slot, mask=exists, other=0).to(tl.int64)
        x = tl.load(x_ptr + t[:, None] + col[None, :] * stride_x, mask=exists[None, :], other=0.0)
        w_exists = exists[:, None] & (i < UNIT)[None, :] if WIDE > UNIT else exists[:, None]
        w = tl.load(values_ptr + slot.to(tl.int64)[:, None] * UNIT + i[None, :], mask=w_exists, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    n = panel * UNIT + i
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=i < UNIT, other=0.0).to(tl.float32)[None, :]
    y = y_ptr + t.to(tl.int64)[:, None] * (panels * UNIT) + n[None, :]
    inside = (t[:, None] < tokens) & (i < UNIT)[None, :] if WIDE > UNIT else t[:, None] < tokens
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=inside)


def _gather(
    x2d: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology, tiles: Tiles, precision: str
) -> Tensor:
    tokens = x2d.shape[0]
    y = x2d.new_empty(tokens, topology.shape[0])
    x = _input_by_input(x2d, tiles.rows)
    values = weight.new_empty(weight.numel())  # room for every unit: how many are active is known to the device alone
    _pack(values, weight, topology, in_place=False)
    _gather_kernel[(triton.cdiv(tokens, tiles.rows) * topology.block_rows,)](
        y,
        x,
        values,
        bias,
        topology.row_ptr,
        topology.col_idx,
        tokens,
        topology.block_rows,
        x.stride(0),
        UNIT=topology.sides[0],
        WIDE=tiles.columns,
        ROWS=tiles.rows,
        DEPTH=tiles.depth,
        SWIZZLE=launch.SWIZZLE,
        HAS_BIAS=bias is not None,
        **launch.options(tiles, x2d.dtype, precision),
    )
    return y


# ---- the same with units of several inputs: dX = dY (W * M)


@triton.jit
def _mark_kernel(marks_ptr, row_ptr, col_idx, groups, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """``marks [panels, groups]``: 1 where a panel has an active input in a group."""
    panel = tl.program_id(0)
    slot = tl.load(row_ptr + panel) + tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    exists = slot < tl.load(row_ptr + panel + 1)
    group = tl.load(col_idx + slot, mask=exists, other=0) // GROUP
    at = panel.to(tl.int64) * groups + group
    tl.store(marks_ptr + at, tl.full((CHUNK,), 1, tl.int8), mask=exists)


def grouped(topology: BlockTopology, group: int) -> BlockTopology:
    """Topology of blocks of as many outputs as a unit and `group` inputs, active where any unit in them is.

    Nothing waits for the device. The last group may reach past the last input.
    """
    groups = triton.cdiv(topology.block_cols, group)
    marks = torch.zeros(topology.block_rows, groups, dtype=torch.int8, device=topology.device)
    grid = (topology.block_rows, triton.cdiv(topology.block_cols, CHUNK))
    _mark_kernel[grid](
        marks, topology.row_ptr, topology.col_idx, groups, GROUP=group, CHUNK=CHUNK, enable_fp_fusion=True
    )
    return BlockTopology.from_mask(marks.bool(), (topology.sides[0], group))


class Groups:
    """Topologies of groups, made anew where a mask has changed.

    A mask is known by its first index list and that list's version counter, as `BlockTopology.update_` writes in place.
    While a CUDA graph is captured they are made in the graph, which so follows masks; for lists made in inference mode,
    which have no counter, they are made for one call.
    """

    def __init__(self) -> None:
        self._kept = WeakTensorKeyDictionary()  # index list -> its version, {(outputs of a unit, group): topology}

    def of(self, topology: BlockTopology, group: int) -> BlockTopology:
        """`grouped`, or what it returned before for this mask."""
        lists = topology.row_ptr
        capturing = lists.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if lists.is_inference() or capturing:
            return grouped(topology, group)
        version, kept = self._kept.get(lists, (None, {}))
        if version != lists._version:
            kept = {}
            self._kept[lists] = lists._version, kept
        key = topology.sides[0], group
        if key not in kept:
            kept[key] = grouped(topology, group)
        return kept[key]


_groups = Groups()


def _spread(
    x2d: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology, tiles: Tiles, precision: str
) -> Tensor:
    panels = topology.transpose()
    group_blocks = _groups.of(panels, tiles.columns)
    active = weight.new_zeros(group_blocks.shape)
    _pack(active, weight.t(), panels, in_place=True)
    return blocks.linear(
        x2d, active.t(), bias, group_blocks.transpose(), tiles, precision=precision, width=topology.shape[0]
    )


# ---- what the backend calls


def linear(
    x2d: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology, tiles: Tiles, *, precision: str
) -> Tensor:
    """``Y = X (W * M)^T + bias``: ``[T, in] -> [T, out]``, ``T >= 1``, with units of one input or of one output.

    Args:
        x2d: ``[T, in]``, any strides.
        weight: ``(out, in)``, any strides.
        bias: ``[out]`` or None.
        topology: Active units of the weight.
        tiles: Cut of the work, with as many columns as a group where units have one output.
        precision: Precision of float32 products: ``"tf32"`` or ``"ieee"``.
    """
    bias = None if bias is None else bias.contiguous()
    product = _gather if topology.sides[1] == 1 else _spread
    with launch.on(x2d.device):
        return product(x2d, weight, bias, topology, tiles, precision)


def grad_weight(dy2d: Tensor, x2d: Tensor, topology: BlockTopology, tiles: Tiles, *, precision: str) -> Tensor:
    """``dW = (dY^T X) * M``: ``[T, out], [T, in] -> (out, in)``, ``T >= 1``, 0 in inactive units.

    Args:
        dy2d: ``[T, out]``, any strides.
        x2d: ``[T, in]``, any strides.
        topology: Active units of the weight.
        tiles: Cut of the work; its rows are gathered inputs.
        precision: Precision of float32 products: ``"tf32"`` or ``"ieee"``.
    """
    dw = result = x2d.new_zeros(topology.shape)
    if topology.sides[1] != 1:  # the gradient's transpose has units of one input
        dy2d, x2d, dw, topology = x2d, dy2d, dw.t(), topology.transpose()
    gathered = _input_by_input(x2d, tiles.depth).t()
    blocks.grad_weight(dy2d, gathered, topology, tiles, precision=precision, dw=dw, filled_up=True)
    return result
