"""`masked_conv2d`: a 2-D convolution on the active blocks of its weight, as operators of `torch.library`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_estdgm.sparse import _conv_products as conv_products
from lightning_estdgm.sparse._conv_geometry import ConvGeometry, empty_image, library_gradient, memory_format
from lightning_estdgm.sparse._derivatives import differentiable, is_transforming
from lightning_estdgm.sparse._flop_formulas import counts_multiplications, of_active
from lightning_estdgm.sparse._operands import TOPOLOGY_SCHEMA, as_given, prepared, topology_arguments, topology_of
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends._protocol import get_backend, supporting_conv

# ---- operators: activations in channels-last memory; nobody else calls them

_GEOMETRY_SCHEMA = "int[] kernel_size, int[] stride, int[] padding, int[] dilation"


def _geometry(
    kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> ConvGeometry:
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel_size, stride, padding, dilation
    return ConvGeometry((kh, kw), (sh, sw), (ph, pw), (dh, dw))


def _channels_last_memory(image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last)


def _laid_out(image: Tensor) -> Tensor:
    # Once for all products that read it. vmap takes no memory format: there each operator lays out its own operands.
    return image if is_transforming() else _channels_last_memory(image)


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    col_idx: Tensor,
    col_ptr: Tensor,
    row_idx: Tensor,
    sides: list[int],
    backend: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dense_grad: bool,
    frozen: bool,
) -> Tensor:
    topology = topology_of(row_ptr, col_idx, col_ptr, row_idx, sides)
    geometry = _geometry(kernel_size, stride, padding, dilation)
    chosen = supporting_conv(backend, x.device, x.dtype, topology, geometry)
    x = _channels_last_memory(x)
    with as_given(x):
        if frozen:
            y = F.conv2d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation)
        else:
            y = conv_products.conv(chosen, x, weight, bias, topology, geometry)
    return _channels_last_memory(y)


def _grad_input(
    dy: Tensor,
    weight: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    col_ptr: Tensor,
    row_idx: Tensor,
    sides: list[int],
    backend: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
    dense_grad: bool,
    dense: bool,
) -> Tensor:
    topology = topology_of(row_ptr, col_idx, col_ptr, row_idx, sides)
    geometry = _geometry(kernel_size, stride, padding, dilation)
    height, width = size
    dy = _channels_last_memory(dy)
    with as_given(dy):
        if dense:
            x = empty_image(dy, dy.shape[0], weight.shape[1], height, width)  # its shape is what counts
            dx = library_gradient(dy, x, weight, geometry, (True, False, False))[0]
        else:
            dx = conv_products.conv_grad_input(get_backend(backend), dy, weight, (height, width), topology, geometry)
    return _channels_last_memory(dx)


def _grad_weight(
    dy: Tensor,
    x: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    col_ptr: Tensor,
    row_idx: Tensor,
    sides: list[int],
    backend: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    dense: bool,
) -> Tensor:
    topology = topology_of(row_ptr, col_idx, col_ptr, row_idx, sides)
    geometry = _geometry(kernel_size, stride, padding, dilation)
    dy, x = _channels_last_memory(dy), _channels_last_memory(x)
    with as_given(dy):
        if dense:
            weight = empty_image(dy, dy.shape[1], x.shape[1], *kernel_size, channels_last=channels_last)
            dw = library_gradient(dy, x, weight, geometry, (False, True, False))[1]
        else:
            dw = conv_products.conv_grad_weight(get_backend(backend), dy, x, topology, geometry)
    return dw.contiguous(memory_format=memory_format(channels_last))


_conv2d_op = torch.library.custom_op(
    "estdgm::masked_conv2d",
    _conv2d,
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, {TOPOLOGY_SCHEMA}, {_GEOMETRY_SCHEMA}, bool dense_grad,"
    " bool frozen) -> Tensor",
)
_grad_input_op = torch.library.custom_op(
    "estdgm::masked_conv2d_grad_input",
    _grad_input,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor weight, {TOPOLOGY_SCHEMA}, {_GEOMETRY_SCHEMA}, SymInt[] size, bool dense_grad,"
    " bool dense) -> Tensor",
)
_grad_weight_op = torch.library.custom_op(
    "estdgm::masked_conv2d_grad_weight",
    _grad_weight,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, {TOPOLOGY_SCHEMA}, {_GEOMETRY_SCHEMA}, bool channels_last, bool dense) -> Tensor",
)


@_conv2d_op.register_fake
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
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dense_grad: bool,
    frozen: bool,
) -> Tensor:
    geometry = _geometry(kernel_size, stride, padding, dilation)
    supporting_conv(backend, x.device, x.dtype, topology_of(row_ptr, col_idx, col_ptr, row_idx, sides), geometry)
    return empty_image(x, x.shape[0], weight.shape[0], *geometry.output_size(x.shape[2], x.shape[3]))


@_grad_input_op.register_fake
def _(dy: Tensor, weight: Tensor, *others: Any) -> Tensor:
    *_, size, _dense_grad, _dense = others
    return empty_image(dy, dy.shape[0], weight.shape[1], *size)


@_grad_weight_op.register_fake
def _(dy: Tensor, x: Tensor, *others: Any) -> Tensor:
    *_, kernel_size, _stride, _padding, _dilation, channels_last, _dense = others
    return empty_image(dy, dy.shape[1], x.shape[1], *kernel_size, channels_last=channels_last)


@counts_multiplications("masked_conv2d")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any, out_val: Tensor, **_: Any) -> int:
    return of_active(_pixels(out_val) * weight.numel(), others, dense=others[-1])


@counts_multiplications("masked_conv2d_grad_input")
def _(dy: Tensor, weight: Tensor, *others: Any, **_: Any) -> int:
    return of_active(_pixels(dy) * weight.numel(), others, dense=others[-1])


@counts_multiplications("masked_conv2d_grad_weight")
def _(dy: Tensor, x: Tensor, *others: Any, **_: Any) -> int:
    return of_active(dy.numel() * x.shape[1] * math.prod(others[6]), others, dense=others[-1])


def _pixels(image: Tensor) -> int:
    return image.shape[0] * math.prod(image.shape[2:])


def _channels_last(image: Tensor) -> bool:
    """Whether channels are adjacent in memory and pixels are not: where torch's conv2d returns channels-last memory."""
    return image.stride(1) == 1 and image.stride(3) >= image.shape[1]


