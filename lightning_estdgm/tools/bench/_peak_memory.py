"""`allocated`: bytes that torch's tensors on the CPU take while something runs; `peak_resident`: the process's most."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from torch.autograd.profiler import profile


def allocated(run: Callable[[], object], mapped: int = 0) -> tuple[int, int]:
    """Run something and return the bytes it left allocated, less what it freed, and the most while it ran.

    Both are counted from what was allocated before. Memory that torch does not allocate is not in them, nor is a mapped
    file of `mapped` bytes.
    """
    gc.collect()  # what nobody holds any more would count as freed by the run
    with profile(profile_memory=True, use_kineto=True) as record:
        run()
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes() if abs(event.nbytes()) != mapped else 0
        peak = max(peak, held)
    return held, peak


def peak_resident() -> int:
    """Return the most resident bytes that this process has had.

    Linux's own count is read where there is one: in a process that another has started, that of `getrusage` begins with
    what the other had.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
