"""Cuts of the work of a product into programs, and the search for the fastest of a few."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

GROUPS = (128, 16)
"""Inputs that are taken together in the input gradient of units of one input: wide tiles, or few panels a tile."""

HOPPER_SHARED = 227 * 1024
"""Shared memory that one program may use on NVIDIA's compute capability 9.0, in bytes."""


@dataclass(frozen=True)
class Tiles:
    """Cut of a product.

    Attributes:
        rows: Rows of the tile that a program computes: tokens, or input features of the weight gradient. Its columns
            are those of one block.
        depth: Length of one step of the sum.
        warps: Warps (on AMD: wavefronts) of a program.
        stages: Steps in flight.
        columns: Columns of the tile where they are not those of one block, see `unit_candidates`; else 0.
    """

    rows: int
    depth: int
    warps: int
    stages: int
    columns: int = 0

    def shared_bytes(self, block_size: int, itemsize: int) -> int:
        """Shared memory of a program, in bytes, at most."""
        return (self.rows + block_size) * self.depth * itemsize * self.stages

    def resident(self, block_size: int) -> int:
        """Programs that one multiprocessor is taken to hold at a time."""
        return max(1, min(4, 2**15 // (self.rows * block_size)))


def candidates(
    block_size: int, itemsize: int, *, amd: bool, exact_float32: bool, shared_bytes: int
) -> tuple[Tiles, ...]:
    """Return the cuts worth trying on a device, the one to use untried first; never none.

    Args:
        block_size: Side of a mask block: 16, 32, 64 or 128.
        itemsize: Bytes per value: 2 or 4.
        amd: Whether the GPU is AMD's, else NVIDIA's.
        exact_float32: Whether float32 products are in float32, not in tf32.
        shared_bytes: Shared memory that one program may use.
    """
    if exact_float32 and not amd:  # no matrix units: operands lie in registers, so steps are short
        return (Tiles(128, 16, 8, 2),)
    depth = 128 // itemsize
    warps = 8 if block_size == 128 else 4
    if amd:
        found: tuple[Tiles, ...] = (Tiles(128, depth, warps, 2), Tiles(256, depth // 2, 8, 2))
    else:
        # Where a step joins several blocks, one stage more: the block numbers are loaded a step before the blocks.
        stages = 3 if block_size >= depth else 4
        found = (Tiles(128, depth, warps, stages), Tiles(256, depth, 4 if block_size <= 32 else 8, stages))
        if block_size == 128 and (itemsize == 4 or shared_bytes < HOPPER_SHARED):
            found = found[:1]  # the tall tile spills registers there
    fitting = tuple(tiles for tiles in found if tiles.shared_bytes(block_size, itemsize) <= shared_bytes)
    return fitting or (Tiles(128, depth // 2, warps, 2),)


def unit_candidates(
    length: int, itemsize: int, *, in_groups: bool, amd: bool, exact_float32: bool, shared_bytes: int
) -> tuple[Tiles, ...]:
    """Return the cuts worth trying for units of several outputs and one input, as `candidates` does for blocks.

    Args:
        length: Outputs of a unit: 8, 16 or 32.
        itemsize: Bytes per value: 2 or 4.
        in_groups: Whether a tile has the inputs of a group, one cut for each of `GROUPS`, else the outputs of a unit.
        amd: Whether the GPU is AMD's, else NVIDIA's.
        exact_float32: Whether float32 products are in float32, not in tf32.
        shared_bytes: Shared memory that one program may use.
    """

    def cuts(columns: int) -> tuple[Tiles, ...]:
        found = candidates(columns, itemsize, amd=amd, exact_float32=exact_float32, shared_bytes=shared_bytes)
        return tuple(replace(tiles, columns=columns) for tiles in found)

    if in_groups:
        return tuple(cuts(group)[0] for group in GROUPS)
    found = cuts(max(length, 16) if amd else length)  # what AMD's matrix units have for 8 columns is slow, or nothing
    if amd or length < 32:
        return found
    # NVIDIA's compilers keep the sums of 256 inputs by 32 outputs in registers only over eight warps.
    return tuple(replace(tiles, warps=max(tiles.warps, 8)) for tiles in found)


class Tuner:
    """Search for the fastest candidate of each case, once.

    A candidate that the device has too few resources for is left out.

    Args:
        too_big: Exceptions that say so.
    """

    def __init__(self, too_big: tuple[type[Exception], ...] = ()) -> None:
        self._too_big = too_big
        self._best: dict[Hashable, Tiles] = {}

    def best(
        self,
        key: Hashable,
        tiles: Sequence[Tiles],
        run: Callable[[Tiles], object],
        seconds: Callable[[Callable[[], object]], float] | None,
    ) -> Tiles:
        """The fastest of ``tiles``: remembered under ``key``, else timed now, else (``seconds`` is None) the first.

        Args:
            key: All that the answer depends on.
            tiles: Candidates, at least one.
            run: Product with one of them.
            seconds: Clock of a call, in seconds; None where nothing can be timed.
        """
        if key in self._best:
            return self._best[key]
        if seconds is None or len(tiles) == 1:
            return tiles[0]
        times = {candidate: self._time(candidate, run, seconds) for candidate in tiles}
        self._best[key] = min(tiles, key=times.__getitem__)
        return self._best[key]

    def _time(
        self, tiles: Tiles, run: Callable[[Tiles], object], seconds: Callable[[Callable[[], object]], float]
    ) -> float:
        try:
            return seconds(lambda: run(tiles))
        except self._too_big:
            return math.inf
