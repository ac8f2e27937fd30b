"""Watches of torch's functions for what becomes of weights in a forward; see `_audit`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Torch's functions by name. Products take a weight; the next keep every zero of one, in any order, as views, casts,
# scalings and selections do; the last yield statistics of it. What any other function makes of a weight is not the
# weight as it is stored.
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
        "__matmul__",
        "__rmatmul__",
        "mm",
        "bmm",
        "addmm",
        "addbmm",
        "baddbmm",
        "einsum",
        "tensordot",
        "multi_head_attention_forward",
        "_grouped_mm",
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
        "__getitem__",
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
        "__get__",
        "cuda",
        "cpu",
        "mul",
        "__mul__",
        "__rmul__",
        "multiply",
        "div",
        "__truediv__",
        "divide",
        "neg",
        "__neg__",
        "dropout",
        "fake_quantize_per_tensor_affine",
        "fake_quantize_per_channel_affine",
        "fused_moving_avg_obs_fake_quant",
    )
)
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
        "max",
        "min",
        "abs",
        "square",
        "pow",
        "__pow__",
        "isnan",
        "isfinite",
    )
)


class WeightWatch(TorchFunctionMode):
    """Watch of torch's functions for those that get one of some weights, or what was derived from it with its zeros."""

    def __init__(self, weights: Sequence[tuple[Any, ...]]) -> None:
        super().__init__()
        # What is known of the weight, or of those that `cat` and `stack` put together.
        self._found = {id(weight): [tuple(rest)] for weight, *rest in weights}
        self._derived: list[Tensor] = []  # kept, so that ids stay theirs

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        met = {id(x): found for x in tensors_of((args, kwargs)) if (found := self._found.get(id(x))) is not None}
        result = func(*args, **kwargs)
        if not met or not (results := tensors_of(result)):
            return result
        name = getattr(func, "__name__", str(func))
        every = list({id(one): one for found in met.values() for one in found}.values())
        if name in _PRODUCTS:
            for found in met.values():
                self.product(results[0], found)
        elif name in _KEEP_ZEROS:
            self._derived += results
            self._found |= dict.fromkeys(map(id, results), every)
        elif name not in _STATISTICS:
            for one in every:
                self.other(name, *one)
        return result

    def product(self, result: Tensor, found: Sequence[Any]) -> None:
        """Note a product of a weight, or of several that were put together."""

    def other(self, name: str, *found: Any) -> None:
        """Note a function that does not keep the weight's zeros."""


class Changes(WeightWatch):
    """Watch of a layer's own forward: pairs of weight and record, where the first function that is no product goes."""

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

    """

    def __init__(
        self,
        weights: Sequence[tuple[Any, ...]],
        own: Collection[int],
        consume: Callable[[list[Tensor]], None],
    ) -> None:
        super().__init__(weights)
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
            record.used_by_parent += max(1, result.numel() // outputs)


def takes_gradients(weight: Any) -> bool:
    return isinstance(weight, Tensor) and weight.requires_grad


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
