"""Launches of Triton kernels: device, options, limits. Importing this module imports Triton."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton

from lightning_estdgm.sparse.backends.triton._tiles import Tiles

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET at the time Triton was imported."""

TOO_BIG = (triton.runtime.errors.OutOfResources,)
"""Raised by a launch that wants more shared memory or registers than the device has."""

SWIZZLE = 8
"""Tiles of tokens or pixels that share one sweep over the weight, so that both stay in the L2 cache."""


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors (compute units) of a GPU; few where the interpreter stands in for one."""
    return 4 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make ``device`` the current one: Triton launches there, whatever device its arguments are on."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def options(tiles: Tiles, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """Keyword arguments of the launch of a product."""
    return {
        "PRECISION": precision if dtype == torch.float32 else "ieee",
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": True,  # Triton's own default; unnamed, 3.9 warns that it will change
    }
