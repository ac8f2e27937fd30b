"""Buckets of densities: what is measured or tuned for one density serves those near it."""

from __future__ import annotations

import math

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