# ---- products: the gradients of each are the other two


def _size_and_memory(x: Tensor, weight: Tensor) -> tuple[tuple[int, ...], bool]:
    return tuple(x.shape[2:]), _channels_last(weight)


def _size(dy: Tensor, x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape[2:])


def _gradients(
    needed: tuple[bool, bool],
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rest: tuple[Any, ...],
    noted: tuple[tuple[int, ...], bool],
) -> tuple[Tensor | None, Tensor | None]:
    *case, dense_grad, frozen = rest
    size, channels_last = noted
    dy = _laid_out(dy)
    dx = _grad_input_product(dy, weight, *case, size, dense_grad, frozen) if needed[0] else None
    dw = _grad_weight_product(dy, x, *case, channels_last, dense_grad) if needed[1] else None
    return dx, dw


def _grad_input_gradients(
    needed: tuple[bool, bool],
    ddx: Tensor,
    dy: Tensor,
    weight: Tensor,
    rest: tuple[Any, ...],
    noted: tuple[tuple[int, ...], bool],
) -> tuple[Tensor | None, Tensor | None]:
    *case, _size, dense_grad, dense = rest
    _, channels_last = noted
    ddx = _laid_out(ddx)
    of_dy = _conv2d_product(ddx, weight, None, *case, dense_grad, dense) if needed[0] else None
    of_weight = _grad_weight_product(dy, ddx, *case, channels_last, dense_grad) if needed[1] else None
    return of_dy, of_weight


def _grad_weight_gradients(
    needed: tuple[bool, bool],
    ddw: Tensor,
    dy: Tensor,
    x: Tensor,
    rest: tuple[Any, ...],
    size: tuple[int, ...],
) -> tuple[Tensor | None, Tensor | None]:
    # Where dW is masked, its gradient acts as a masked weight does.
    *case, _channels_last, dense = rest
    of_dy = _conv2d_product(x, ddw, None, *case, dense, dense) if needed[0] else None
    of_x = _grad_input_product(dy, ddw, *case, size, dense, dense) if needed[1] else None
    return of_dy, of_x


