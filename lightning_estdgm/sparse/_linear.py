"""`masked_linear`: a linear layer on the active blocks of its weight, as operators of `torch.library`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_estdgm.sparse._derivatives import matrix_products
from lightning_estdgm.sparse._flop_formulas import counts_multiplications, of_active
from lightning_estdgm.sparse._operands import TOPOLOGY_SCHEMA, as_given, prepared, topology_arguments, topology_of
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends._protocol import get_backend, supporting

# ---- operators: nobody else calls them


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    col_idx: Tensor,
    col_ptr: Tensor,
    row_idx: Tensor,
    sides: list[int],
    backend: str,
    dense_grad: bool,
    frozen: bool,
) -> Tensor:
    topology = topology_of(row_ptr, col_idx, col_ptr, row_idx, sides)
    chosen = supporting(backend, x.device, x.dtype, topology)
    with as_given(x):
        return F.linear(x, weight, bias) if frozen else chosen.linear(x, weight, bias, topology)


def _grad_input(
    dy: Tensor,
    weight: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    col_ptr: Tensor,
    row_idx: Tensor,
    sides: list[int],
    backend: str,
    dense_grad: bool,
    dense: bool,
) -> Tensor:
    topology = topology_of(row_ptr, col_idx, col_ptr, row_idx, sides)
    with as_given(dy):
        return dy @ weight if dense else get_backend(backend).grad_input(dy, weight, topology)


def _grad_weight(
    dy: Tensor,
    x: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    col_ptr: Tensor,
    row_idx: Tensor,
    sides: list[int],
    backend: str,
    dense: bool,
) -> Tensor:
    topology = topology_of(row_ptr, col_idx, col_ptr, row_idx, sides)
    with as_given(dy):
        return dy.t() @ x if dense else get_backend(backend).grad_weight(dy, x, topology)


_linear_op = torch.library.custom_op(
    "estdgm::masked_linear",
    _linear,
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, {TOPOLOGY_SCHEMA}, bool dense_grad, bool frozen) -> Tensor",
)
_grad_input_op = torch.library.custom_op(
    "estdgm::masked_linear_grad_input",
    _grad_input,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor weight, {TOPOLOGY_SCHEMA}, bool dense_grad, bool dense) -> Tensor",
)
_grad_weight_op = torch.library.custom_op(
    "estdgm::masked_linear_grad_weight",
    _grad_weight,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, {TOPOLOGY_SCHEMA}, bool dense) -> Tensor",
)


@_linear_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    col_idx: Tensor,
    col_ptr: Tensor,
    row_idx: Tensor,
    sides: list[int],
    backend: str,
    dense_grad: bool,
    frozen: bool,
) -> Tensor:
    supporting(backend, x.device, x.dtype, topology_of(row_ptr, col_idx, col_ptr, row_idx, sides))
    return x.new_empty(x.shape[0], weight.shape[0])


@_grad_input_op.register_fake
def _(dy: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[1])


@_grad_weight_op.register_fake
def _(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
    return dy.new_empty(dy.shape[1], x.shape[1])


@counts_multiplications("masked_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any, **_: Any) -> int:
    return of_active(x.shape[0] * weight.numel(), others, dense=others[-1])


@counts_multiplications("masked_linear_grad_input")
def _(dy: Tensor, weight: Tensor, *others: Any, **_: Any) -> int:
    return of_active(dy.shape[0] * weight.numel(), others, dense=others[-1])


@counts_multiplications("masked_linear_grad_weight")
def _(dy: Tensor, x: Tensor, *others: Any, **_: Any) -> int:
    return of_active(dy.numel() * x.shape[1], others, dense=others[-1])


_linear_product = matrix_products(_linear_op, _grad_input_op, _grad_weight_op, has_bias=True)


# ---- wrapper


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topology: BlockTopology,
    *,
    backend: str,
    dense_grad: bool = False,
    frozen: bool = False,
) -> Tensor:
    """Linear layer that computes on the active blocks of its weight only.

    ``Y = X (W * M)^T + bias``, ``dX = dY (W * M)``, ``dW = (dY^T X) * M``, ``dbias = sum of dY over tokens``,
    with ``M`` the topology's mask. Inactive blocks of ``W`` are ignored, whatever they hold. Under autocast
    floating-point operands are cast as ``torch.nn.functional.linear`` does. Derivatives
    of any order are products on active blocks as well, in reverse and in forward mode.

    Args:
        x: ``[..., in]``, any number of leading dimensions, zero tokens included.
        weight: ``(out, in)``, dense storage, any strides (a ``.t()`` view costs no copy).
        bias: ``[out]`` or None.
        topology: Active blocks; ``topology.shape`` must be ``(out, in)``.
        backend: Name of the backend, see `backends._protocol.backends`. It is used or refused, never replaced.
        dense_grad: Whether ``dW = dY^T X`` is whole, to observe the gradient of inactive blocks.
        frozen: Whether inactive weights keep acting: ``Y`` and ``dX`` are dense, and only ``dW`` is masked.

    Returns:
        ``[..., out]``, in the dtype of ``x`` (of autocast where it is on).

    Raises:
        TypeError: ``topology`` is no :class:`BlockTopology`, or dtypes differ.
        ValueError: Shapes or devices do not fit, the backend is unknown, or it does not support the case.

    Example:
        >>> topology = BlockTopology.from_mask(torch.tensor([[True, False]]), block_size=8)
        >>> masked_linear(torch.ones(3, 16), torch.ones(8, 16), None, topology, backend="cpu")[0, 0].item()
        8.0
    """
    if not isinstance(topology, BlockTopology):
        raise TypeError(f"topology must be a BlockTopology, got {type(topology).__name__}")
    if tuple(weight.shape) != topology.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, but the topology is for {topology.shape}")
    if x.dim() < 1 or x.shape[-1] != topology.shape[1]:
        raise ValueError(f"x must have {topology.shape[1]} features in its last dimension, got shape {tuple(x.shape)}")
    if bias is not None and tuple(bias.shape) != topology.shape[:1]:
        raise ValueError(f"bias must have shape {topology.shape[:1]}, got {tuple(bias.shape)}")
    x, weight, bias = prepared(x, weight, bias, topology)
    y = _linear_product(
        x.reshape(-1, x.shape[-1]),
        weight,
        bias,
        *topology_arguments(topology),
        backend,
        dense_grad,
        frozen,
    )
    return y.reshape(*x.shape[:-1], weight.shape[0])
