"""Freed memory goes back to the system, where the C library keeps it.

Allocations of many sizes leave free memory between those that stay: a third of a process that trains packed weights,
and most of what saving takes. glibc gives whole pages of it back when asked to, in some 40 ms for 2 GB. What it has
mapped by itself goes back as soon as it is freed. It maps large allocations only, and raises what is large up to 32 MiB
as it goes. So each is mapped while whole layers come and go. In other steps they are not, as new pages take time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import weakref
from collections.abc import Iterator
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_MAPPED, _USUAL = 2**20, 2**25  # bytes from which on allocations are mapped; the most that glibc itself comes to
_TUNED = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")  # by the user, who is left alone

_WHO_WANTS: weakref.WeakSet[Any] = weakref.WeakSet()  # of runs that are not there any more, none wants it


def return_freed_memory() -> bool:
    """Give freed memory of this process back to the system; return whether any was. Does nothing without glibc."""
    trim = _of_c_library("malloc_trim", ctypes.c_size_t)
    return trim is not None and bool(trim(0))


def map_allocations(who: object, wanted: bool) -> None:
    """Have allocations of 1 MiB and more mapped one by one, as long as anyone wants it. Does nothing without glibc.

    Those that fit into memory which was freed before, and not given back, are still taken from there.
    """
    (_WHO_WANTS.add if wanted else _WHO_WANTS.discard)(who)
    tune = _of_c_library("mallopt", ctypes.c_int, ctypes.c_int)
    if tune is not None and not any(name in os.environ for name in _TUNED):
        tune(_MMAP_THRESHOLD, _MAPPED if _WHO_WANTS else _USUAL)
        tune(_TRIM_THRESHOLD, 2 * _USUAL)


@contextlib.contextmanager
def mapped_allocations() -> Iterator[None]:
    """Have allocations of 1 MiB and more mapped one by one inside."""
    who = _Wants()
    map_allocations(who, True)
    try:
        yield
    finally:
        map_allocations(who, False)


class _Wants:
    """What wants allocations mapped, for a while."""


@functools.lru_cache
def _of_c_library(name: str, *arguments: Any) -> Any:
    try:
        function = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # another C library; TypeError: Windows
        return None
    function.argtypes, function.restype = arguments, ctypes.c_int
    return function
