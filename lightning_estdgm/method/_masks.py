"""Masks over mask units: shapes, views, norms, exact top-k, drop-and-grow, bit packing. Pure functions of tensors.

Scores of units are in `_scores`, rules on where a layer's active units may lie in `_patterns`.

A mask is a bool tensor, true where a unit is active. For ``block_size=1`` it has the shape of the weight; for a block
of ``r x c`` weights it has shape ``(out / r, in / c)`` and each entry stands for ``r x c`` weights (times the kernel of
a convolution). A block size is a side, or a pair ``(r, c)``: ``r`` outputs that share ``c`` inputs.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

BlockSize: TypeAlias = int | tuple[int, int]
"""Side of a square block, or rows and columns of another one."""


def sides(block_size: BlockSize) -> tuple[int, int]:
    """Return the rows and columns of a block, in weights."""
    return block_size if isinstance(block_size, tuple) else (block_size, block_size)


def block_size_of(rows: int, columns: int) -> BlockSize:
    """Undo `sides`: squares by their side."""
    return rows if rows == columns else (rows, columns)


def size_words(block_size: BlockSize) -> str:
    """Return a block size as people read it: ``4 x 1``."""
    return "{} x {}".format(*sides(block_size))


def unit_words(block_size: BlockSize) -> str:
    """Return a mask unit as people read it: ``weight`` for single ones, else its sides."""
    return "weight" if block_size == 1 else size_words(block_size)


def size_entry(block_size: BlockSize) -> int | str:
    """Return a block size as results hold it: squares by their side, others in words."""
    return size_words(block_size) if isinstance(block_size, tuple) else block_size


def mask_shape(weight_shape: torch.Size | tuple[int, ...], block_size: BlockSize) -> tuple[int, ...]:
    """Return the mask's shape for a weight of shape ``(out, in, ...)``.

    Raises:
        ValueError: if a side of `block_size` is not positive or does not divide its dimension.

    """
    rows, columns = sides(block_size)
    if rows < 1 or columns < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if block_size == 1:
        return tuple(weight_shape)
    out, inner = weight_shape[:2]
    if out % rows or inner % columns:
        raise ValueError(
            f"block_size {block_size} does not divide a weight of shape {tuple(weight_shape)}: "
            f"{out} x {inner} must be multiples of {rows} x {columns}; "
            'Units(size="auto") takes what fits each layer, and Selection(exclude=...) leaves one dense'
        )
    return out // rows, inner // columns


def unit_size(weight_shape: torch.Size | tuple[int, ...], block_size: BlockSize) -> int:
    """Return the number of weights in one unit."""
    if block_size == 1:
        return 1
    rows, columns = sides(block_size)
    return rows * columns * int(torch.Size(weight_shape[2:]).numel())


def expand_mask(mask: Tensor, block_size: BlockSize) -> Tensor:
    """Return the mask of single weights ``(out, in)`` of a block mask: each flag repeated over its ``r x c`` weights.

    Args:
        mask: Block mask, ``(out / r, in / c)``.
        block_size: Sides of a block.

    Example:
        >>> expand_mask(torch.tensor([[True, False]]), 2).tolist()
        [[True, True, False, False], [True, True, False, False]]

    """
    rows, columns = sides(block_size)
    return mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def unit_view(weight: Tensor, block_size: BlockSize) -> Tensor:
    """View ``(out, in, ...)`` as ``(out/r, r, in/c, c, ...)``; shares storage whatever the strides."""
    (out, inner), (rows, columns) = weight.shape[:2], sides(block_size)
    return weight.unflatten(1, (inner // columns, columns)).unflatten(0, (out // rows, rows))


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype of each element size in bytes."""

PIECE = 1 << 18
"""Number of elements that stay in a CPU's cache between reading and writing."""

FEW_ROWS = 8
"""Rows of a unit whose squares are added one after the other."""

_SAMPLE = 1 << 12  # of scores, by which few are found among which a threshold is


def _aligned(weight: Tensor, mask: Tensor, block_size: BlockSize) -> tuple[Tensor, Tensor]:
    """Return `unit_view` of `weight`, and a block mask shaped to broadcast against it."""
    return unit_view(weight, block_size), _broadcast(mask, weight)


def _broadcast(mask: Tensor, weight: Tensor) -> Tensor:
    """Shape a block mask ``(R, C)`` to broadcast against `unit_view` of `weight`."""
    return mask[:, None, :, None].reshape(*mask.shape[:1], 1, mask.shape[1], 1, *([1] * (weight.dim() - 2)))


