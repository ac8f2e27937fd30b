"""The sums of a run over restarts: nothing lost, nothing twice, in whatever order things happen."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lightning_estdgm.energy._accumulator import Accumulator
from lightning_estdgm.energy._ledger import Ledger
from lightning_estdgm.energy._reading import DeviceId, Reading, Status
from lightning_estdgm.energy._totals import Cell, Totals

GPU, FAR = DeviceId("a", "gpu", "GPU-1"), DeviceId("b", "gpu", "GPU-2")


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Restarts(RuleBasedStateMachine):
    """A run that is saved, restored, crashed and continued at will, with a second rank beside it.

    `expected` is kept from the true energy alone: what was drawn between two good readings of one fit. A fit's sums
    come on top of what was restored last, and go with the process that dies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.true_uj = self.fits = 0
        self.origin_uj = 10**12  # of the counter
        self.since: int | None = None  # true energy at the last good reading
        self.saved: list[tuple[dict[str, Any], tuple[int, ...], str]] = []
        self.begin_process()

    def begin_process(self) -> None:
        self.ledger = Ledger()
        self.base = (0, 0, 0, 0)  # own joules, the other rank's, nanoseconds, steps
        self.acc: Accumulator | None = None
        self.clear_fit()

    def clear_fit(self) -> None:
        self.fit = ""
        self.fit_uj = self.fit_ns = self.far_uj = self.far_known_uj = self.steps = 0

    def expected(self) -> tuple[int, ...]:
        ours = (self.fit_uj, self.far_known_uj, self.fit_ns, self.steps)
        return tuple(a + b for a, b in zip(self.base, ours, strict=True))

    def own(self) -> Totals:
        assert self.acc is not None
        totals = self.acc.totals()
        totals.steps, totals.counts = self.steps, {"sample": 4 * self.steps}
        return totals

    @rule()
    @precondition(lambda self: self.acc is None)
    def start_a_fit(self) -> None:
        self.fits += 1
        self.fit = f"fit {self.fits}"
        self.acc = Accumulator()
        self.acc.add_device(GPU, source="nvml", method="counter")
        self.acc.switch(self.now, "exploration", "train")
        self.since = None
        self.ledger.begin(self.fit, self.own)

    @rule(
        passed=st.integers(1, 10**9),
        watts=st.integers(0, 700),
        outcome=st.sampled_from(["ok", "ok", "ok", "error", "lost", "missing", "reset", "not due"]),
    )
    @precondition(lambda self: self.acc is not None)
    def read(self, passed: int, watts: int, outcome: str) -> None:
        assert self.acc is not None
        self.now += passed
        self.fit_ns += passed
        self.true_uj += watts * passed // 1000
        if outcome == "reset":
            self.origin_uj, self.since = -self.true_uj, None  # it reads 0 now
        readings = {GPU: Reading(self.now, energy_uj=self.origin_uj + self.true_uj)}
        if outcome in ("error", "lost"):
            status = Status.ERROR if outcome == "error" else Status.UNAVAILABLE
            readings = {GPU: Reading(self.now, status=status)}
        if outcome in ("missing", "not due"):
            readings = {}
        self.acc.update(self.now, readings, {GPU} if outcome == "not due" else ())
        if outcome == "lost":
            self.since = None
        elif outcome in ("ok", "reset"):
            self.fit_uj += 0 if self.since is None else self.true_uj - self.since
            self.since = self.true_uj

    @rule(label=st.sampled_from(["exploration", "refinement"]), stage=st.sampled_from(["train", "val"]))
    @precondition(lambda self: self.acc is not None)
    def switch(self, label: str, stage: str) -> None:
        assert self.acc is not None
        self.acc.switch(self.now, label, stage)

    @rule()
    @precondition(lambda self: self.acc is not None)
    def step(self) -> None:
        self.steps += 1

    @rule(uj=st.integers(1, 10**9), told=st.booleans())
    @precondition(lambda self: self.acc is not None)
    def the_other_rank_works(self, uj: int, told: bool) -> None:
        self.far_uj += uj
        if not told:
            return  # it is known from the next exchange on
        cell = Cell("nvml", "counter", FAR, "exploration", "train")
        far = Totals({cell: self.far_uj}, {("exploration", "train"): self.now}, steps=self.steps)
        self.ledger.others = Totals().add(far, beside=True)
        self.far_known_uj = self.far_uj

    @rule()
    def save(self) -> None:
        self.saved.append((through_a_file(self.ledger.state_dict()), self.expected(), self.fit))

    @rule(which=st.integers(0, 10**6), times=st.integers(1, 2))
    @precondition(lambda self: self.saved)
    def restore(self, which: int, times: int) -> None:
        state, expected, fit = self.saved[which % len(self.saved)]
        for _ in range(times):
            self.ledger.load_state_dict(state)
        if not (self.fit and fit == self.fit):
            self.base = expected  # type: ignore[assignment]

    @rule()
    @precondition(lambda self: self.acc is not None)
    def end_the_fit(self) -> None:
        self.base = self.expected()  # type: ignore[assignment]
        self.ledger.end()
        self.acc = None
        self.clear_fit()

    @rule()
    def crash(self) -> None:
        self.begin_process()

    @rule()
    def copy_to_another_process(self) -> None:
        copy = pickle.loads(pickle.dumps(self.ledger))
        assert copy.total() == self.ledger.total()

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        totals = self.ledger.total()
        by_device = totals.device_uj()
        ns = sum(totals.window_ns.values())
        assert (by_device.get(GPU, 0), by_device.get(FAR, 0), ns, totals.steps) == self.expected()
        for cut in ("label", "stage"):
            parts: dict[str, int] = {}
            for cell, uj in totals.energy_uj.items():
                parts[getattr(cell, cut)] = parts.get(getattr(cell, cut), 0) + uj
            assert sum(parts.values()) == sum(self.expected()[:2])
        assert totals.counts.get("sample", 0) == 4 * totals.steps
        assert sum(totals.device_ns.values()) == totals.covered_ns <= totals.expected_ns


Restarts.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestRestarts = Restarts.TestCase


OF_RELEASE_0_1 = {
    "totals": {
        "version": 1,
        "energy_uj": [["nvml", "counter", "a", "gpu", "GPU-1", "train", "train", 3_000_000]],
        "window_ns": [["train", "train", 2 * 10**9]],
        "covered_ns": 10**9,
        "expected_ns": 2 * 10**9,
        "gaps": 1,
        "segments": 2,
    },
    "steps": 8,
    "samples": 32,
}


def test_a_checkpoint_of_release_0_1_still_loads() -> None:
    ledger = Ledger()
    ledger.load_state_dict(OF_RELEASE_0_1)
    ledger.begin("fit", lambda: Totals(steps=2, counts={"sample": 8, "token": 80}))
    totals = ledger.total()
    assert totals.joules() == 3.0
    assert (totals.seconds, totals.coverage_ratio, totals.gaps, totals.segments) == (2.0, 0.5, 1, 2)
    assert totals.steps == 10
    assert totals.counts == {"sample": 40, "token": None}  # nobody counted tokens then
    assert totals.net_joules is None


def test_a_state_of_the_future_is_refused_and_changes_nothing() -> None:
    ledger = Ledger()
    ledger.load_state_dict(OF_RELEASE_0_1)
    with pytest.raises(ValueError, match="version 1 or 2 expected, got 3"):
        ledger.load_state_dict({"totals": {"version": 3}, "fit": ""})
    assert ledger.total().joules() == 3.0
