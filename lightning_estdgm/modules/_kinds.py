"""Kinds of layers whose weight can be masked, and how a module's class tells its kind.

A kind is picklable, as a module under way is that holds a probe of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_estdgm.modules._forward_watch import replaced_forward
from lightning_estdgm.modules._weight_watch import tensors_of
from lightning_estdgm.sparse._conv_geometry import ConvGeometry


@dataclass(frozen=True)
class LayerKind:
    """Kind of layer whose weight can be masked.

    Attributes:
        name: Name as shown to the user.
        matches: Test of whether a module is of this kind.
        positions: Count of the positions (tokens, pixels) that a forward applies the weight to, from the module, its
            inputs, those passed by name included, and its output; raises where these do not show it.
        why_dense: Reason why no sparse operator can replace the forward of a module's class, such as a subclass's own;
            empty where one can.
        weight_name: Name of the parameter that is masked.
        transposed: Whether the weight is stored ``(in, out)``.
        experts: Number of matrices that the parameter stacks in a first dimension of its own; 0: it is one matrix.
        parts: Number of equal parts that each have a budget of their own, along the rows of the stacked matrices.
        inputs_last: Whether the columns of a stacked matrix are known to be its inputs; patterns lie along them.
        forward: Forward of a module that stacks experts, by `ExpertProduct`; ``None``: it has no operator.
        layouts: Layout of each stack that this forward asks for, ``"eoi"`` or ``"eio"``, by the parameter's name.
        is_adapted: Whether that forward is a user's `ExpertAdapter`, which is to be checked.
        dense_form: How a module computes its experts by itself, as of `ExpertCase`; empty where only its first forward
            shows it, or nothing does.

    """

    name: str
    matches: Callable[[nn.Module], bool]
    positions: Callable[[Any, tuple[Any, ...], Any], int]
    why_dense: Callable[[Any], str]
    weight_name: str = "weight"
    transposed: bool = False
    experts: int = 0
    parts: int = 1
    inputs_last: bool = True
    forward: Callable[..., Any] | None = None
    layouts: Mapping[str, str] = field(default_factory=dict)
    is_adapted: bool = False
    dense_form: Callable[[Any], str] = lambda module: ""

    def why_no_operator(self, module: nn.Module) -> str:
        """Return the reason why no sparse operator can replace a module's forward; empty where one can."""
        if replaced_forward(module) is not None:  # which goes before that of any class
            return "no sparse operator for a forward that is set on the module itself"
        return self.why_dense(module)


def own_class(module: nn.Module) -> type:
    """Return a module's class, or the one that it had before ``fully_shard`` put its own over it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return type(module)
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, fsdp.FSDPModule))


def is_computed(module: Any, name: str) -> bool:
    """Whether a parameter is computed by now: by a parametrization, or by torch's older ``weight_norm``."""
    return name in module._modules.get("parametrizations", ()) or f"{name}_v" in module._parameters


def _is_a(cls: type | tuple[type, ...], module: nn.Module) -> bool:
    return isinstance(module, cls)


def _is_named(root: str, name: str, module: nn.Module) -> bool:
    """Recognise a class of a library that need not be installed."""
    cls = own_class(module)
    return cls.__name__ == name and cls.__module__.partition(".")[0] == root


def _is_fused_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None


def activations(tree: Any) -> list[Tensor]:
    """Return the tensors of a forward's inputs or output that can be activations: not indices, not a loss."""
    return [x for x in tensors_of(tree) if (x.is_floating_point() or x.is_complex()) and x.dim() > 0]


def tokens(module: Any, inputs: tuple[Any, ...], output: Any) -> int:
    """Return the number of rows of the output, or of the input where the output has none."""
    rows = activations((output, inputs))[0]
    return rows.numel() // rows.size(-1)  # of a nested tensor, too, which has no shape


def _pixels(module: Any, inputs: tuple[Any, ...], output: Any) -> int:
    images = activations(output)
    return images[0].numel() // module.out_channels if images else _input_pixels(module, inputs, output)


def _input_pixels(module: Any, inputs: tuple[Any, ...], output: Any) -> int:
    return activations(inputs)[0].numel() // module.in_channels


