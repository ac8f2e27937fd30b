"""Machine, versions and command of a benchmark."""

from __future__ import annotations

import os
import platform
from datetime import datetime
from typing import Any

import torch

from lightning_estdgm._environment import package_version, processor_name
from lightning_estdgm.tools._terminal import command_line


def default_device() -> str:
    """Return "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """Return the name of the GPU, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def environment() -> dict[str, Any]:
    """Return versions and machine, for readers to judge seconds by."""
    return {
        "python": platform.python_version(),
        **{
            name: package_version(name) or "not installed"
            for name in ("lightning-estdgm", "lightning", "torch", "triton", "numpy")
        },
        "platform": platform.platform(),
        "cpu": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def header() -> dict[str, Any]:
    """Return the beginning of a benchmark's JSON: the command, the date (local time) and the environment."""
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"command": command_line(), "date": date, "environment": environment()}
