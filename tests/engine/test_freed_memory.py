"""Freed memory goes back to the system: when packed runs ask for it, and where there is no glibc."""

import ctypes

from helpers.controller_runs import STEPS, adamw, fit
from helpers.storages import config
from lightning_estdgm.engine import _freed_memory, _packed_storage
from lightning_estdgm.engine._controller import DGMController


def test_without_glibc_nothing_is_done(monkeypatch):
    _freed_memory._malloc_trim.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert _freed_memory.return_freed_memory() is False
    _freed_memory._malloc_trim.cache_clear()


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