def _no_operator(module: nn.Module) -> str:
    return f"no sparse operator for {own_class(module).__name__}"


def _no_operator_for(what: str, module: nn.Module) -> str:
    return f"no sparse operator for {what}"


def _has_operator(module: nn.Module) -> str:
    return ""


def foreign_method(module: nn.Module) -> str:
    """Return the name of a method that computes a linear layer or convolution and is not torch's; empty if none is.

    Patches of ``nn.Linear.forward`` are such, and of ``_conv_forward``, on the class or on a module. Of a ``forward``
    that is set on a module `replaced_forward` tells.
    """
    cls: Any = own_class(module)
    if cls.forward not in _TORCHS_FORWARDS:
        return "forward"
    is_own = "_conv_forward" not in vars(module) and getattr(cls, "_conv_forward", None) in _TORCHS_CONV_FORWARDS
    return "" if is_own else "_conv_forward"


def _why_foreign(module: nn.Module) -> str:
    name = foreign_method(module)
    return name and f"no sparse operator for a {name} that is not torch's"


def _why_linear_is_dense(module: nn.Module) -> str:
    return _why_foreign(module) if own_class(module) is nn.Linear else _no_operator(module)


def _why_convolution_is_dense(module: Any) -> str:
    if module.groups > 1:
        return "grouped convolution: no sparse operator"
    if own_class(module) not in (nn.Conv1d, nn.Conv2d):
        return _no_operator(module)
    if module.padding_mode != "zeros":
        return f"no sparse operator for padding_mode={module.padding_mode!r}"
    if conv_geometry(module) is None:
        return f"no sparse operator for padding='same' with a kernel of {'x'.join(map(str, module.kernel_size))}"
    return _why_foreign(module)


def conv_geometry(module: nn.Conv1d | nn.Conv2d) -> ConvGeometry | None:
    """Return the geometry of a convolution, a 1-D one as of height 1.

    ``None`` where ``padding="same"`` asks for unequal sides (an even kernel at odd dilation).
    """
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    spread = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    padding: tuple[int, ...]
    if module.padding == "same":
        if any(total % 2 for total in spread):
            return None
        padding = tuple(total // 2 for total in spread)
    else:
        padding = (0,) * len(kernel) if isinstance(module.padding, str) else tuple(module.padding)
    if len(kernel) == 1:
        return ConvGeometry((1, kernel[0]), (1, stride[0]), (0, padding[0]), (1, dilation[0]))
    return ConvGeometry(
        (kernel[0], kernel[1]), (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1])
    )


def as_images(module: Any, x: Tensor) -> Tensor:
    """View the input or output of a 1-D or 2-D convolution, batched or not, as ``[N, channels, H, W]``."""
    spatial = module.weight.dim() - 2
    x = x if x.dim() == spatial + 2 else x.unsqueeze(0)
    return x if spatial == 2 else x.unsqueeze(2)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# As torch has them when this package is imported.
_TORCHS_FORWARDS = frozenset(cls.forward for cls in (nn.Linear, *CONVOLUTIONS))
_TORCHS_CONV_FORWARDS = frozenset((None, *(cls._conv_forward for cls in CONVOLUTIONS)))  # a linear layer has none

LAYER_KINDS: tuple[LayerKind, ...] = (
    LayerKind("linear", partial(_is_a, nn.Linear), tokens, _why_linear_is_dense),
    LayerKind("convolution", partial(_is_a, CONVOLUTIONS), _pixels, _why_convolution_is_dense),
    LayerKind(
        "transposed convolution",
        partial(_is_a, _TRANSPOSED_CONVOLUTIONS),
        _input_pixels,
        partial(_no_operator_for, "transposed convolutions"),
    ),
    LayerKind(
        "attention projection",
        _is_fused_attention,
        tokens,
        partial(_no_operator_for, "attention projections"),
        weight_name="in_proj_weight",
    ),
    LayerKind(
        "Hugging Face Conv1D",
        partial(_is_named, "transformers", "Conv1D"),
        tokens,
        _has_operator,
        transposed=True,
    ),
    LayerKind("PyG linear", partial(_is_named, "torch_geometric", "Linear"), tokens, _has_operator),
)
"""Kinds of maskable layers, the first match wins."""
