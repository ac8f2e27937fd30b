"""Products of a linear layer on the active blocks of its weight, behind one ``Backend`` protocol.

A backend is one module of this package with a module-level ``BACKEND``, or an entry point of the group
``lightning_estdgm.backends`` that loads to one. ``masked_linear`` is the operator that layers call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_estdgm.ops.operands import TOPOLOGY_SCHEMA, as_given, prepared, topology_of
from lightning_estdgm.topology import BlockTopology

__all__ = ["ENTRY_POINT_GROUP", "Backend", "backends", "get_backend", "masked_linear"]

ENTRY_POINT_GROUP = "lightning_estdgm.backends"

_RESERVED = ("auto", "dense")  # names that mean "no backend" wherever one is chosen


@runtime_checkable
class Backend(Protocol):
    """The three products of a linear layer, on active blocks only.

    Methods are called below autograd, with checked arguments: ``x2d [T, in]``, ``dy2d [T, out]`` and
    ``weight (out, in)`` of one dtype and device, of any strides, ``T >= 0``. They return new row-major
    tensors. What inactive blocks of ``weight`` hold must not reach a result, not even if it is NaN.
    """

    name: str

    def unsupported(self, device: torch.device, dtype: torch.dtype, topology: BlockTopology) -> str | None:
        """Reason why a case cannot be run, or None. May read sizes of the topology, never its tensors."""
        ...

    def linear(self, x2d: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology) -> Tensor:
        """``Y = X (W * M)^T + bias``, shape ``[T, out]``."""
        ...

    def grad_input(self, dy2d: Tensor, weight: Tensor, topology: BlockTopology) -> Tensor:
        """``dX = dY (W * M)``, shape ``[T, in]``."""
        ...

    def grad_weight(self, dy2d: Tensor, x2d: Tensor, topology: BlockTopology) -> Tensor:
        """``dW = (dY^T X) * M``, shape ``(out, in)``, dense storage, exactly 0 in inactive blocks."""
        ...


# ---- discovery


@functools.lru_cache(maxsize=1)
def _discover() -> dict[str, Backend]:
    found: dict[str, Backend] = {}

    def add(backend: object, origin: str) -> None:
        if not isinstance(backend, Backend):
            raise TypeError(f"{origin} must be a Backend (name, unsupported, linear, grad_input, grad_weight)")
        if backend.name in found or backend.name in _RESERVED:
            raise ValueError(f"{origin}: the backend name {backend.name!r} is already taken")
        found[backend.name] = backend

    for info in pkgutil.iter_modules(__path__, f"{__name__}."):
        backend = getattr(importlib.import_module(info.name), "BACKEND", None)
        if backend is not None:
            add(backend, f"{info.name}.BACKEND")
    for point in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name):
        add(point.load(), f"entry point {point.name!r} ({point.value})")
    return dict(sorted(found.items()))


def backends() -> dict[str, Backend]:
    """Every installed backend by name: those of this package and those of entry points.

    Raises:
        TypeError: a module or entry point offers something that is no backend.
        ValueError: two backends of one name.

    Example:
        >>> sorted(backends())
        ['cpu', 'native', 'reference', 'triton']
    """
    return dict(_discover())


def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: there is none; the message lists the known ones.
    """
    found = _discover()
    if name not in found:
        raise ValueError(f"unknown backend {name!r}, expected one of: {', '.join(found)}")
    return found[name]


def _supporting(name: str, device: torch.device, dtype: torch.dtype, topology: BlockTopology) -> Backend:
    backend = get_backend(name)
    reason = backend.unsupported(device, dtype, topology)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot run this layer: it {reason}")
    return backend


# ---- operators: nobody else calls them


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    col_idx: Tensor,
    col_ptr: Tensor,
    row_idx: Tensor,
    block_size: int,
    backend: str,
    dense_grad: bool,
    frozen: bool,
) -> Tensor:
    topology = topology_of(row_ptr, col_idx, col_ptr, row_idx, block_size)
    chosen = _supporting(backend, x.device, x.dtype, topology)
    with as_given(x):
        return F.linear(x, weight, bias) if frozen else chosen.linear(x, weight, bias, topology)


def _grad_input(
    dy: Tensor,
    weight: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    col_ptr: Tensor,
    row_idx: Tensor,
    block_size: int,
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
    block_size: int,
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
    block_size: int,
    backend: str,
    dense_grad: bool,
    frozen: bool,
) -> Tensor:
    _supporting(backend, x.device, x.dtype, topology_of(row_ptr, col_idx, col_ptr, row_idx, block_size))
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
    swapped = (col_ptr, row_idx, row_ptr, col_idx, ctx.block_size, ctx.backend)
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
        topology: which blocks are active; ``topology.shape`` must be ``(out, in)``.
        backend: name of the backend, see :func:`backends`. It is used or refused, never replaced.
        dense_grad: ``dW = dY^T X`` without the mask, to observe the gradient of inactive blocks.
        frozen: inactive weights keep acting: ``Y`` and ``dX`` are dense, and only ``dW`` is masked.

    Returns:
        ``[..., out]``, in the dtype of ``x`` (of autocast where it is on).

    Raises:
        TypeError: ``topology`` is no :class:`BlockTopology`, or dtypes differ.
        ValueError: shapes or devices do not fit, the backend is unknown, or it does not support the case.
        NotImplementedError: an operand carries a forward-mode tangent.

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
        topology.row_ptr,
        topology.col_idx,
        topology.col_ptr,
        topology.row_idx,
        topology.block_size,
        backend,
        dense_grad,
        frozen,
    )
    return y.reshape(*x.shape[:-1], weight.shape[0])
