"""On what machine and with which versions a benchmark ran."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lightning_estdgm.ops.measurements import cpu_model

__all__ = ["environment"]


def environment() -> dict[str, Any]:
    """Versions and machine: what a reader needs to judge the seconds."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in ("lightning-estdgm", "lightning", "torch", "numpy")},
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:  # a source tree that was never installed
        return "not installed"
