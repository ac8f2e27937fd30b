"""``2:4``: two of each four neighbouring weights, in the layout that PyTorch gives NVIDIA's sparse tensor cores."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from lightning_estdgm.export import _semi_structured_layers
from lightning_estdgm.export._semi_structured_layers import load
from lightning_estdgm.export._sparse_layers import SparseLayer, sparse_linear_layers
from lightning_estdgm.export.targets._protocol import ExportError, ExportInput, ExportTarget
from lightning_estdgm.method._masks import active_units, top_k_in_groups

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_ROWS, _COLUMNS = 32, 64  # that CUTLASS's 2:4 product takes multiples of, at 16 bits


class TwoOfFour(ExportTarget):
    """A mask fitted to 2:4, whatever the trained pattern; what it leaves out is counted, and what it does measured."""

    name = "2:4"
    suffix = ".pt"
    values: Sequence[str] = tuple(_DTYPES)
    runs_here = False

    def write(self, given: ExportInput, path: Path) -> list[str]:
        """Write the layers that fit and the other weights, all in 16 bits, and the module that loads them beside."""
        layers, kept = _layers(given.model)
        if not layers:
            raise ExportError("\n".join(["no linear layer can be held in 2:4", *kept]))
        dtype = _DTYPES[given.values]
        parts: dict[int, dict[str, Any]] = {}
        before = after = 0
        for layer in layers:
            if id(layer.module) not in parts:
                parts[id(layer.module)], active, fitted = _fitted(layer, dtype)
                before, after = before + active, after + fitted
        order = list(parts)
        names_of = {layer.name: order.index(id(layer.module)) for layer in layers}
        rest = {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in given.model.state_dict().items()
            if not any(key.startswith(f"{name}.") for name in names_of)
        }
        torch.save(
            {"layers": list(parts.values()), "names": names_of, "state_dict": rest, "dtype": dtype},
            path,
        )
        loader = path.with_name(re.sub(r"\W", "_", path.stem) + "_2of4.py")
        shutil.copyfile(_semi_structured_layers.__file__, loader)
        return [
            f"{len(parts)} layers in 2:4, {given.values}; {loader.name} loads them, with PyTorch only",
            f"fitting kept {after:,} of {before:,} active weights ({after / max(before, 1):.1%}): the largest two of "
            "each four neighbouring inputs. Train with preset('n_of_m') to lose none",
            "no speed is claimed: it was checked dense, on the CPU; it needs an NVIDIA GPU of capability 8.0 or newer",
            *kept,
        ]

    def load(self, path: Path, given: ExportInput) -> Callable[..., Any]:
        """Return the model with the weights that were written, dense on the CPU; floating inputs become its type."""
        return _in_halves(load(given.model, str(path), device="cpu"), _DTYPES[given.values])

    def stored(self, given: ExportInput) -> Callable[..., Any] | None:
        """Return the model with the fitted weights."""
        for layer in _layers(given.model)[0]:
            layer.weight.copy_(fit_2_of_4(layer.weight))
        dtype = _DTYPES[given.values]
        return _in_halves(given.model.to(dtype), dtype)

    def tolerance(self, values: str) -> float | None:
        """Return None: weights are left out."""
        return None


def _layers(model: nn.Module) -> tuple[list[SparseLayer], list[str]]:
    """Return the layers that fit, and what is said of others with zeros."""
    layers, kept = sparse_linear_layers(model)
    odd = [layer for layer in layers if layer.weight.shape[0] % _ROWS or layer.weight.shape[1] % _COLUMNS]
    if odd:
        names = ", ".join(f"{layer.name} {tuple(layer.weight.shape)}" for layer in odd)
        kept.append(f"stays dense, as 2:4 takes outputs in multiples of {_ROWS}, inputs of {_COLUMNS}: {names}")
    return [layer for layer in layers if layer not in odd], kept


def _in_halves(model: nn.Module, dtype: torch.dtype) -> Callable[..., Any]:
    """Return the model as a function whose floating inputs become `dtype`."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def run(*args: Any, **kwargs: Any) -> Any:
        return model(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return run


def fit_2_of_4(weight: Tensor) -> Tensor:
    """Return a copy of ``(out, in)`` that keeps the largest two of each four neighbours along the inputs."""
    groups = weight.abs().reshape(-1, 4)
    kept = top_k_in_groups(groups, torch.full((len(groups),), 2)).reshape(weight.shape)
    return torch.where(kept, weight, torch.zeros_like(weight))


def _fitted(layer: SparseLayer, dtype: torch.dtype) -> tuple[dict[str, Any], int, int]:
    weight = fit_2_of_4(layer.weight).to(dtype)
    values, meta = sparse_semi_structured_from_dense_cutlass(weight)
    part = {
        "shape": list(weight.shape),
        "values": values,
        "meta": meta,
        "bias": None if layer.bias is None else layer.bias.to(dtype),
    }
    return part, active_units(layer.weight != 0), active_units(weight != 0)


TARGET = TwoOfFour()
