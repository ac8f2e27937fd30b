"""Probes: the gradient of a whole weight where only its active units are stored and computed with.

A probe is a weight of zeros, in the memory of one number, that is added to the stored one. So autograd itself says what
the gradient of the whole weight is: in the backwards that reach parameters and no others, of any order, and for all
uses of the weight together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_estdgm.sparse._derivatives import is_transforming


def probe(like: Tensor, shape: tuple[int, ...], see: Callable[[Tensor], None]) -> Tensor:
    """Return a probe: a leaf, whose gradients autograd computes as soon as it computes a parameter's.

    Args:
        like: tensor with the dtype and device of the weight.
        shape: shape of the weight.
        see: function that is given the weight's gradient, once in each backward that accumulates gradients.

    """

    def pass_on(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        see(gradient)

    with torch.inference_mode(False):
        leaf = torch.zeros((), dtype=like.dtype, device=like.device).expand(shape).requires_grad_()
    leaf.register_post_accumulate_grad_hook(pass_on)
    return leaf


def with_probe(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return the sum of `y` and the product of `x` with a probe, which is computed only if it has to be.

    Args:
        y: ``[..., out]``.
        x: ``[..., in]``.
        weight: probe ``(out, in)``.

    """
    if torch.compiler.is_compiling() or is_transforming():
        return y + F.linear(x, weight).to(y.dtype)
    return cast("Tensor", _WithProduct.apply(y, x, weight))


class _WithProduct(torch.autograd.Function):
    """``y + x 0^T``, where the zeros are a weight."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        (dy,) = gradients
        x, weight = ctx.saved_tensors
        dx = None
        if torch.is_grad_enabled() and ctx.needs_input_grad[1]:  # to be differentiated by the weight
            dx = with_probe(torch.zeros_like(x), dy, weight.t())
        if not ctx.needs_input_grad[2]:
            return dy, dx, None
        rows = dy.reshape(-1, dy.shape[-1])  # of a vector, one
        return dy, dx, rows.t() @ x.reshape(-1, x.shape[-1]).to(dy.dtype)
