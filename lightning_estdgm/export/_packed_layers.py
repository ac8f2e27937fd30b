"""Layers for inference that hold their active weights only, in the order of use."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse._packed_weight import PackedWeight
from lightning_estdgm.sparse.backends.native._operator import operator_library

_OPTIONAL = ("outputs", "ends", "scale", "bias")
_OPERANDS = ("values", "ptr", "idx", *_OPTIONAL)  # in the operator's order


class _PackedLayer(nn.Module):
    """A packed weight and a bias, as buffers."""

    values: Tensor
    ptr: Tensor
    idx: Tensor
    outputs: Tensor | None
    ends: Tensor | None
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        operator_library()
        self.out_features, self.in_features = weight.shape
        self.sides = list(weight.sides)
        bias = None if bias is None else bias.detach().to(device="cpu", dtype=torch.float32) + 0.0
        tensors: dict[str, Tensor | None] = {**dict.fromkeys(_OPTIONAL), **weight.tensors, "bias": bias}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        operator_library()

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                "a packed layer has no weight to read: the model's forward has to call the layer itself, or to keep "
                "this weight in a parameter of its own"
            )
        return super().__getattr__(name)

    def multiply(self, x: Tensor) -> Tensor:
        """Return ``x W^T + bias``, ``[..., in] -> [..., out]``, in x's dtype; it is computed in float32."""
        is_float = x.dtype is torch.float32
        held = self._buffers  # attributes take longer: a module looks for them in three dicts
        y: Tensor = torch.ops.estdgm.packed_linear.default(
            x if is_float else x.to(torch.float32),
            *(held[name] for name in _OPERANDS),
            self.sides,
            self.in_features,
            self.out_features,
        )
        return y if is_float else y.to(x.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        """Sizes, unit, stored values and their type."""
        rows, columns = self.sides
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"units={rows}x{columns}, values={self.values.numel()}, dtype={self.values.dtype}"
        )


class PackedLinear(_PackedLayer):
    """Linear layer for inference on the active units of its weight; it holds nothing else of it.

    Input: ``[..., in_features]``. Output: ``[..., out_features]``, in the input's dtype; sums are in float32. It runs
    on the CPU, in ``at::get_num_threads()`` threads, whose number does not change a bit of the result. Its buffers are
    those of `PackedWeight` and ``bias``. Forward is one call of the operator ``estdgm::packed_linear``, which
    torch.export and AOTInductor keep as it is. There is no gradient: a backward through it raises RuntimeError.

    Args:
        weight: the packed weight.
        bias: ``[out_features]``, or None.

    Raises:
        RuntimeError: if the operator cannot be built here, such as without a C++ compiler.

    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply it to the last dimension of the input."""
        return self.multiply(input)


class PackedConv2d(_PackedLayer):
    """Convolution for inference on the active units of its weight, ``(out, kh * kw * in)``, as a product with patches.

    Input: ``[N, in, H, W]`` or ``[in, H, W]``. Output: ``[N, out, H', W']``, as that of ``torch.nn.Conv2d``.

    Args:
        weight: the packed matrix, with the inputs of a tap side by side.
        bias: ``[out]``, or None.
        geometry: kernel, stride, padding and dilation.

    """

    def __init__(self, weight: PackedWeight, bias: Tensor | None, geometry: ConvGeometry) -> None:
        super().__init__(weight, bias)
        self.geometry = geometry

    def forward(self, input: Tensor) -> Tensor:
        """Apply it to an image or a batch of images."""
        images = input if input.dim() == 4 else input.unsqueeze(0)
        g = self.geometry
        height, width = g.output_size(*images.shape[2:])
        pixels = images.permute(0, 2, 3, 1).contiguous()  # no copy in channels-last memory
        (rows, columns), (down, across), (pad_rows, pad_columns) = g.stride, g.dilation, g.padding
        if g.pointwise:
            patches = pixels[:, ::rows, ::columns]
        else:
            spans = [d * (k - 1) + 1 for d, k in zip(g.dilation, g.kernel_size, strict=True)]
            padded = F.pad(pixels, (0, 0, pad_columns, pad_columns, pad_rows, pad_rows))
            seen = padded.unfold(1, spans[0], rows).unfold(2, spans[1], columns)[..., ::down, ::across]
            patches = seen.permute(0, 1, 2, 4, 5, 3).reshape(images.shape[0], height, width, self.in_features)
        y = self.multiply(patches.contiguous()).permute(0, 3, 1, 2)
        return y if input.dim() == 4 else y.squeeze(0)

    def extra_repr(self) -> str:
        """Sizes and geometry."""
        return f"{super().extra_repr()}, {self.geometry}"
