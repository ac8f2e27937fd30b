"""``packed``: layers that hold their active weights only, for PyTorch with this package's operator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_estdgm.export._packed import load_packed, packed, round_stored_, save_packed
from lightning_estdgm.export.targets._protocol import ExportError, ExportInput, ExportTarget

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
"""Types of the values of packed layers, by name."""


class Packed(ExportTarget):
    """A file of `save_packed`: the smallest and fastest form on x86 CPUs."""

    name = "packed"
    suffix = ".pt"
    values: Sequence[str] = tuple(DTYPES)

    def write(self, given: ExportInput, path: Path) -> list[str]:
        """Write the values and lists of its packed layers, and its other weights."""
        model, notes = packed_model(given)
        try:
            save_packed(model, path)
        except ValueError as e:
            raise ExportError("\n".join(["packed: there is nothing to pack", *notes])) from e
        return [*notes, "export.load_packed(path, model) loads it; the operator is compiled once on each machine"]

    def load(self, path: Path, given: ExportInput) -> Callable[..., Any]:
        """Return the model with the layers that were written."""
        model: Callable[..., Any] = load_packed(path, given.model)
        return model

    def stored(self, given: ExportInput) -> Callable[..., Any] | None:
        """Return the model with rounded weights."""
        return rounded_model(given)


def packed_model(given: ExportInput) -> tuple[nn.Module, list[str]]:
    """Return the model with packed layers, and what was said of layers that stay dense.

    Raises:
        ExportError: if the operator cannot be built here.

    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model = packed(given.model, dtype=DTYPES[given.values])
        except RuntimeError as e:
            raise ExportError(str(e)) from e
    return model, [str(warning.message) for warning in said if warning.category is UserWarning]


def rounded_model(given: ExportInput) -> nn.Module | None:
    """Round the model's weights that are packed, and return it; None if it computes in halves, as they round."""
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in given.model.parameters()):
        return None
    round_stored_(given.model, packed_model(given)[0], DTYPES[given.values])
    return given.model


TARGET = Packed()
