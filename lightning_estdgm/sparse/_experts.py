"""`masked_experts`: products of stacked experts with their rows on active blocks, as operators of `torch.library`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_estdgm.method._masks import block_size_of, sides
from lightning_estdgm.sparse._derivatives import matrix_products
from lightning_estdgm.sparse._expert_topology import ExpertTopology
from lightning_estdgm.sparse._flop_formulas import can_read, counts_multiplications, of_active
from lightning_estdgm.sparse._operands import TOPOLOGY_SCHEMA, as_given, prepared, topology_arguments
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends._protocol import get_backend, supporting


def _busy(counts: Tensor, topology: ExpertTopology) -> Iterator[tuple[int, slice, BlockTopology]]:
    """Yield each expert that has rows, these, and its topology. Reads the counts on the host."""
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            yield expert, slice(start, start + count), topology.expert(expert)
        start += count


# ---- operators: nobody else calls them


def _experts(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    col_ptr: Tensor,
    row_idx: Tensor,
    sides: list[int],
    backend: str,
    dense_grad: bool,
    frozen: bool,
) -> Tensor:
    stack = ExpertTopology(block_size_of(*sides), row_ptr, col_idx, col_ptr, row_idx)
    y = x.new_zeros(x.shape[0], weight.shape[1])
    with as_given(x):
        for e, rows, topology in _busy(counts, stack):
            chosen = supporting(backend, x.device, x.dtype, topology)
            y[rows] = F.linear(x[rows], weight[e]) if frozen else chosen.linear(x[rows], weight[e], None, topology)
    return y


def _grad_input(
    dy: Tensor,
    weight: Tensor,
    counts: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    col_ptr: Tensor,
    row_idx: Tensor,
    sides: list[int],
    backend: str,
    dense_grad: bool,
    dense: bool,
) -> Tensor:
    stack = ExpertTopology(block_size_of(*sides), row_ptr, col_idx, col_ptr, row_idx)
    dx = dy.new_zeros(dy.shape[0], weight.shape[2])
    with as_given(dy):
        for e, rows, topology in _busy(counts, stack):
            part = dy[rows]
            dx[rows] = part @ weight[e] if dense else get_backend(backend).grad_input(part, weight[e], topology)
    return dx


def _grad_weight(
    dy: Tensor,
    x: Tensor,
    counts: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    col_ptr: Tensor,
    row_idx: Tensor,
    sides: list[int],
    backend: str,
    dense: bool,
) -> Tensor:
    stack = ExpertTopology(block_size_of(*sides), row_ptr, col_idx, col_ptr, row_idx)
    dw = x.new_zeros(counts.shape[0], dy.shape[1], x.shape[1])
    with as_given(dy):
        for e, rows, topology in _busy(counts, stack):
            if dense:
                torch.mm(dy[rows].t(), x[rows], out=dw[e])
            else:
                dw[e] = get_backend(backend).grad_weight(dy[rows], x[rows], topology)
    return dw


_experts_op = torch.library.custom_op(
    "estdgm::masked_experts",
    _experts,
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor counts, {TOPOLOGY_SCHEMA}, bool dense_grad, bool frozen) -> Tensor",
)
_grad_input_op = torch.library.custom_op(
    "estdgm::masked_experts_grad_input",
    _grad_input,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor weight, Tensor counts, {TOPOLOGY_SCHEMA}, bool dense_grad, bool dense) -> Tensor",
)
_grad_weight_op = torch.library.custom_op(
    "estdgm::masked_experts_grad_weight",
    _grad_weight,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, Tensor counts, {TOPOLOGY_SCHEMA}, bool dense) -> Tensor",
)


@_experts_op.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_grad_input_op.register_fake
def _(dy: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[2])


@_grad_weight_op.register_fake
def _(dy: Tensor, x: Tensor, counts: Tensor, *_: Any) -> Tensor:
    return dy.new_empty(counts.shape[0], dy.shape[1], x.shape[1])


@counts_multiplications("masked_experts")
def _(x: Tensor, weight: Tensor, counts: Tensor, *others: Any, **_: Any) -> int:
    return _of_busy(x.shape[0], weight.shape[1] * weight.shape[2], counts, others)


@counts_multiplications("masked_experts_grad_input")
def _(dy: Tensor, weight: Tensor, counts: Tensor, *others: Any, **_: Any) -> int:
    return _of_busy(dy.shape[0], weight.shape[1] * weight.shape[2], counts, others)


@counts_multiplications("masked_experts_grad_weight")
def _(dy: Tensor, x: Tensor, counts: Tensor, *others: Any, **_: Any) -> int:
    return _of_busy(dy.shape[0], dy.shape[1] * x.shape[1], counts, others)


def _of_busy(rows: int, size: int, counts: Tensor, others: Sequence[Any]) -> int:
    """Return the multiplications of all experts, of matrices of a size, with their rows."""
    if not can_read(counts):
        return rows * size
    row_ptr, col_idx, col_ptr, row_idx, sides, backend = others[:6]
    stack = ExpertTopology(block_size_of(*sides), row_ptr, col_idx, col_ptr, row_idx)
    return sum(
        of_active((own.stop - own.start) * size, (*topology_arguments(topology), backend), dense=others[-1])
        for _, own, topology in _busy(counts, stack)
    )


_experts_product = matrix_products(_experts_op, _grad_input_op, _grad_weight_op, before=1)


# ---- wrapper


def masked_experts(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    topology: ExpertTopology,
    *,
    backend: str,
    dense_grad: bool = False,
    frozen: bool = False,
) -> Tensor:
    """Products of each expert's matrix with its own rows, on the active blocks only; as `masked_linear` for each.

    Rows lie expert after expert: the first ``counts[0]`` are those of the first. Rows past the last expert's give zero,
    and an expert without rows costs nothing. How many rows each has is read on the host. Derivatives of any order
    are such products as well, in reverse and in forward mode.

    Args:
        x: ``[rows, in]``.
        weight: ``(experts, out, in)``, any strides (a view ``.transpose(1, 2)`` costs no copy).
        counts: int64 ``[experts]``, the rows of each expert; on any device.
        topology: Active blocks; ``topology.shape`` must be that of `weight`.
        backend: Name of the backend. It is used or refused, never replaced.
        dense_grad: Whether the gradients of the matrices are whole, to observe inactive blocks; only of experts that
            have rows, those of others are zero.
        frozen: Whether inactive weights keep acting: only the gradient of the matrices is masked.

    Returns:
        ``[rows, out]``, in the dtype of ``x`` (of autocast where it is on).

    Raises:
        TypeError: Dtypes differ.
        ValueError: Shapes or devices do not fit, or the backend does not support the case.

    Example:
        >>> topology = ExpertTopology.from_mask(torch.tensor([[True, False], [True, True]]), 2, block_size=8)
        >>> masked_experts(torch.ones(3, 16), torch.ones(2, 8, 16), torch.tensor([2, 1]), topology, backend="cpu")[:, 0]
        tensor([ 8.,  8., 16.])
    """
    if tuple(weight.shape) != topology.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, but the topology is for {topology.shape}")
    if x.dim() != 2 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"x must have shape [rows, {weight.shape[2]}], got {tuple(x.shape)}")
    if tuple(counts.shape) != (weight.shape[0],):
        raise ValueError(f"counts must be the rows of {weight.shape[0]} experts, got shape {tuple(counts.shape)}")
    x, weight, _ = prepared(x, weight, None, topology.expert(0))
    lists = (topology.row_ptr, topology.col_idx, topology.col_ptr, topology.row_idx)
    return _experts_product(x, weight, counts, *lists, list(sides(topology.block_size)), backend, dense_grad, frozen)
