"""What the native backend did with weights: how often it laid them out, and how much it keeps of them."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_estdgm.sparse.backends._protocol import get_backend
from lightning_estdgm.sparse.backends.native._build import library


def packings() -> int:
    """Return how often a weight was laid out so far; skip the test where nothing can be compiled."""
    loaded = library()
    if isinstance(loaded, str):
        pytest.skip(loaded)
    count: int = loaded.estdgm_packings()
    return count


def kept_bytes() -> int:
    """Return the bytes of all weights that are kept."""
    native: Any = get_backend("native")
    return sum(entry.nbytes for entry in native._kept._entries.values() if entry.kept is not None)
