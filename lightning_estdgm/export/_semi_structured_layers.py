"""Linear layers in PyTorch's 2:4 layout for NVIDIA GPUs, and a loader that puts them into a model. PyTorch only.

Put this file beside your program:

    from MODULE import load
    model = load(MyModel(), "model.pt")

where MODULE is this file's name, and MyModel() is the class that was trained, freshly made. It runs on GPUs with sparse
tensor cores (compute capability 8.0 or newer); elsewhere `load(..., device="cpu")` gives the same weights dense.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn


def load(model: nn.Module, path: str, device: str = "cuda") -> nn.Module:
    """Put the weights of a file into `model`, in the file's type, move it to a device and return it in evaluation mode.

    Layers in 2:4 are nn.Linear with a weight of ``SparseSemiStructuredTensorCUTLASS`` on a GPU, and dense elsewhere.
    """
    content = torch.load(path, weights_only=True)
    model = model.to(content["dtype"])
    made = [_linear(layer, torch.device(device)) for layer in content["layers"]]
    for name in content["names"]:
        model.set_submodule(name, nn.Identity())
    model.load_state_dict(content["state_dict"])
    model = model.to(device)
    for name, number in content["names"].items():
        model.set_submodule(name, made[number])
    return model.eval().requires_grad_(False)


def _linear(layer: dict[str, Any], device: torch.device) -> nn.Linear:
    rows, columns = layer["shape"]
    linear = nn.Linear(columns, rows, bias=layer["bias"] is not None, device="meta")
    linear.weight = nn.Parameter(_weight(layer, device), requires_grad=False)
    if layer["bias"] is not None:
        linear.bias = nn.Parameter(layer["bias"].to(device), requires_grad=False)
    return linear


def _weight(layer: dict[str, Any], device: torch.device) -> Tensor:
    values, meta = layer["values"].to(device), layer["meta"].to(device)
    if device.type != "cuda":
        from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

        dense: Tensor = sparse_semi_structured_to_dense_cutlass(values, meta)
        return dense
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor")
        return SparseSemiStructuredTensorCUTLASS(
            torch.Size(layer["shape"]), packed=values, meta=meta, packed_t=None, meta_t=None,
            compressed_swizzled_bitmask=None,
        )  # fmt: skip
