"""Buckets of densities and of token counts: what is measured or tuned for one serves those near it."""

from __future__ import annotations

import math
from collections.abc import Iterable

BUCKETS = 32
"""Densities up to 1/4 are decided in steps of 1/32, up to 1/2 of 2/32 and above of 4/32: see `bucket_of`."""


def bucket_of(density: float) -> int:
    """Round a density up to one that is measured, in units of 1/``BUCKETS``.

    So an annealed density measures a few times, not at every update, and what is measured is never sparser than what
    will run. Buckets widen with the density: there they are a smaller share of it, and a measurement takes longer.
    """
    bucket = max(1, math.ceil(density * BUCKETS - 1e-9))
    width = 1 if bucket <= BUCKETS // 4 else 2 if bucket <= BUCKETS // 2 else 4
    return -(-bucket // width) * width


def search_order(densities: Iterable[float]) -> list[float]:
    """Return one density of each bucket in the order of a search: the ends first, then middles of what is between.

    Where a faster backend at one density answers for all lower ones, and a slower one for all higher ones, few of these
    have to be measured in this order.

    Example:
        >>> search_order([0.1, 0.2, 0.3, 0.4, 0.5, 0.101])
        [0.1, 0.5, 0.3, 0.2, 0.4]
    """
    distinct = sorted({bucket_of(density): density for density in reversed([*densities])}.items())
    ordered = [density for _, density in distinct]
    found, parts = ordered[:1] + ordered[1:][-1:], [ordered[1:-1]]
    while parts:
        part = parts.pop(0)
        if part:
            middle = len(part) // 2
            found.append(part[middle])
            parts += [part[:middle], part[middle + 1 :]]
    return found


def count_bucket(count: int) -> int:
    """Round a number of tokens or images to the nearest power of two, by ratio: at most a factor of 1.41 away.

    Experts, lengths and batches of many sizes so fall into few buckets. Nearest, and not up: counts that scatter around
    a power of two, as tokens do over experts, are in one bucket. The ratio of dense to sparse time changes little
    within one.

    Example:
        >>> [count_bucket(n) for n in (1, 3, 90, 91, 181, 182)]
        [1, 4, 64, 128, 128, 256]
    """
    return 1 << round(math.log2(count))
