"""`allocated`: bytes that torch's tensors on the CPU take while something runs, of its allocator's own record."""

from __future__ import annotations

from collections.abc import Callable

from torch.autograd.profiler import profile


def allocated(run: Callable[[], object]) -> tuple[int, int]:
    """Run something and return the bytes it left allocated, less what it freed, and the most while it ran.

    Both are counted from what was allocated before. Memory that torch does not allocate is not in them.
    """
    with profile(profile_memory=True, use_kineto=True) as record:
        run()
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return held, peak
