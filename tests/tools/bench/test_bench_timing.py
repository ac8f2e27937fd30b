"""Calls are timed in turns, on a GPU between events."""

import torch

from lightning_estdgm.tools.bench.kernels import _timing as timing


def test_calls_take_turns_after_one_to_warm_up(monkeypatch):
    order = []
    ticks = iter([0.0, 5.0, 10.0, 11.0, 20.0, 23.0, 30.0, 37.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    assert timing.take_turns(calls, torch.device("cpu"), rounds=2) == {"a": 3.0, "b": 1.0}
    assert order == ["a", "b", "a", "b", "a", "b"]


def test_calls_on_a_gpu_lie_between_events_with_a_cold_cache(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("event")
            self.at = len(order)

        def elapsed_time(self, end):
            return 1000.0 * (end.at - self.at)

    cache = torch.ones(4)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))

    def call():
        assert cache.count_nonzero() == 0
        cache.fill_(1.0)
        order.append("call")

    assert timing._between_events(call, cache, 2) == [2.0, 2.0]
    assert order == ["event", "call", "event", "event", "call", "event", "wait"]
