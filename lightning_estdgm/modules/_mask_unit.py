"""Mask unit of a layer: a single weight, or a block of a size that its shape allows."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_estdgm.modules._candidates import Candidate

BLOCK_SIZES = (16, 32, 64, 128)
"""Block sizes that a sparse operator may exist for; 1 stands for single weights."""

_MIN_BLOCKS_A_SIDE = 8


def fitting_block_sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the block sizes, smallest first, that divide both dimensions of an ``(out, in)`` matrix."""
    return tuple(b for b in BLOCK_SIZES if shape[0] % b == 0 and shape[1] % b == 0)


def auto_block_size(candidate: Candidate) -> tuple[int, str]:
    """Choose a layer's unit: the largest block that fits and leaves 8 blocks a side; single weights otherwise.

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


def unit_of(candidate: Candidate, block_size: int | str) -> tuple[int, str]:
    """Return the side of a layer's mask unit, as asked for or by `auto_block_size`, and the reason where there is one.

    Raises:
        ValueError: The block size that is asked for does not fit the layer.

    """
    if isinstance(block_size, str):
        return auto_block_size(candidate)
    shape = candidate.part_shape
    if shape[0] % block_size or shape[1] % block_size:
        raise ValueError(
            f"block_size={block_size} does not fit layer {candidate.name!r} with weight {shape}: "
            f"block sizes that do are {(1, *fitting_block_sizes(shape))}; exclude the layer "
            '(Selection(exclude=...)), or use Units(size="auto")'
        )
    if candidate.why_dense:
        return block_size, candidate.why_dense
    if block_size == 1 and candidate.has_operator and candidate.shard.groups:
        return block_size, "no sparse operator for single weights of a sharded weight"
    if block_size == 1 and candidate.has_operator and candidate.is_convolution:
        return block_size, "no sparse operator for single weights of a convolution"
    return block_size, ""
