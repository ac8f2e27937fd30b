"""Mask unit of a layer: a single weight, a few that share an input, or a block of a size that its shape allows."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_estdgm.method._masks import BlockSize, sides
from lightning_estdgm.modules._candidates import Candidate
from lightning_estdgm.sparse.autotune._unit_cost import AIMS

BLOCK_SIZES = (16, 32, 64, 128)
"""Block sizes that a sparse operator exists for on every kind of device."""

UNIT_SIZES: tuple[BlockSize, ...] = (1, (2, 1), (4, 1), (8, 1), (16, 1), (32, 1), 4, 8, *BLOCK_SIZES)
"""Mask units that a sparse operator may exist for: sides of squares (1: single weights), outputs of one input."""

_MIN_BLOCKS_A_SIDE = 8


def check_unit_size(name: str, size: object) -> None:
    """Raise ValueError unless `size` is a mask unit, or a way to choose one."""
    if size in AIMS:
        return
    if type(size) not in (int, tuple) or size not in UNIT_SIZES:
        raise ValueError(f"{name} must be 'auto', 'finest', 'fastest' or one of {UNIT_SIZES}, got {size!r}")


def fitting_units(sizes: Sequence[BlockSize], shape: Sequence[int]) -> list[BlockSize]:
    """Return those of some mask units that divide both dimensions of an ``(out, in)`` matrix."""
    return [size for size in sizes if not any(n % side for n, side in zip(shape[:2], sides(size), strict=True))]


def roomy_units(sizes: Sequence[BlockSize], shape: Sequence[int]) -> list[BlockSize]:
    """Return those of some mask units that divide a matrix, blocks only where they leave 8 a side."""
    least = min(shape[:2]) / _MIN_BLOCKS_A_SIDE
    return [size for size in fitting_units(sizes, shape) if size not in BLOCK_SIZES or sides(size)[0] <= least]


def fitting_block_sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the block sizes, smallest first, that divide both dimensions of an ``(out, in)`` matrix."""
    return tuple(b for b in BLOCK_SIZES if b in fitting_units(BLOCK_SIZES, shape))


def largest_block(candidate: Candidate) -> tuple[int, str]:
    """Return the largest block that fits a layer and leaves 8 blocks a side; single weights where there is none.

    Returns:
        The block size and, where it is 1, the reason.

    """
    if candidate.why_dense:
        return 1, candidate.why_dense
    shape = candidate.part_shape
    fitting = fitting_block_sizes(shape)
    roomy = [b for b in fitting if min(shape[:2]) >= _MIN_BLOCKS_A_SIDE * b]
    if roomy:
        return roomy[-1], ""
    if fitting:
        return 1, f"fewer than {_MIN_BLOCKS_A_SIDE} blocks of {fitting[0]} a side"
    return 1, f"no block of {', '.join(map(str, BLOCK_SIZES))} divides both dimensions"


def unit_of(candidate: Candidate, block_size: BlockSize | str) -> tuple[BlockSize, str]:
    """Return the sides of a layer's mask unit, as asked for or by `largest_block`, and the reason where there is one.

    What `largest_block` gives may change once the first step has shown the layer's input (`engine._unit_choice`).

    Raises:
        ValueError: The block size that is asked for does not fit the layer.

    """
    if isinstance(block_size, str):
        return largest_block(candidate)
    shape = candidate.part_shape
    if block_size not in fitting_units([block_size], shape):
        raise ValueError(
            f"Units(size={block_size}) does not fit layer {candidate.name!r} with weight {shape}: "
            f"block sizes that do are {fitting_units(UNIT_SIZES, shape)}; exclude the layer "
            '(Selection(exclude=...)), or use Units(size="auto")'
        )
    if candidate.why_dense:
        return block_size, candidate.why_dense
    if block_size == 1 and candidate.has_operator and candidate.shard.groups:
        return block_size, "no sparse operator for single weights of a sharded weight"
    return block_size, ""
