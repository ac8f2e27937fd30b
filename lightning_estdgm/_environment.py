"""Where this package keeps what is dear to make and good for one machine: compiled operators, measured choices."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/lightning_estdgm``, by default in ``~/.cache``; it need not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lightning_estdgm"
