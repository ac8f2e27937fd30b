"""Packed layers for tests: weights with masks of every unit, and what they should compute."""

import torch

from lightning_estdgm.method._masks import expand_mask

UNITS = [(1, 1), (2, 1), (4, 1), (4, 4), (8, 1), (8, 8), (16, 1), (16, 16), (32, 32), (48, 48), (64, 64), (128, 128)]
TOKENS = [1, 2, 3, 4, 16, 33, 257]


def masked_weight(unit, rows=3, columns=5, density=0.3, seed=0):
    """A weight of so many units, or about 100 x 200 where they are small; with an empty unit row and column."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = max(rows, 100 // unit[0]), max(columns, 200 // unit[1])
    mask = torch.rand(rows, columns, generator=generator) < density
    mask[1], mask[:, 2], mask[0, 0] = False, False, True
    weight = torch.randn(rows * unit[0], columns * unit[1], generator=generator)
    return weight * expand_mask(mask, unit)


def stored(weight, dtype):
    """The weight in float64, as values of that dtype hold it."""
    if dtype is torch.int8:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (torch.where(scale > 0, (weight / scale).round(), 0.0) * scale).double()
    return weight.to(dtype).double()
