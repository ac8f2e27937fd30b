"""Cases for the never-slower choice, and clocks that time them without running them."""

import io
from collections import Counter

import torch

from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse.autotune._cases import Case, ConvCase, _Problem
from lightning_estdgm.sparse.autotune._timing import Stopwatch

LAYER = {
    "tokens": 64,
    "out_features": 64,
    "in_features": 96,
    "block_size": 16,
    "dtype": torch.float32,
    "device": torch.device("cpu"),
}


class Clock:
    """Dense takes 9 ms; sparse takes a share of it that rises with the density. Counts what it was asked."""

    def __init__(self, sparse_share=lambda density: 2 * density):
        self.sparse_share = sparse_share
        self.asked = []

    def __call__(self, case, names):
        self.asked.append((case, tuple(names)))
        return {name: 9e-3 * (1.0 if name == "dense" else self.sparse_share(case.density)) for name in names}


def never(case, names):
    raise AssertionError(f"measured {names} on {case}")


def linear_case(**change):
    return Case(**{**LAYER, "density": 0.25, **change})


CONV = {
    "batch": 2,
    "height": 9,
    "width": 6,
    "out_channels": 32,
    "in_channels": 48,
    "geometry": ConvGeometry((3, 1), (2, 1), (1, 0)),
    "block_size": 16,
    "dtype": torch.float32,
    "device": torch.device("cpu"),
}


POINTWISE = ConvGeometry((1, 1))


def conv_case(**change):
    return ConvCase(**{**CONV, "density": 0.5, **change})


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class ScriptedCase:
    """A case whose forwards take the time that a script says, on clocks of its own.

    Args:
        spend: Seconds of the n-th call (from 0) of a name.
        own: Share of the time that the thread computes, or that by the number of calls so far.
        load: Load average for each core.
    """

    device = torch.device("cpu")

    def __init__(self, spend, own=1.0, load=None):
        self.spend, self.load = spend, load
        self.own = own if callable(own) else lambda calls: own
        self.now = self.computed = 0.0
        self.calls = Counter()

    def stopwatch(self):
        return Stopwatch(lambda: self.now, lambda: self.computed, lambda: self.load)

    def problem(self):
        leaf = torch.zeros(1)

        def forward(name):
            seconds = self.spend(name, self.calls[name])
            self.now += seconds
            self.computed += seconds * self.own(sum(self.calls.values()))
            self.calls[name] += 1
            return 2 * leaf

        return _Problem([leaf], torch.ones(1), forward)
