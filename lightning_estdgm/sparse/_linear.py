"""`masked_linear`: a linear layer on the active blocks of its weight, as operators of `torch.library`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
    block_size: list[int],
    backend: str,
    dense_grad: bool,
    frozen: bool,
) -> Tensor:
    topology = topology_of(row_ptr, col_idx, col_ptr, row_idx, block_size)
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
    block_size: list[int],
    backend: str,
    dense: bool,
) -> Tensor:
    topology = topology_of(row_ptr, col_idx, col_ptr, row_idx, block_size)
    with as_given(dy):
        return dy @ weight if dense else get_backend(backend).grad_input(dy, weight, topology)


def _grad_weight(
    dy: Tensor,
    x: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    col_ptr: Tensor,
    row_idx: Tensor,
    block_size: list[int],
    backend: str,
    dense: bool,
) -> Tensor:
    topology = topology_of(row_ptr, col_idx, col_ptr, row_idx, block_size)
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
    schema=f"(Tensor dy, Tensor weight, {TOPOLOGY_SCHEMA}, bool dense) -> Tensor",
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
    block_size: list[int],
    backend: str,
    dense_grad: bool,
    frozen: bool,
) -> Tensor:
    supporting(backend, x.device, x.dtype, topology_of(row_ptr, col_idx, col_ptr, row_idx, block_size))
    return x.new_empty(x.shape[0], weight.shape[0])


@_grad_input_op.register_fake
def _(dy: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[1])


@_grad_weight_op.register_fake
def _(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
    return dy.new_empty(dy.shape[1], x.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *indices, block_size, backend, dense_grad, frozen = inputs
    need_x, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None, *indices)
    ctx.block_size, ctx.backend, ctx.dense_grad, ctx.frozen = block_size, backend, dense_grad, frozen
    # The gradient of a transposed view is computed transposed: it reaches the parameter without a copy.
    ctx.transposed = weight.stride(0) == 1 and weight.stride(1) != 1


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, row_ptr, col_idx, col_ptr, row_idx = ctx.saved_tensors
    forward = (row_ptr, col_idx, col_ptr, row_idx, ctx.block_size, ctx.backend)
    swapped = (col_ptr, row_idx, row_ptr, col_idx, ctx.block_size[::-1], ctx.backend)
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    dx = dw = db = None
    grad_input: Any = _grad_input_op
    grad_weight: Any = _grad_weight_op
    if _transforming():
        grad_input, grad_weight = (
            functools.partial(_TransformedGradient.apply, op) for op in (grad_input, grad_weight)
        )
    if need_x:
        dx = grad_input(dy, weight, *forward, ctx.frozen)
    if need_weight and ctx.transposed:
        dw = grad_weight(x, dy, *swapped, ctx.dense_grad).t()
    elif need_weight:
        dw = grad_weight(dy, x, *forward, ctx.dense_grad)
    if need_bias:
        db = dy.sum(0)
    return dx, dw, db, None, None, None, None, None, None, None, None


_linear_op.register_autograd(_backward, setup_context=_setup_context)


class _Transformed(torch.autograd.Function):
    """The operator under the transforms of `torch.func`, which do not take `register_autograd`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        y: Tensor = _linear_op(*args)
        return y

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


class _TransformedGradient(torch.autograd.Function):
    """One of the gradients under the transforms of `torch.func`; its own gradient is not defined."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Any, *args: Any) -> Tensor:
        gradient: Tensor = operator(*args)
        return gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("masked_linear has no gradients of gradients")


def _transforming() -> bool:
    return torch._C._are_functorch_transforms_active()


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
    floating-point operands are cast as ``torch.nn.functional.linear`` does. Gradients of gradients are not
    defined.

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
        NotImplementedError: An operand carries a forward-mode tangent.

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
    x, weight, bias = prepared("masked_linear", x, weight, bias, topology)
    operator: Any = _Transformed.apply if _transforming() else _linear_op
    y: Tensor = operator(
        x.reshape(-1, x.shape[-1]),
        weight,
        bias,
        *topology_arguments(topology),
        backend,
        dense_grad,
        frozen,
    )
    return y.reshape(*x.shape[:-1], weight.shape[0])
