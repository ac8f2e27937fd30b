"""Progress of commands: on a terminal a bar, elsewhere lines."""

from __future__ import annotations

import io
import re
import time

from rich.console import Console

from lightning_estdgm.tools import _progress
from lightning_estdgm.tools._progress import BarOfSteps, LinesOfSteps, progress_of, waiting


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), width=110, force_terminal=terminal)


def said(by: Console) -> str:
    return by.file.getvalue()  # type: ignore[attr-defined]


def test_lines_tell_the_first_step_of_each_part_at_once() -> None:
    log = console(False)
    with progress_of(log, 4) as steps:
        assert isinstance(steps, LinesOfSteps)
        for part in ("dense", "sparse"):
            steps.begin(part)
            steps.advance("loss 2.0")
            steps.advance("loss 1.0")
            steps.say(f"{part} is over")
    lines = said(log).splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "dense: loss 2.0", "dense is over", "sparse: loss 2.0", "sparse is over"
    ]  # fmt: skip
    assert re.fullmatch(r"sparse: loss 2.0 \| 3 of 4 steps, \d+:\d\d, about \d+:\d\d left", lines[2])


def test_steps_that_are_known_late_are_counted() -> None:
    log = console(False)
    with progress_of(log, 1) as steps:
        steps.expect(2)
        steps.begin("small")
        steps.advance("loss 2.0")
    assert " | 1 of 3 steps" in said(log)
    bar = console(True)
    with progress_of(bar, 1) as steps:
        assert isinstance(steps, BarOfSteps)
        steps.expect(3)
        steps.advance("loss 2.0")
        assert steps._progress.tasks[0].percentage == 25


def test_a_part_that_takes_long_is_heard_of_before_its_first_step(monkeypatch) -> None:
    monkeypatch.setattr(_progress, "EVERY_S", 0.01)
    log = console(False)
    with progress_of(log, 4) as steps:
        steps.begin("sparse")
        until = time.monotonic() + 60
        while "sparse: first step | 0 of 4 steps" not in said(log):
            assert time.monotonic() < until
            time.sleep(0.01)


def test_waiting_is_heard_of(monkeypatch) -> None:
    monkeypatch.setattr(_progress, "EVERY_S", 0.01)
    log = console(False)
    with waiting(log, "Reading"):
        assert said(log) == "Reading ...\n"
        until = time.monotonic() + 60
        while "Reading ... 0 s\n" not in said(log):
            assert time.monotonic() < until
            time.sleep(0.01)
    length = len(said(log))
    time.sleep(0.05)
    assert len(said(log)) == length  # and no longer


def test_a_terminal_has_a_bar() -> None:
    terminal = console(True)
    with progress_of(terminal, 2) as steps:
        assert isinstance(steps, BarOfSteps)
        steps.begin("dense")
        steps.advance("loss 2.0")
        steps.advance("loss 1.0")
        steps.say("dense is over")
    assert "100%" in said(terminal)
    assert "dense is over" in said(terminal)
