"""`packed_linear`: a linear layer whose weight is stored as its active units alone, as operators of `torch.library`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_estdgm.sparse._derivatives import differentiable
from lightning_estdgm.sparse._flop_formulas import DENSE_BACKENDS, counts_multiplications
from lightning_estdgm.sparse._operands import TOPOLOGY_SCHEMA, as_given, prepared, topology_arguments, topology_of
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends._protocol import Backend, PackedBackend, get_backend, supporting

# ---- values and the weight that they stand for


def _grid(weight: Tensor, topology: BlockTopology) -> Tensor:
    """View of a weight ``(out, in)`` as its units ``[R, C, rows, columns]``."""
    rows, columns = topology.sides
    grid = weight.unflatten(1, (topology.block_cols, columns)).unflatten(0, (topology.block_rows, rows))
    return grid.transpose(1, 2)


def _places(topology: BlockTopology, units: int) -> tuple[Tensor, Tensor]:
    """Unit row and unit column of each of the active units, in their order."""
    numbers = torch.arange(topology.block_rows, device=topology.device)
    rows = numbers.repeat_interleave(topology.row_ptr.diff().long(), output_size=units)
    return rows, topology.col_idx[:units].long()


def expand(values: Tensor, topology: BlockTopology, order: Tensor | None = None, fill: float = 0.0) -> Tensor:
    """Return the weight ``(out, in)`` of which these are the active units, `fill` elsewhere. Differentiable.

    Args:
        values: ``[units, rows, columns]``.
        topology: Where the units are.
        order: Place among `values` of each unit of the topology's row-major lists, int32 ``[units]``; None: they are in
            the order of these lists.
        fill: Value of inactive weights.

    Raises:
        ValueError: The shape of `values` is another.

    Example:
        >>> topology = BlockTopology.from_mask(torch.tensor([[True, False]]), block_size=2)
        >>> expand(torch.ones(1, 2, 2), topology).tolist()
        [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    """
    check_values(values, topology)
    _check_units(values.shape[0], topology)
    return _expand(values, topology, order, fill)


def _expand(values: Tensor, topology: BlockTopology, order: Tensor | None, fill: float = 0.0) -> Tensor:
    weight = values.new_full(topology.shape, fill)
    in_order = values if order is None else values.index_select(0, order)
    _grid(weight, topology).index_put_(_places(topology, values.shape[0]), in_order)
    return weight


def gather(weight: Tensor, topology: BlockTopology, order: Tensor | None = None) -> Tensor:
    """Return the active units of a weight, ``[units, rows, columns]``: the inverse of :func:`expand`. Differentiable.

    Args:
        weight: ``(out, in)``, any strides.
        topology: Where the units are.
        order: Place of each unit of the topology's row-major lists in what is returned, int32 ``[units]``; None: they
            come in the order of these lists.

    Raises:
        ValueError: `weight` has another shape than the topology's.

    Example:
        >>> topology = BlockTopology.from_mask(torch.tensor([[False, True]]), block_size=1)
        >>> gather(torch.tensor([[3.0, 4.0]]), topology).tolist()
        [[[4.0]]]
    """
    if tuple(weight.shape) != topology.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, but the topology is for {topology.shape}")
    return _gather(weight, topology, order, topology.nnz)


def _gather(weight: Tensor, topology: BlockTopology, order: Tensor | None, units: int) -> Tensor:
    values = _grid(weight, topology)[_places(topology, units)]
    return values if order is None else torch.empty_like(values).index_copy(0, order.long(), values)


def check_values(values: Tensor, topology: BlockTopology) -> None:
    """Raise ValueError unless these can be values of the topology's units; their number is not asked for."""
    if values.dim() != 3 or tuple(values.shape[1:]) != topology.sides:
        rows, columns = topology.sides
        raise ValueError(f"values must be of shape [units, {rows}, {columns}], got {list(values.shape)}")


def _check_units(units: int, topology: BlockTopology) -> None:
    if units != topology.nnz:
        raise ValueError(f"values are of {units} units, but {topology.nnz} are active: gather() makes them anew")


# ---- products


class _Dense:
    """The dense library as a backend: of a weight that is 0 in inactive units."""

    def linear(self, x2d: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology) -> Tensor:
        return F.linear(x2d, weight, bias)

    def grad_input(self, dy2d: Tensor, weight: Tensor, topology: BlockTopology) -> Tensor:
        return dy2d @ weight

    def grad_weight(self, dy2d: Tensor, x2d: Tensor, topology: BlockTopology) -> Tensor:
        return dy2d.t() @ x2d


class _Expanded:
    """Products of a backend that takes a whole weight only: it exists for as long as one product takes."""

    def __init__(self, whole: Backend | _Dense) -> None:
        self._whole = whole
        self.is_dense = isinstance(whole, _Dense)

    def packed_linear(
        self, x2d: Tensor, values: Tensor, bias: Tensor | None, order: Tensor | None, topology: BlockTopology
    ) -> Tensor:
        return self._whole.linear(x2d, _expand(values, topology, order), bias, topology)

    def packed_grad_input(self, dy2d: Tensor, values: Tensor, order: Tensor | None, topology: BlockTopology) -> Tensor:
        return self._whole.grad_input(dy2d, _expand(values, topology, order), topology)

    def packed_grad_values(
        self, dy2d: Tensor, x2d: Tensor, order: Tensor | None, topology: BlockTopology, units: int
    ) -> Tensor:
        return _gather(self._whole.grad_weight(dy2d, x2d, topology), topology, order, units)


def _products(name: str, x: Tensor, topology: BlockTopology) -> PackedBackend | _Expanded:
    if name == "auto":
        native = get_backend("native").unsupported(x.device, x.dtype, topology) is None
        name = "native" if native else "dense"
    if name == "dense":
        return _Expanded(_Dense())
    backend = supporting(name, x.device, x.dtype, topology)
    return backend if isinstance(backend, PackedBackend) else _Expanded(backend)


# ---- operators: nobody else calls them


def _linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    row_ptr: Tensor,
    col_idx: Tensor,
    col_ptr: Tensor,
    row_idx: Tensor,
    sides: list[int],
    backend: str,
) -> Tensor:
    topology = topology_of(row_ptr, col_idx, col_ptr, row_idx, sides)
    if x.device.type == "cpu":  # elsewhere it would wait for the device
        _check_units(values.shape[0], topology)
    with as_given(x):
        return _products(backend, x, topology).packed_linear(x, values, bias, order, topology)


