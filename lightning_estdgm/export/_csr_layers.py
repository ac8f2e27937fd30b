"""Linear layers in PyTorch's compressed rows (CSR), and a loader that puts them into a model. It needs PyTorch only.

Put this file beside your program:

    from MODULE import load
    model = load(MyModel(), "model.pt")

where MODULE is this file's name, and MyModel() is the class that was trained, freshly made.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn


class CSRLinear(nn.Module):
    """``y = x W^T + bias`` with W ``(out, in)`` in compressed rows; x ``[..., in]``, y ``[..., out]``.

    It is computed as ``(W x^T)^T``, the order that PyTorch's library is fast in; one row as a product with a vector.

    Args:
        rows: int32 ``(out + 1,)``, where the values of each row begin.
        columns: int32, the column of each value.
        values: the values, float32 or float64.
        bias: ``(out,)``, or None.
        inputs: number of columns.

    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, rows: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None, inputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, len(rows) - 1
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
            weight = torch.sparse_csr_tensor(rows, columns, values, (self.outputs, inputs), check_invariants=True)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Apply it to the last dimension of the input."""
        flat = input.reshape(-1, self.inputs)
        if flat.shape[0] == 0:
            return input.new_zeros(*input.shape[:-1], self.outputs)
        y = (self.weight @ flat[0])[None] if flat.shape[0] == 1 else (self.weight @ flat.t()).t()
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*input.shape[:-1], self.outputs)


def load(model: nn.Module, path: str) -> nn.Module:
    """Put the layers of a file into `model`, load all other weights, and return it in evaluation mode.

    The model may be made under ``torch.device("meta")``, without memory for weights.
    """
    content = torch.load(path, weights_only=True, mmap=True)
    made = [CSRLinear(**layer) for layer in content["layers"]]
    for name, number in content["names"].items():
        model.set_submodule(name, made[number])
    model.load_state_dict(content["state_dict"], assign=True)
    return model.eval().requires_grad_(False)
