"""Requirements of the Triton backend: blocks, dtypes, devices, version. Triton itself is imported only to be asked."""

from __future__ import annotations

import functools
import importlib.util
import os
import re

import torch

MIN_TRITON = (3, 6)
BLOCK_SIZES = (16, 32, 64, 128)
UNIT_LENGTHS = (8, 16, 32)
"""Outputs of a unit that share one input, in linear layers; units of one output have as many inputs."""

MAX_TAPS = 15
"""Most taps of a convolution's kernel, a side: which of them meet the image is a bit each, both sides in one int32."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_CAPABILITY = (8, 0)


@functools.cache
def triton_refusal() -> str | None:
    """Reason why the installed Triton, if any, cannot be used, or None."""
    wanted = "triton>=" + ".".join(map(str, MIN_TRITON))
    if importlib.util.find_spec("triton") is None:
        return f"needs {wanted}, which is not installed"
    import triton

    numbers = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if numbers is None or tuple(map(int, numbers.groups())) < MIN_TRITON:
        return f"needs {wanted}, found {triton.__version__}"
    return None


@functools.cache
def device_refusal(device: torch.device) -> str | None:
    """Reason why kernels cannot run on a device, or None."""
    if device.type not in ("cuda", "cpu"):
        return f"runs on NVIDIA and AMD GPUs, got device {device}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"runs on NVIDIA and AMD GPUs (on the CPU only for tests, with TRITON_INTERPRET=1), got device {device}"
    reason = triton_refusal()
    if reason is not None:
        return reason
    if device.type == "cpu" and not _is_interpreted():
        return "needs TRITON_INTERPRET=1 to be set before triton is imported to run on the CPU"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            return f"needs CUDA capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}, got {capability[0]}.{capability[1]}"
    return None


def _is_interpreted() -> bool:
    from lightning_estdgm.sparse.backends.triton import _launch as launch  # which imports Triton

    return launch.INTERPRETED