_conv2d_product = differentiable(_conv2d_op, _gradients, _size_and_memory, has_bias=True)
_grad_input_product = differentiable(_grad_input_op, _grad_input_gradients, _size_and_memory)
_grad_weight_product = differentiable(_grad_weight_op, _grad_weight_gradients, _size)


# ---- wrapper


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topology: BlockTopology,
    geometry: ConvGeometry,
    *,
    backend: str,
    dense_grad: bool = False,
    frozen: bool = False,
) -> Tensor:
    """2-D convolution, one group, that computes on the active blocks of its weight only.

    ``Y = conv2d(X, W * M) + bias`` with ``M`` the topology's mask, repeated over all taps: each pixel of ``Y`` is the
    sum over active blocks ``(o, c)`` and taps ``(k, l)`` of ``W[o, c, k, l] X[c, s i + d k - p, s j + d l - p]``, with
    stride ``s``, padding ``p`` and dilation ``d``. Its gradients skip the same blocks. Single weights may have a flag
    for each tap. Inactive blocks of ``W`` are ignored, whatever they hold. Under autocast floating-point operands are
    cast as ``torch.nn.functional.conv2d`` does. Derivatives of any order are products on active blocks as well, in
    reverse and in forward mode.

    Args:
        x: ``[N, in, H, W]`` in any memory format, ``N`` may be 0. Channels-last costs no copy.
        weight: ``(out, in, kh, kw)``, dense storage, any strides.
        bias: ``[out]`` or None.
        topology: Active blocks; ``topology.shape`` must be ``(out, in)``, or, for single weights (block size 1),
            ``(out, in * kh * kw)``: a flag for each element of ``weight.flatten(1)``.
        geometry: Kernel size, stride, padding, dilation.
        backend: Name of the backend, see `backends._protocol.backends`. It is used or refused, never replaced:
            :func:`conv_refusal` says which.
        dense_grad: Whether the weight's gradient is whole, to observe that of inactive blocks.
        frozen: Whether inactive weights keep acting: ``Y`` and ``dX`` are dense, and only ``dW`` is masked.

    Returns:
        ``[N, out, H', W']``, in the dtype of ``x`` (of autocast where it is on); in channels-last memory if ``x`` or
        ``weight`` is, else contiguous.

    Raises:
        TypeError: ``topology`` is no :class:`BlockTopology`, ``geometry`` no :class:`ConvGeometry`, or dtypes differ.
        ValueError: Shapes or devices do not fit, the backend is unknown, or it does not support the case.

    Example:
        >>> topology = BlockTopology.from_mask(torch.tensor([[True, False]]), block_size=8)
        >>> x, weight = torch.ones(1, 16, 5, 5), torch.ones(8, 16, 3, 3)
        >>> masked_conv2d(x, weight, None, topology, ConvGeometry((3, 3)), backend="reference")[0, 0, 0, 0].item()
        72.0
    """
    if not isinstance(topology, BlockTopology):
        raise TypeError(f"topology must be a BlockTopology, got {type(topology).__name__}")
    if not isinstance(geometry, ConvGeometry):
        raise TypeError(f"geometry must be a ConvGeometry, got {type(geometry).__name__}")
    expected: tuple[int, ...] = (*topology.shape, *geometry.kernel_size)
    if topology.block_size == 1 and (*weight.shape[:1], math.prod(weight.shape[1:])) == topology.shape:
        expected = (*weight.shape[:2], *geometry.kernel_size)  # a flag for each tap
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, but the topology and the geometry are for {expected}"
        )
    out, features = expected[:2]
    if x.dim() != 4 or x.shape[1] != features:
        raise ValueError(f"x must have shape [N, {features}, H, W], got {tuple(x.shape)}")
    if bias is not None and tuple(bias.shape) != (out,):
        raise ValueError(f"bias must have shape {(out,)}, got {tuple(bias.shape)}")
    if min(x.shape[2:]) < 1 or min(geometry.output_size(x.shape[2], x.shape[3])) < 1:
        raise ValueError(f"x of shape {tuple(x.shape)} is too small for {geometry}")
    x, weight, bias = prepared(x, weight, bias, topology)
    channels_last = _channels_last(x) or _channels_last(weight)
    y = _conv2d_product(
        _laid_out(x),
        weight,
        bias,
        *topology_arguments(topology),
        backend,
        geometry.kernel_size,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        dense_grad,
        frozen,
    )
    return y if channels_last else y.contiguous()
