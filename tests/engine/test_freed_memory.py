"""Freed memory goes back to the system: when packed runs ask for it, and where there is no glibc."""

import ctypes
import subprocess
import sys
import weakref

import pytest

from helpers.controller_runs import STEPS, adamw, fit
from helpers.storages import config
from lightning_estdgm.engine import _freed_memory, _packed_storage
from lightning_estdgm.engine._controller import DGMController


@pytest.fixture(autouse=True)
def nobody_wants_it(monkeypatch):
    """Runs of other tests that were not closed do not count."""
    monkeypatch.setattr(_freed_memory, "_WHO_WANTS", weakref.WeakSet())
    with _freed_memory.mapped_allocations():
        pass


def test_what_a_run_that_was_not_closed_wanted_ends_with_it():
    class Run:
        pass

    run = Run()
    _freed_memory.map_allocations(run, True)
    assert len(_freed_memory._WHO_WANTS) == 1
    del run
    assert len(_freed_memory._WHO_WANTS) == 0


def test_without_glibc_nothing_is_done(monkeypatch):
    _freed_memory._of_c_library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert _freed_memory.return_freed_memory() is False
    with _freed_memory.mapped_allocations():
        pass
    _freed_memory._of_c_library.cache_clear()


_MAPPINGS = """
import ctypes, torch
from lightning_estdgm.engine import _freed_memory

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", *"abcdef")]

def mapped():  # how many allocations glibc maps by themselves for 8 MiB
    info = ctypes.CDLL(None).mallinfo2
    info.restype = Info
    before = info().hblks
    kept = torch.empty(2**21)
    return info().hblks - before if kept.numel() else None

with _freed_memory.mapped_allocations():
    with _freed_memory.mapped_allocations():
        print(mapped())
    print(mapped())
print(mapped())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or newer")
def test_large_allocations_are_mapped_inside_alone():
    """In a process of its own: glibc maps nothing that fits into memory which other tests have freed."""
    ran = subprocess.run([sys.executable, "-c", _MAPPINGS], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["1", "1", "0"]


def test_packed_runs_map_in_observed_steps_alone(mlp):
    model = mlp(32, 256, 128, 4)
    optimizer = adamw(model)
    seen = {True: set(), False: set()}
    with DGMController(model, optimizer, config(4), total_steps=STEPS) as dgm:
        for step, _ in fit(model, optimizer, dgm, last=12):
            dgm.mask_weights()
            if step > 1:
                seen[dgm.observing].add(bool(_freed_memory._WHO_WANTS))
    assert seen == {True: {True}, False: {False}}
    assert not _freed_memory._WHO_WANTS


def test_packed_runs_ask_before_each_window_and_after_each_update(mlp, monkeypatch):
    asked, seen = [0], []
    monkeypatch.setattr(_packed_storage, "return_freed_memory", lambda: asked.__setitem__(0, asked[0] + 1))
    model = mlp(32, 256, 128, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, config(4), total_steps=STEPS) as dgm:
        asked[0] = 0
        dgm.mask_weights()
        for _, updated in fit(model, optimizer, dgm, last=12):
            seen.append((updated, asked[0]))
            asked[0] = 0
            dgm.mask_weights()
    updates = sum(updated for updated, _ in seen)
    assert updates >= 3
    assert all(count >= 1 for updated, count in seen if updated)
    assert sum(count for _, count in seen) <= 2 * updates + 1