def _grad_input(
    dy: Tensor,
    values: Tensor,
    order: Tensor | None,
    row_ptr: Tensor,
    col_idx: Tensor,
    col_ptr: Tensor,
    row_idx: Tensor,
    sides: list[int],
    backend: str,
) -> Tensor:
    topology = topology_of(row_ptr, col_idx, col_ptr, row_idx, sides)
    with as_given(dy):
        return _products(backend, dy, topology).packed_grad_input(dy, values, order, topology)


def _grad_values(
    dy: Tensor,
    x: Tensor,
    order: Tensor | None,
    row_ptr: Tensor,
    col_idx: Tensor,
    col_ptr: Tensor,
    row_idx: Tensor,
    sides: list[int],
    backend: str,
    units: int,
) -> Tensor:
    topology = topology_of(row_ptr, col_idx, col_ptr, row_idx, sides)
    with as_given(dy):
        return _products(backend, dy, topology).packed_grad_values(dy, x, order, topology, units)


_linear_op = torch.library.custom_op(
    "estdgm::packed_values_linear",
    _linear,
    mutates_args=(),
    schema=f"(Tensor x, Tensor values, Tensor? bias, Tensor? order, {TOPOLOGY_SCHEMA}) -> Tensor",
)
_grad_input_op = torch.library.custom_op(
    "estdgm::packed_values_linear_grad_input",
    _grad_input,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor values, Tensor? order, {TOPOLOGY_SCHEMA}) -> Tensor",
)
_grad_values_op = torch.library.custom_op(
    "estdgm::packed_values_linear_grad_values",
    _grad_values,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, Tensor? order, {TOPOLOGY_SCHEMA}, SymInt units) -> Tensor",
)


@_linear_op.register_fake
def _(x: Tensor, values: Tensor, bias: Tensor | None, order: Tensor | None, row_ptr: Tensor, *rest: Any) -> Tensor:
    *_, sides, _ = rest
    return x.new_empty(x.shape[0], (row_ptr.shape[0] - 1) * sides[0])


@_grad_input_op.register_fake
def _(
    dy: Tensor,
    values: Tensor,
    order: Tensor | None,
    row_ptr: Tensor,
    col_idx: Tensor,
    col_ptr: Tensor,
    *rest: Any,
) -> Tensor:
    *_, sides, _ = rest
    return dy.new_empty(dy.shape[0], (col_ptr.shape[0] - 1) * sides[1])


