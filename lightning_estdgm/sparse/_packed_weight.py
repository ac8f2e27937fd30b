"""A weight as its active units in the order of use: what packed layers hold, the same on every machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

STRIP = 64  # outputs of a unit at most; larger ones are cut
_LINES = 96  # inputs of a stretch of single weights, as in packed.h
_FOUR = 4  # single weights side by side
_UNITS = ((64, 64), (32, 32), (16, 16), (16, 1), (8, 8), (8, 1), (4, 4), (4, 1), (2, 1))
_SLACK = 1.05  # zeros that may be stored among the values of coarser units
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
"""Types that values may have."""


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Weight ``(out, in)`` without its inactive units.

    Units of ``r x c`` with ``r >= 2``: ``values [nnz, c, r]``, unit row ``o`` holding the unit columns
    ``idx[ptr[o] : ptr[o + 1]]``. Single weights: four outputs side by side within a stretch of 96 inputs, of as many
    entries each; ``values [n]`` and uint8 ``idx [n]`` (input in the stretch; 96 for what is only filled up),
    ``outputs [fours, 4]`` flat, ``ends [fours]`` in entries, ``ptr`` the first four of each stretch.

    Attributes:
        shape: ``(out, in)``.
        sides: ``(r, c)``; ``(1, 1)`` for single weights.
        values: float32, bfloat16 or int8.
        ptr: int32.
        idx: int32, of single weights uint8.
        outputs: int32, of single weights only.
        ends: int32, of single weights only.
        scale: float32 ``[out]``, of int8 values only: a weight is its value times its output's scale.

    """

    shape: tuple[int, int]
    sides: tuple[int, int]
    values: Tensor
    ptr: Tensor
    idx: Tensor
    outputs: Tensor | None = None
    ends: Tensor | None = None
    scale: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        names = ("values", "ptr", "idx", "outputs", "ends", "scale")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def find_unit(weight: Tensor) -> tuple[int, int]:
    """Return the largest unit, ``(outputs, columns)``, that a weight's zeros come in.

    >>> find_unit(torch.block_diag(torch.ones(16, 16), torch.ones(16, 16)))
    (16, 16)
    """
    out, inputs = weight.shape
    nonzero = int(torch.count_nonzero(weight))
    for rows, columns in _UNITS:
        if out % rows or inputs % columns:
            continue
        if int(_active(weight, rows, columns).sum()) * rows * columns <= _SLACK * nonzero:
            return rows, columns
    return 1, 1


def pack_weight(
    weight: Tensor, unit: tuple[int, int] | None = None, dtype: torch.dtype = torch.float32
) -> PackedWeight:
    """Keep the units of a weight that are not all zero.

    Args:
        weight: ``(out, in)``.
        unit: outputs and inputs of a unit, which divide the weight's; ``None``: as `find_unit` says.
        dtype: of the values; int8 has one scale an output, its largest weight being 127.

    Raises:
        ValueError: if the units do not divide the weight, or for another dtype.

    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    weight = weight.detach().to(device="cpu", dtype=torch.float32)
    rows, columns = find_unit(weight) if unit is None else unit
    if rows < 1 or columns < 1 or weight.shape[0] % rows or weight.shape[1] % columns:
        raise ValueError(f"units of {rows} x {columns} do not divide a weight of shape {tuple(weight.shape)}")
    scale = None
    if dtype is torch.int8:
        largest = weight.abs().amax(1)
        scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
        weight = (weight / scale[:, None]).round_()
    rows = math.gcd(rows, STRIP)
    packed = _pack_units(weight, rows, columns) if rows > 1 else _pack_singles(weight)
    values = (packed.values + 0.0).to(dtype)  # no -0.0
    return PackedWeight(packed.shape, packed.sides, values, packed.ptr, packed.idx, packed.outputs, packed.ends, scale)


def _active(weight: Tensor, rows: int, columns: int) -> Tensor:
    out, inputs = weight.shape
    return (weight != 0).view(out // rows, rows, inputs // columns, columns).any(3).any(1)


def _starts(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def _pack_units(weight: Tensor, rows: int, columns: int) -> PackedWeight:
    out, inputs = weight.shape
    active = _active(weight.contiguous(), rows, columns)
    row, column = active.nonzero(as_tuple=True)
    blocks = weight.reshape(out // rows, rows, inputs // columns, columns)[row, :, column]
    values = blocks.transpose(1, 2).flatten()
    return PackedWeight((out, inputs), (rows, columns), values, _starts(active.sum(1)), column.to(torch.int32))


def _pack_singles(weight: Tensor) -> PackedWeight:
    out, inputs = weight.shape
    parts = [_pack_stretch(weight[:, first : first + _LINES]) for first in range(0, inputs, _LINES)]
    values, places, outputs, lengths = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    fours = torch.tensor([part[3].numel() for part in parts])
    ends = lengths.cumsum(0).to(torch.int32)
    return PackedWeight((out, inputs), (1, 1), values.flatten(), _starts(fours), places.flatten(), outputs, ends)


def _pack_stretch(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return values and places ``[entries, 4]``, the outputs of each four, and how many entries each has."""
    out, lines = weight.shape
    nonzero = weight != 0
    lengths, order = nonzero.sum(1).sort(descending=True, stable=True)  # equals side by side: little is filled up
    fours = math.ceil(int((lengths > 0).sum()) / _FOUR)
    missing = max(0, fours * _FOUR - out)
    order = order[: fours * _FOUR]
    places = nonzero[order].to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    there = torch.arange(lines) < lengths[: fours * _FOUR, None]
    values = torch.where(there, weight[order].gather(1, places), torch.zeros(()))
    places = torch.where(there, places, torch.tensor(_LINES))
    if missing:
        values = torch.nn.functional.pad(values, (0, 0, 0, missing))
        places = torch.nn.functional.pad(places, (0, 0, 0, missing), value=_LINES)
        order = torch.nn.functional.pad(order, (0, missing), value=out)
    longest = lengths[: fours * _FOUR : _FOUR]
    kept = torch.arange(lines) < longest[:, None]
    values, places = (
        tensor.view(fours, _FOUR, lines).transpose(1, 2)[kept] for tensor in (values, places.to(torch.uint8))
    )
    return values, places, order.to(torch.int32), longest
