"""Environment of a run on this machine: cache folder, processor, versions of packages."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/lightning_estdgm``, by default in ``~/.cache``; it need not exist yet.

    It holds what is dear to make and good for one machine: compiled operators, timings of layers.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lightning_estdgm"


def processor_name() -> str:
    """Return the processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())


def package_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None; so too for a source tree that was never installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
