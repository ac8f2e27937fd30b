"""Progress of commands: a bar on a terminal, and elsewhere (a file, the log of a CI run) a line every few seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

EVERY_S = 5.0
"""Seconds between two lines where the output is no terminal."""


class Steps(Protocol):
    """Progress over a number of steps, in parts that have titles."""

    def begin(self, title: str) -> None:
        """Go on with the next part."""

    def expect(self, steps: int) -> None:
        """Count on so many steps more."""

    def advance(self, state: str) -> None:
        """One step further; ``state`` says where it stands."""

    def say(self, text: str) -> None:
        """Print a line of its own."""


class BarOfSteps:
    """`Steps` as a live bar on a terminal.

    Args:
        progress: the live display.
        total: number of steps.

    """

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total = progress, total
        self._task = progress.add_task("", total=total, state="")

    def begin(self, title: str) -> None:
        """Show the title before the bar."""
        self._progress.update(self._task, description=title, state="")

    def expect(self, steps: int) -> None:
        """Make the bar's whole longer."""
        self._total += steps
        self._progress.update(self._task, total=self._total)

    def advance(self, state: str) -> None:
        """Move the bar."""
        self._progress.update(self._task, advance=1, state=state)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, soft_wrap=True)


class LinesOfSteps:
    """`Steps` as lines: the first step of a part at once, then what `beat` prints.

    Args:
        console: where the lines go.
        total: number of steps.

    """

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total = console, total
        self._done, self._title, self._state = 0, "", ""
        self._began = time.monotonic()

    def begin(self, title: str) -> None:
        """Take the title for the lines to come."""
        self._title, self._state = title, ""

    def expect(self, steps: int) -> None:
        """Add to the number of steps."""
        self._total += steps

    def advance(self, state: str) -> None:
        """Count a step; print a line if it is the first one of its part."""
        is_first = not self._state
        self._done += 1
        self._state = state
        if is_first:
            self.beat()

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, soft_wrap=True)

    def beat(self) -> None:
        """Print where the work stands."""
        took = time.monotonic() - self._began
        left = f", about {_clock(took / self._done * (self._total - self._done))} left" if self._done else ""
        state = self._state or "first step"
        self.say(f"{self._title}: {state} | {self._done} of {self._total} steps, {_clock(took)}{left}")


@contextmanager
def progress_of(console: Console, total: int) -> Iterator[Steps]:
    """Show the progress of so many steps."""
    if not console.is_terminal:
        lines = LinesOfSteps(console, total)
        with _every(EVERY_S, lines.beat):
            yield lines
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield BarOfSteps(progress, total)


@contextmanager
def waiting(console: Console, text: str) -> Iterator[None]:
    """Say what the command is doing while a block runs that has no steps: a line, and on a terminal a spinner."""
    if console.is_terminal:
        with console.status(f"{text} ..."):
            yield
        return
    began = time.monotonic()
    console.print(f"{text} ...", soft_wrap=True)
    with _every(EVERY_S, lambda: console.print(f"{text} ... {time.monotonic() - began:.0f} s", soft_wrap=True)):
        yield


@contextmanager
def _every(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Call a function again and again from a thread while the block runs."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            call()

    thread = threading.Thread(target=repeat, name="estdgm-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
