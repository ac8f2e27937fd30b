"""Derivatives of the sparse products, of any order: by autograd, and under the transforms of `torch.func`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LISTS = 4  # index lists of a topology, as an operator takes them


def differentiable(
    operator: Any,
    gradients: Callable[..., tuple[Tensor | None, Tensor | None]],
    note: Callable[[Tensor, Tensor], Any] = lambda a, b: None,
    *,
    has_bias: bool = False,
    lists: int = _LISTS,
) -> Callable[..., Tensor]:
    """Give an operator its derivatives, and return the product: what to call the operator by.

    A product ``P(a, b, rest)`` is linear in ``a`` and in ``b``. Its `gradients` are products again, so they have
    derivatives as well. A product that nobody differentiates, as those of an ordinary backward, saves nothing.

    Args:
        operator: Operator of `torch.library` of the arguments ``a``, ``b``, a bias if `has_bias`, then ``rest``:
            integer tensors, such as the index lists of a topology, and plain values.
        gradients: Function of which of ``a`` and ``b`` need a gradient, the output's gradient, ``a`` (or None, if ``b``
            needs none), ``b`` (or None, if ``a`` needs none), ``rest``, and what was noted. It returns the two
            gradients, None where not needed.
        note: Function of ``a`` and ``b`` whose value `gradients` is given, where it needs more of them than numbers.
        has_bias: Whether the third argument, unless None, is added along the output's second dimension.
        lists: Number of the integer tensors.

    Returns:
        Function of the operator's arguments. Under transforms, which do not take `register_autograd`, and in forward
        mode it is a function of autograd's instead of the operator itself.

    """

    operands = 3 if has_bias else 2
    split = operands + lists

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b = inputs[:2]
        need_a, need_b = ctx.needs_input_grad[:2]
        ctx.save_for_backward(a if need_b else None, b if need_a else None, *inputs[operands:split])
        ctx.plain, ctx.noted = inputs[split:], note(a, b)

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        a, b, *lists = ctx.saved_tensors
        da, db = gradients(ctx.needs_input_grad[:2], dy, a, b, (*lists, *ctx.plain), ctx.noted)
        dbias = None
        if has_bias and ctx.needs_input_grad[2]:
            dbias = dy.sum([dim for dim in range(dy.dim()) if dim != 1])
        return da, db, dbias, *[None] * (len(ctx.needs_input_grad) - 3)

    operator.register_autograd(backward, setup_context=setup_context)

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Tensor:
            *tensors, plain = args
            y: Tensor = operator(*tensors, *plain.values)
            return y

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            *tensors, plain = inputs
            kept = (*tensors[:2], *tensors[operands:])
            ctx.save_for_backward(*kept)
            ctx.save_for_forward(*kept)
            ctx.plain, ctx.noted = plain.values, note(*tensors[:2])

        @staticmethod
        def jvp(ctx: Any, da: Tensor, db: Tensor, *tangents: Tensor | None) -> Tensor:
            a, b, *lists = ctx.saved_tensors
            rest = (*lists, *ctx.plain)
            if not has_bias:
                return product(da, b, *rest) + product(a, db, *rest)
            return product(da, b, tangents[0], *rest) + product(a, db, None, *rest)

    Transformed.backward = staticmethod(backward)  # type: ignore[method-assign]

    def product(*args: Any) -> Tensor:
        if not is_transforming():
            y: Tensor = operator(*args)
            return y
        transformed: Any = Transformed.apply
        return cast("Tensor", transformed(*args[:split], _Plain(args[split:])))

    return product


def matrix_products(
    forward: Any, grad_input: Any, grad_weight: Any, *, has_bias: bool = False, before: int = 0
) -> Callable[..., Tensor]:
    """Give the three operators of a product with one matrix or a stack of them their derivatives; return the product.

    The gradients of each are the other two.

    Args:
        forward: Operator ``Y`` of the rows, the weight ``(..., out, in)``, a bias if `has_bias`, integer tensors, a
            topology's lists and sides, a backend, and of whether dW is whole and the others are dense.
        grad_input: Operator ``dX`` of dY, the weight, and the same without a bias.
        grad_weight: Operator ``dW`` of dY, the rows, and the same without the last flag.
        has_bias: Whether `forward` takes a bias, or None for it.
        before: Number of integer tensors before the lists.
    """
    no_bias = (None,) if has_bias else ()
    lists = before + _LISTS

    def is_transposed(rows: Tensor, weight: Tensor) -> bool:
        # The gradient of a transposed view is computed transposed: it reaches the parameter without a copy.
        return weight.stride(-2) == 1 and weight.stride(-1) != 1

    def of_weight(dy: Tensor, x: Tensor, topology: Sequence[Any], transposed: bool, dense: bool) -> Tensor:
        if not transposed:
            return dw_product(dy, x, *topology, dense)
        *first, row_ptr, col_idx, col_ptr, row_idx, sides, backend = topology
        swapped = (col_ptr, row_idx, row_ptr, col_idx, sides[::-1], backend)
        return dw_product(x, dy, *first, *swapped, dense).transpose(-2, -1)

    def gradients(
        needed: tuple[bool, bool], dy: Tensor, x: Tensor, weight: Tensor, rest: tuple[Any, ...], transposed: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        *topology, dense_grad, frozen = rest
        dx = dx_product(dy, weight, *topology, dense_grad, frozen) if needed[0] else None
        dw = of_weight(dy, x, topology, transposed, dense_grad) if needed[1] else None
        return dx, dw

    def dx_gradients(
        needed: tuple[bool, bool], ddx: Tensor, dy: Tensor, weight: Tensor, rest: tuple[Any, ...], transposed: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        *topology, dense_grad, dense = rest
        of_dy = product(ddx, weight, *no_bias, *topology, dense_grad, dense) if needed[0] else None
        return of_dy, of_weight(dy, ddx, topology, transposed, dense_grad) if needed[1] else None

    def dw_gradients(
        needed: tuple[bool, bool], ddw: Tensor, dy: Tensor, x: Tensor, rest: tuple[Any, ...], _: None
    ) -> tuple[Tensor | None, Tensor | None]:
        # Where dW is masked, its gradient acts as a masked weight does.
        *topology, dense = rest
        of_dy = product(x, ddw, *no_bias, *topology, dense, dense) if needed[0] else None
        return of_dy, dx_product(dy, ddw, *topology, dense, dense) if needed[1] else None

    product = differentiable(forward, gradients, is_transposed, has_bias=has_bias, lists=lists)
    dx_product = differentiable(grad_input, dx_gradients, is_transposed, lists=lists)
    dw_product = differentiable(grad_weight, dw_gradients, lists=lists)
    return product


@dataclass(frozen=True)
class _Plain:
    """Arguments of an operator that are no tensors: in one, since transforms look into tuples and find no tensor."""

    values: tuple[Any, ...]


def is_transforming() -> bool:
    """Whether a transform of `torch.func` or forward mode is on."""
    if torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0
