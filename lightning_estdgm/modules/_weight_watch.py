"""Watches of torch's functions for what becomes of weights in a forward; see `_audit`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Torch's functions by name, without underscores around it. Products take a weight; the next keep every zero of one, in
# any order, as views, casts, scalings and selections do; those by element keep them if they make 0 of 0, and have a
# finite slope there, unlike sqrt; the last yield statistics of it, or no more than its shape. What any other function
# makes of a weight is not followed.
_PRODUCTS = frozenset(
    (
        "linear",
        "bilinear",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "matmul",
        "rmatmul",
        "mm",
        "bmm",
        "addmm",
        "addbmm",
        "baddbmm",
        "einsum",
        "tensordot",
        "multi_head_attention_forward",
        "grouped_mm",
        "grouped_mm_fallback",
    )
)
_KEEP_ZEROS = frozenset(
    (
        "t",
        "transpose",
        "permute",
        "view",
        "reshape",
        "to",
        "type",
        "half",
        "float",
        "bfloat16",
        "double",
        "contiguous",
        "unsqueeze",
        "squeeze",
        "flatten",
        "unflatten",
        "expand",
        "detach",
        "clone",
        "getitem",
        "narrow",
        "chunk",
        "split",
        "unbind",
        "select",
        "index_select",
        "gather",
        "take_along_dim",
        "repeat_interleave",
        "cat",
        "stack",
        "movedim",
        "swapaxes",
        "expand_as",
        "reshape_as",
        "view_as",
        "type_as",
        "get",
        "cuda",
        "cpu",
        "mul",
        "rmul",
        "multiply",
        "neg",
        "abs",
        "square",
        "tril",
        "triu",
        "flip",
        "rot90",
        "roll",
        "pad",
        "zeros_like",
        "normalize",
        "dropout",
        "fake_quantize_per_tensor_affine",
        "fake_quantize_per_channel_affine",
        "fused_moving_avg_obs_fake_quant",
    )
)
_BY_ELEMENT = frozenset(
    (
        "relu",
        "relu6",
        "leaky_relu",
        "elu",
        "gelu",
        "silu",
        "hardtanh",
        "softshrink",
        "hardshrink",
        "tanh",
        "sin",
        "asinh",
        "erf",
        "sign",
        "round",
        "trunc",
        "floor",
        "ceil",
        "clamp",
        "clamp_min",
        "clamp_max",
        "clip",
        "nan_to_num",
    )
)
_DIVISIONS = frozenset(("div", "divide", "truediv"))
_WRITES = {"setitem": 2, "copy": 1, "set": 1}  # which of the operands is written into the first one
_STATISTICS = frozenset(
    (
        "norm",
        "linalg_norm",
        "linalg_vector_norm",
        "linalg_matrix_norm",
        "vector_norm",
        "matrix_norm",
        "sum",
        "mean",
        "std",
        "var",
        "std_mean",
        "var_mean",
        "amax",
        "amin",
        "aminmax",
        "isnan",
        "isfinite",
        "eq",
        "ne",
        "gt",
        "ge",
        "lt",
        "le",
        "empty_like",
        "ones_like",
        "full_like",
        "rand_like",
        "randn_like",
    )
)


class WeightWatch(TorchFunctionMode):
    """Watch of torch's functions for those that get one of some weights, or what was derived from it with its zeros."""

    def __init__(self, weights: Sequence[tuple[Any, ...]]) -> None:
        super().__init__()
        # What is known of the weight, or of those that `cat` and `stack` put together.
        self._found = {id(unwrapped(weight)): [tuple(rest)] for weight, *rest in weights}
        self._derived: list[Tensor] = []  # kept, so that ids stay theirs

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        met = {id(x): found for x in tensors_of((args, kwargs)) if (found := self._of(x)) is not None}
        result = func(*args, **kwargs)
        if not met:
            return result
        called = getattr(func, "__name__", str(func))
        name = called.strip("_")
        operands = (*args, *kwargs.values())
        writes = name == "setitem" or (getattr(func, "__self__", None) is Tensor.data and name == "set")
        if not (results := tensors_of(operands[0] if writes else result)):
            return result
        every = list({id(one): one for found in met.values() for one in found}.values())
        if name in _PRODUCTS:
            for found in met.values():
                self.product(results[0], found)
        elif self._keeps_zeros(name, operands) or _makes_0_of_0(name, func, args, kwargs):
            inner = list(map(unwrapped, results))
            self._derived += inner
            self._found |= dict.fromkeys(map(id, inner), every)
        elif not _is_statistic(name, operands):
            for one in every:
                self.other(called, *one)
        return result

    def _of(self, x: Any) -> list[tuple[Any, ...]] | None:
        return self._found.get(id(unwrapped(x)))

    def _keeps_zeros(self, name: str, operands: Sequence[Any]) -> bool:
        """Whether what a function yields is zero wherever the weight is that it takes."""
        if name in _DIVISIONS:
            return self._of(operands[0]) is not None
        if name == "pow":
            exponent = operands[1]
            return self._of(operands[0]) is not None and isinstance(exponent, (int, float)) and exponent >= 1
        if name in ("where", "masked_fill"):
            return all(self._is_followed_or_zero(x) for x in operands if getattr(x, "dtype", None) != torch.bool)
        if name in _WRITES:
            return self._is_followed_or_zero(operands[_WRITES[name]])
        return name in _KEEP_ZEROS

    def _is_followed_or_zero(self, x: Any) -> bool:
        return self._of(x) is not None or (isinstance(x, (int, float)) and x == 0)

    def product(self, result: Tensor, found: Sequence[Any]) -> None:
        """Note a product of a weight, or of several that were put together."""

    def other(self, name: str, *found: Any) -> None:
        """Note a function that does not keep the weight's zeros."""


