"""`ExpertAdapter`: how modules of a class of one's own compute with parameters that stack experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LAYOUTS = ("eoi", "eio")


class ExpertProduct(Protocol):
    """What an adapter's forward is given: the product of each expert's matrix with its rows."""

    def __call__(self, name: str, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """Return the products with one stack.

        Args:
            name: Name of the parameter.
            x: ``(experts, rows, in)``, as many rows for each expert; or ``(rows, in)``, with `counts`.
            counts: int64 ``(experts,)``: how many rows of `x` each expert has, one after the other; rows that are left
                over give zero.

        Returns:
            ``(experts, rows, out)`` or ``(rows, out)``.

        Raises:
            ValueError: For another shape, or a parameter that the adapter does not name.

        """
        ...


@dataclass(frozen=True)
class ExpertAdapter:
    """How the modules of one class compute with parameters that stack experts, so that a sparse operator can do it.

    Register it by ``Selection(experts=[ExpertAdapter(...)])``. The parameters are then masked expert by expert, and
    once sparse products are chosen, `forward` takes the place of the module's own. In the first step it is run beside
    that, both in evaluation mode, and refused if it gives another output.

    Attributes:
        module: Class of the modules; not of subclasses, which may have a forward of their own.
        layouts: Layout of each stack by the parameter's name: ``"eoi"`` for ``(experts, out, in)``, ``"eio"`` for
            ``(experts, in, out)``.
        forward: Function ``(module, product, *args, **kwargs)`` that returns what the module's forward does, and asks
            `product` for the product with each stack: ``product(name, x)`` for `x` of shape ``(experts, rows, in)``, or
            ``product(name, x, counts)`` for ``(rows, in)``, rows sorted by expert. To be picklable, not a lambda.

    Raises:
        TypeError: If `module` is no class of modules, or `forward` no function.
        ValueError: For a layout that is none of these, or none at all.

    Example:
        >>> class Experts(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w = nn.Parameter(torch.randn(4, 16, 32))
        ...
        ...     def forward(self, x):
        ...         return torch.einsum("eni,eio->eno", x, self.w).relu()
        >>> def forward(module, product, x):
        ...     return product("w", x).relu()
        >>> ExpertAdapter(Experts, {"w": "eio"}, forward).layouts
        {'w': 'eio'}

    """

    module: type[nn.Module]
    layouts: Mapping[str, str]
    forward: Callable[..., Any]

    def __post_init__(self) -> None:
        if not isinstance(self.module, type) or not issubclass(self.module, nn.Module):
            raise TypeError(f"ExpertAdapter.module must be a class of nn.Module, got {self.module!r}")
        if not isinstance(self.layouts, Mapping) or not self.layouts:
            raise ValueError(f"ExpertAdapter.layouts must map names of parameters to layouts, got {self.layouts!r}")
        for name, layout in self.layouts.items():
            if layout not in _LAYOUTS:
                raise ValueError(
                    f"ExpertAdapter.layouts[{name!r}] must be 'eoi' for (experts, out, in) or 'eio' for "
                    f"(experts, in, out), got {layout!r}"
                )
        if not callable(self.forward):
            raise TypeError(f"ExpertAdapter.forward must be a function, got {self.forward!r}")

    def check(self, name: str, module: nn.Module, whole_shape: Callable[[str], tuple[int, ...]]) -> None:
        """Check that a module of the class has the parameters named here.

        Args:
            name: Name of the module in the model.
            module: The module.
            whole_shape: Function of a parameter's name that returns the shape of the whole parameter.

        Raises:
            ValueError: One is missing, or has not three dimensions.

        """
        for own in self.layouts:
            shape = None if module._parameters.get(own) is None else whole_shape(own)
            if shape is None or len(shape) != 3 or min(shape[1:]) < 2:
                raise ValueError(
                    f"the ExpertAdapter of {self.module.__name__} names the parameter {own!r}, which must have shape "
                    f"(experts, out, in) or (experts, in, out), got {f'shape {shape}' if shape else 'none'} in "
                    f"{name or 'the model'!r}"
                )


def flat_rows(name: str, x: Tensor, counts: Tensor | None, stored: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Return the rows ``(rows, in)`` of a product, expert after expert, and how many each expert has.

    Raises:
        ValueError: If shapes do not fit.

    """
    experts, inner = stored.shape[0], stored.shape[layout.index("i")]
    if counts is None:
        if x.dim() != 3 or (x.shape[0], x.shape[2]) != (experts, inner):
            raise ValueError(
                f"product({name!r}, x) takes x of shape ({experts}, rows, {inner}), got {tuple(x.shape)}; where every "
                f"expert has all rows, x.expand({experts}, -1, -1), and where they have some of them each, counts="
            )
        return x.reshape(-1, inner), torch.full((experts,), x.shape[1], dtype=torch.int64, device="cpu")
    if x.dim() != 2 or x.shape[1] != inner or counts.shape != (experts,):
        raise ValueError(
            f"product({name!r}, x, counts) takes x of shape (rows, {inner}) and counts of shape ({experts},), got "
            f"{tuple(x.shape)} and {tuple(counts.shape)}"
        )
    return x, counts


def dense_product(x: Tensor, counts: Tensor, stack: Tensor) -> Tensor:
    """Return the products of a stack ``(experts, out, in)`` with rows as `flat_rows` returns them, one by one."""
    sizes = counts.tolist()
    *parts, rest = x.split([*sizes, x.shape[0] - sum(sizes)])
    products = [F.linear(rows, matrix) for rows, matrix in zip(parts, stack.unbind(0), strict=True)]
    return torch.cat([*products, products[0].new_zeros(len(rest), stack.shape[1])])