def keep_active_(weight: Tensor, active: Tensor, block_size: BlockSize) -> Tensor:
    """Zero a weight, gradient or optimizer state outside the units in `active`, in place.

    Infinities and NaNs become 0 too, and active units keep every bit: the bits of the numbers, read as integers, are
    multiplied by 0 or 1. On a CPU that takes a fifth of `masked_fill_`'s time.
    """
    integer = _INTEGERS.get(weight.element_size())
    if integer is None:
        view, active = (weight, active) if block_size == 1 else _aligned(weight, active, block_size)
        view.masked_fill_(~active, 0)
        return weight
    bits = weight.view(integer)
    if block_size != 1:
        view, active = _aligned(bits, active, block_size)
        view.mul_(active)
    elif weight.device.type != "cpu":
        bits.mul_(active)
    elif weight.numel():
        # torch widens the mask to the integers first: a piece at a time stays in the cache.
        rows = max(1, PIECE * len(bits) // bits.numel())
        for piece, kept in zip(bits.split(rows), active.split(rows), strict=True):
            piece.mul_(kept)
    return weight


def masked_select_units(mask: Tensor, active: Tensor, inactive: Tensor, block_size: BlockSize) -> Tensor:
    """Return `active` where `mask` is true and `inactive` elsewhere; both have the weight's shape."""
    if block_size == 1:
        return torch.where(mask, active, inactive)
    chosen = torch.where(_broadcast(mask, active), unit_view(active, block_size), unit_view(inactive, block_size))
    return chosen.flatten(2, 3).flatten(0, 1)


def pool_norm(weight: Tensor, block_size: BlockSize) -> Tensor:
    r"""Return the Frobenius norm :math:`\lVert w_u \rVert` of each unit, ``|w|`` for single weights.

    Args:
        weight: weight or gradient, ``(out, in, ...)``.
        block_size: sides of a unit.

    Returns:
        Norms of the mask's shape, at least float32.

    """
    weight = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    if block_size == 1:
        return weight.abs()
    (out, inner), (rows, columns) = weight.shape[:2], sides(block_size)
    if rows > FEW_ROWS:
        view = unit_view(weight, block_size)
        return torch.linalg.vector_norm(view, dim=[1, 3, *range(4, view.dim())])
    # A row of all units at a time: for 4 x 1, torch's norm over a short dimension takes 100 times as long on a CPU.
    lines = weight.unflatten(0, (out // rows, rows))
    squares = lines[:, 0].square()
    for row in range(1, rows):
        squares.addcmul_(lines[:, row], lines[:, row])
    squares = squares.unflatten(1, (inner // columns, columns))
    return squares.sum([2, *range(3, squares.dim())]).sqrt()


def active_units(mask: Tensor) -> int:
    """Return the number of active units."""
    return int(torch.count_nonzero(mask))


def top_k(scores: Tensor, k: int) -> Tensor:
    """Return a mask of exactly the `k` largest scores; ties go to the lowest index, on every device alike.

    Args:
        scores: scores of any shape, no NaN; entries of ``-inf`` come last.
        k: number of scores to choose, 0 to ``scores.numel()``.

    Raises:
        ValueError: if `k` is out of range or a score is NaN.

    """
    n = scores.numel()
    if not 0 <= k <= n:
        raise ValueError(f"k must lie in [0, {n}] for {n} scores, got {k}")
    if torch.isnan(scores).any():
        raise ValueError("scores must not be NaN")
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if k == n:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    threshold = _kth_largest(flat, k)
    chosen = flat >= threshold
    surplus = active_units(chosen) - k
    if surplus:  # of the entries equal to the threshold, the last ones in index order
        tied = (flat == threshold).nonzero().squeeze(1)
        chosen[tied[len(tied) - surplus :]] = False
    return chosen.view_as(scores)


def _kth_largest(flat: Tensor, k: int) -> Tensor:
    """Return the `k`-th largest of a vector; on a CPU from those that a sample says may be it, if they are few."""
    n = flat.numel()
    if flat.device.type == "cpu" and n > 4 * _SAMPLE:  # torch's own takes 5 to 10 times as long there
        sample = flat[:: n // _SAMPLE]
        expected = k / n * len(sample)
        rank = int(expected + 4 * expected**0.5) + 4  # four standard deviations more, so that it is hardly ever too few
        if rank < len(sample):
            largest = flat[flat >= sample.kthvalue(len(sample) - rank + 1).values]
            if k <= len(largest) < n // 2:
                flat = largest
    return flat.kthvalue(len(flat) - k + 1).values


def initial_mask(norms: Tensor, k: int, generator: torch.Generator, *, largest: bool = False) -> Tensor:
    """Return a mask with exactly `k` active units: those of norm above 0 first, then, if too few, others.

    Weights that an earlier mask has zeroed thus give that mask back. Among the units of norm above 0 the choice is
    random or, with `largest`, by norm; among those of norm 0 it is random.

    Args:
        norms: norm of each unit.
        k: number of active units, 0 to ``norms.numel()``.
        generator: generator on the norms' device.
        largest: whether the largest units are chosen rather than random ones.

    """
    noise = torch.rand(norms.shape, generator=generator, device=norms.device)
    return top_k(torch.where(norms > 0, norms if largest else noise, noise - 1.0), k)


def top_k_in_groups(scores: Tensor, counts: Tensor) -> Tensor:
    """Return a mask of the largest scores of each row; ties go to the lowest index.

    Args:
        scores: scores, ``(groups, size)``, no NaN.
        counts: number of scores to choose in each row, ``(groups,)``, integers from 0 to ``size``.

    Raises:
        ValueError: if a count is out of range or a score is NaN.

    """
    groups, size = scores.shape
    if counts.shape != (groups,) or bool((counts < 0).any()) or bool((counts > size).any()):
        raise ValueError(f"counts must be {groups} numbers in [0, {size}], got {counts.tolist()}")
    if torch.isnan(scores).any():
        raise ValueError("scores must not be NaN")
    order = scores.argsort(dim=1, descending=True, stable=True)
    chosen = torch.arange(size, device=scores.device) < counts[:, None]
    return torch.zeros_like(chosen).scatter_(1, order, chosen)


def drop_and_grow(
    mask: Tensor, keep_scores: Tensor, grow_scores: Tensor, k: int, keep: int, *, regrow: bool = False
) -> Tensor:
    """Keep the active units of largest keep score and grow others of largest growth score until `k` are active.

    Args:
        mask: mask before the update.
        keep_scores: scores of the mask's shape; only those of active units are read.
        grow_scores: scores of the mask's shape; without `regrow` only those of inactive units are read.
        k: number of active units of the new mask.
        keep: number of active units that stay, at most `k` and the number of active ones; see `kept_units`.
        regrow: whether units just dropped may be grown again; otherwise only inactive units are grown.

    Returns:
        A new mask with exactly `k` active units; the same on every machine for the same scores.

    Raises:
        ValueError: if a number is out of range or a score is NaN.

    """
    kept = top_k(keep_scores.masked_fill(~mask, -torch.inf), keep)
    return kept | top_k(grow_scores.masked_fill(kept if regrow else mask, -torch.inf), k - keep)


def kept_units(n_active: int, n_inactive: int, k: int, drop_fraction: float, *, regrow: bool = False) -> int:
    """Return the number of active units that stay when a mask is updated to `k` active units.

    At most ``s = min(n_active, k)`` can stay; ``s - floor(drop_fraction * s)`` do, and the rest of `k` is grown.
    Without `regrow` only inactive units can be grown, so fewer are dropped if there are too few of those.

    Args:
        n_active: number of active units before the update.
        n_inactive: number of inactive units before the update.
        k: number of active units after the update.
        drop_fraction: share of the units that could stay, given up for new ones, in [0, 1].
        regrow: whether units just dropped may be grown again.

    Raises:
        ValueError: if `k` or `drop_fraction` is out of range.

    """
    if not 0.0 <= drop_fraction <= 1.0:
        raise ValueError(f"drop_fraction must lie in [0, 1], got {drop_fraction}")
    units = n_active + n_inactive
    if not 0 <= k <= units:
        raise ValueError(f"k must lie in [0, {units}] for a mask of {units} units, got {k}")
    survivors = min(n_active, k)
    keep = survivors - int(drop_fraction * survivors)
    return keep if regrow else max(keep, k - n_inactive)


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool tensor into uint8, eight units a byte, the first in the lowest bit; on the CPU."""
    flat = mask.detach().flatten().to(device="cpu", dtype=torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device="cpu")).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack_bits`: return a bool tensor of `shape`, on the CPU.

    Raises:
        ValueError: if `packed` does not hold the bits of that shape.

    """
    n = int(torch.Size(shape).numel())
    if packed.dtype != torch.uint8 or packed.numel() != (n + 7) // 8:
        raise ValueError(
            f"packed mask must be uint8 with {(n + 7) // 8} bytes for shape {tuple(shape)}, "
            f"got {packed.dtype} with {packed.numel()}"
        )
    bits = (packed.cpu()[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1
    return bits.flatten()[:n].bool().view(shape)