class Changes(WeightWatch):
    """Watch of a layer's own forward: pairs of weight and record, where products and the first other function go."""

    def product(self, result: Tensor, found: Sequence[Any]) -> None:
        for (record,) in found:
            record.is_multiplied = True

    def other(self, name: str, *found: Any) -> None:
        (record,) = found
        record.changed_by = record.changed_by or f"{name}()"


class ProductCount(WeightWatch):
    """Watch of a parent's forward for products of its layers' weights, and of parameters used by themselves.

    Such are a tied head's, or a layer's whose forward is not called, also as functions of parameters alone yield them:
    ``F.normalize(weight)`` of a cosine head.

    Args:
        weights: triples of weight, record and number of outputs.
        own: ids of the weights of the layers whose forwards are under way, which changes; those are not by themselves.
        consume: function that is called with the operands of a product with a parameter used by itself.

    Attributes:
        records: records of the weights.

    """

    def __init__(
        self,
        weights: Sequence[tuple[Any, ...]],
        own: Collection[int],
        consume: Callable[[list[Tensor]], None],
    ) -> None:
        super().__init__(weights)
        self.records = [record for _, record, _ in weights]
        self._own, self._consume = own, consume
        self._made: dict[int, Tensor] = {}  # of parameters alone, by id

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operands = tensors_of((args, kwargs or {}))
        has_other = any(map(self._is_other, operands))
        is_product = getattr(func, "__name__", "") in _PRODUCTS
        if is_product and has_other:
            self._consume(operands)
        result = super().__torch_function__(func, types, args, kwargs)
        if not is_product and has_other and all(map(self._is_parameter, operands)):
            self._made |= {id(x): x for x in tensors_of(result) if takes_gradients(x)}
        return result

    def _is_parameter(self, x: Tensor) -> bool:
        return id(x) in self._made or (isinstance(x, nn.Parameter) and id(x) not in self._own)

    def _is_other(self, x: Tensor) -> bool:
        return self._is_parameter(x) and x.dim() > 1 and takes_gradients(x)

    def product(self, result: Tensor, found: Sequence[Any]) -> None:
        outputs = max(1, sum(outputs for _, outputs in found))
        for record, _ in found:
            record.used_by_itself = True
            record.used_by_parent += max(1, result.numel() // outputs)

    def other(self, name: str, *found: Any) -> None:
        record, _ = found
        record.used_by_itself = True


def _makes_0_of_0(name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function by element, with these settings, yields 0 for 0."""
    if name not in _BY_ELEMENT or any(isinstance(x, Tensor) for x in (*args[1:], *kwargs.values())):
        return False
    return bool(func(torch.zeros((), device="cpu"), *args[1:], **kwargs) == 0)


def _is_statistic(name: str, operands: Sequence[Any]) -> bool:
    if name in ("max", "min"):  # of two tensors they are what is larger, or smaller, at each place
        return not any(isinstance(x, Tensor) for x in operands[1:])
    return name in _STATISTICS


def unwrapped(x: Any) -> Any:
    """Return the tensor that transforms of torch.func have wrapped in others, or what is none of theirs as it is."""
    while isinstance(x, Tensor) and is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x


def takes_gradients(weight: Any) -> bool:
    return isinstance(weight, Tensor) and weight.requires_grad


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
