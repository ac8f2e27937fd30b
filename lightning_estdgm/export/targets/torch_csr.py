"""``torch-csr``: linear layers in PyTorch's own compressed rows, for PyTorch without this package."""

from __future__ import annotations

import copy
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_estdgm.export import _csr_layers
from lightning_estdgm.export._csr_layers import CSRLinear, load
from lightning_estdgm.export._sparse_layers import SparseLayer, sparse_linear_layers
from lightning_estdgm.export.targets._protocol import ExportError, ExportInput, ExportTarget

_DTYPES = (torch.float32, torch.float64)  # that PyTorch's CSR product takes
_TOKENS = (1, 4, 16, 64, 256, 1024, 2048)
_MOST_TIMED = 6  # shapes of layers


class TorchCSR(ExportTarget):
    """Any pattern of zeros, in PyTorch's CSR with int32 indices; nothing of this package is needed to run it."""

    name = "torch-csr"
    suffix = ".pt"

    def write(self, given: ExportInput, path: Path) -> list[str]:
        """Write the layers and the other weights, and the module that loads them beside."""
        layers, kept = sparse_linear_layers(given.model)
        if not layers:
            raise ExportError("\n".join(["no linear layer is at most half active: torch-csr gains nothing", *kept]))
        for layer in layers:
            if layer.weight.dtype not in _DTYPES:
                raise ExportError(
                    f"{layer.name} is {layer.weight.dtype}; PyTorch's CSR product takes float32 and float64: "
                    "export model.float()"
                )
        notes = [*kept, _speed_note(layers)]
        parts: dict[int, dict[str, Any]] = {}
        held: dict[int, dict[str, Any]] = {}  # rows and values of layers that share a weight: written once
        for layer in layers:
            part = held.setdefault(layer.weight.data_ptr(), _compressed(layer))
            parts.setdefault(id(layer.module), {**part, "bias": layer.bias})
        order = list(parts)
        names = {layer.name: order.index(id(layer.module)) for layer in layers}
        rest = copy.copy(given.model.state_dict())
        for name in names:
            for key in [key for key in rest if key.startswith(f"{name}.")]:
                del rest[key]
        torch.save({"layers": list(parts.values()), "names": names, "state_dict": dict(rest)}, path)
        loader = path.with_name(re.sub(r"\W", "_", path.stem) + "_csr.py")  # a name that can be imported
        shutil.copyfile(_csr_layers.__file__, loader)
        active = sum(len(part["values"]) for part in parts.values())
        density = active / sum((len(part["rows"]) - 1) * part["inputs"] for part in parts.values())
        kind = f"{len(parts)} layers in compressed rows, density {density:.3f}"
        return [f"{kind}; {loader.name} loads them, with PyTorch only", *notes]

    def load(self, path: Path, given: ExportInput) -> Callable[..., Any]:
        """Return the model with the layers that were written."""
        model: Callable[..., Any] = load(given.model, str(path))
        return model


def _compressed(layer: SparseLayer) -> dict[str, Any]:
    mask = layer.weight != 0
    rows = torch.zeros(len(mask) + 1, dtype=torch.int32)
    rows[1:] = mask.sum(1).cumsum(0)
    columns = mask.nonzero()[:, 1].int()
    values = layer.weight[mask]
    return {"rows": rows, "columns": columns, "values": values, "bias": layer.bias, "inputs": layer.weight.shape[1]}


def _speed_note(layers: list[SparseLayer]) -> str:
    """Say from how many tokens on the sparse layers together are slower than dense, measured here and now."""
    distinct = {tuple(layer.weight.shape): layer for layer in sorted(layers, key=lambda layer: -layer.density)}
    chosen = sorted(distinct.values(), key=lambda layer: -layer.weight.numel())[:_MOST_TIMED]
    sparse = [CSRLinear(**_compressed(layer)) for layer in chosen]
    ratios = {}
    for tokens in _TOKENS:
        inputs = [torch.randn(tokens, layer.weight.shape[1], dtype=layer.weight.dtype) for layer in chosen]
        dense_s = sum(_seconds(_dense, layer, x) for layer, x in zip(chosen, inputs, strict=True))
        ratios[tokens] = dense_s / sum(_seconds(_call, m, x) for m, x in zip(sparse, inputs, strict=True))
    measured = ", ".join(f"{ratio:.2f} at {tokens}" for tokens, ratio in ratios.items())
    return (
        f"{_verdict(ratios)}, measured on its layers here ({measured} times as fast as dense, "
        f"{torch.get_num_threads()} thread(s))"
    )


def _verdict(ratios: dict[int, float]) -> str:
    """Say where it is faster than dense."""
    wins = [tokens for tokens, ratio in ratios.items() if ratio > 1]
    if not wins:
        return "it loses at any number of tokens"
    later = [tokens for tokens in ratios if tokens > wins[-1]]
    below = f", and below {wins[0]}" if wins[0] > min(ratios) else ""
    won = f"it wins from {wins[0]} to {wins[-1]} tokens a call"
    return f"it loses from {later[0]} tokens a call on{below}" if later else won


def _dense(layer: SparseLayer, x: Tensor) -> Tensor:
    return nn.functional.linear(x, layer.weight, layer.bias)


def _call(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = module(x)
    return y


def _seconds(call: Callable[..., Tensor], what: Any, x: Tensor) -> float:
    call(what, x)
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        call(what, x)
        taken.append(time.perf_counter() - start)
    return min(taken)


TARGET = TorchCSR()