@_grad_values_op.register_fake
def _(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
    *_, sides, _, units = rest
    return dy.new_empty(units, *sides)


@counts_multiplications("packed_values_linear")
def _(x: Tensor, values: Tensor, bias: Tensor | None, order: Tensor | None, *lists: Any, **_: Any) -> int:
    return _multiplications(x, values.numel(), lists)


@counts_multiplications("packed_values_linear_grad_input")
def _(dy: Tensor, values: Tensor, order: Tensor | None, *lists: Any, **_: Any) -> int:
    return _multiplications(dy, values.numel(), lists)


@counts_multiplications("packed_values_linear_grad_values")
def _(dy: Tensor, x: Tensor, order: Tensor | None, *others: Any, **_: Any) -> int:
    *lists, units = others
    return _multiplications(dy, units * math.prod(lists[-2]), lists)


def _multiplications(rows: Tensor, active: int, lists: Sequence[Any]) -> int:
    """Return the multiplications of a product of rows with active elements; `lists` are those of the topology."""
    *of_topology, backend = lists
    topology = topology_of(*of_topology)
    products = _products(backend, rows, topology)
    is_dense = backend in DENSE_BACKENDS or (isinstance(products, _Expanded) and products.is_dense)
    return rows.shape[0] * (math.prod(topology.shape) if is_dense else active)


# ---- derivatives: those of each product are the other two

_Gradients = tuple[Tensor | None, Tensor | None]
_LISTS = 5  # the order of units, and the index lists of a topology


def _number_of_units(_: Tensor, values: Tensor) -> int:
    return values.shape[0]


def _of_linear(
    needed: tuple[bool, bool], dy: Tensor, x: Tensor, values: Tensor, rest: tuple[Any, ...], units: int
) -> _Gradients:
    dx = _grad_input_product(dy, values, *rest) if needed[0] else None
    return dx, _grad_values_product(dy, x, *rest, units) if needed[1] else None


def _of_grad_input(
    needed: tuple[bool, bool], ddx: Tensor, dy: Tensor, values: Tensor, rest: tuple[Any, ...], units: int
) -> _Gradients:
    of_dy = _linear_product(ddx, values, None, *rest) if needed[0] else None
    return of_dy, _grad_values_product(dy, ddx, *rest, units) if needed[1] else None


def _of_grad_values(
    needed: tuple[bool, bool], dvalues: Tensor, dy: Tensor, x: Tensor, rest: tuple[Any, ...], _: None
) -> _Gradients:
    *rest_, _units = rest
    of_dy = _linear_product(x, dvalues, None, *rest_) if needed[0] else None
    return of_dy, _grad_input_product(dy, dvalues, *rest_) if needed[1] else None


_linear_product = differentiable(_linear_op, _of_linear, _number_of_units, has_bias=True, lists=_LISTS)
_grad_input_product = differentiable(_grad_input_op, _of_grad_input, _number_of_units, lists=_LISTS)
_grad_values_product = differentiable(_grad_values_op, _of_grad_values, lists=_LISTS)


# ---- wrapper


def packed_linear(
    inputs: Tensor,
    values: Tensor,
    topology: BlockTopology,
    bias: Tensor | None = None,
    backend: str | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Linear layer whose weight is stored as its active units alone.

    ``Y = X W^T + bias``, ``dX = dY W`` and ``dvalues`` = the active units of ``dY^T X``, with ``W`` = ``expand(values,
    topology)``, which is never made by a backend that has products of packed values (`native`). Others expand the one
    layer for as long as a product takes. Under autocast floating-point operands are cast as
    ``torch.nn.functional.linear`` does. Derivatives of any order, in reverse and in forward mode, are such products as
    well.

    Args:
        inputs: ``[..., in]``, any number of leading dimensions, zero tokens included.
        values: ``[units, rows, columns]``, the active units; single weights are ``[units, 1, 1]``.
        topology: Active units of ``(out, in)``, `units` in number.
        bias: ``[out]`` or None.
        backend: Name of a backend, or ``"dense"``: used or refused, never replaced. None: `native` where it supports
            the case, else ``"dense"``.
        order: Place among `values` of each unit of the topology's row-major lists, int32 ``[units]``; None: they are in
            the order of these lists. Sums are in the order of the lists in either case.

    Returns:
        ``[..., out]``, in the dtype of `inputs` (of autocast where it is on).

    Raises:
        TypeError: ``topology`` is no :class:`BlockTopology`, or dtypes differ.
        ValueError: Shapes, numbers of units or devices do not fit, the backend is unknown, or it does not support the
            case.

    Example:
        >>> topology = BlockTopology.from_mask(torch.tensor([[True, False]]), block_size=8)
        >>> packed_linear(torch.ones(3, 16), torch.ones(1, 8, 8), topology)[0, 0].item()
        8.0
    """
    if not isinstance(topology, BlockTopology):
        raise TypeError(f"topology must be a BlockTopology, got {type(topology).__name__}")
    check_values(values, topology)
    out, features = topology.shape
    if inputs.dim() < 1 or inputs.shape[-1] != features:
        raise ValueError(f"inputs must have {features} features in their last dimension, got {tuple(inputs.shape)}")
    if bias is not None and tuple(bias.shape) != (out,):
        raise ValueError(f"bias must have shape {(out,)}, got {tuple(bias.shape)}")
    if order is not None and (order.dtype != torch.int32 or order.shape != values.shape[:1]):
        raise ValueError(f"order must be int32 of shape [{values.shape[0]}], got {order.dtype} {list(order.shape)}")
    x, values, bias = prepared(inputs, values, bias, topology)
    name = "auto" if backend is None else backend
    y = _linear_product(x.reshape(-1, features), values, bias, order, *topology_arguments(topology), name)
    return y.reshape(*x.shape[:-1], out)
