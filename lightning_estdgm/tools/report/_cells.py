"""Numbers of a report as the text of a cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning_estdgm.tools._stats import DASH, Spread, number, ratio, spread, spread_text
from lightning_estdgm.tools.report._contrast import Saving
from lightning_estdgm.tools.report._finished_run import Kind
from lightning_estdgm.tools.report._words import Unit, text

NOT_COMPARABLE = "not comparable"


def marked(text: str, kind: Kind) -> str:
    """Add to a number made from joules that they are not measured, where they are not."""
    return text if text == DASH or kind in ("measured", "unknown") else f"{text} ({kind})"


def steps_text(values: Iterable[int | None]) -> str:
    """Mean and deviation of steps, or the one step that all share."""
    found = list(values)
    known = {value for value in found if value is not None}
    if len(known) == 1 and None not in found:
        return str(known.pop())  # as in runs with validations at the same steps
    return spread_text(spread(found))


def joules_text(values: Iterable[float | None], unit: Unit, kind: Kind) -> str:
    """Mean and deviation of joules in a unit, with their kind."""
    return marked(spread_text(spread(values), scale=1 / unit.size, unit=unit.name), kind)


def seconds_text(values: Iterable[float | None], unit: Unit) -> str:
    """Mean and deviation of seconds in a unit."""
    return spread_text(spread(values), scale=1 / unit.size, unit=unit.name)


def watts_text(joules: Sequence[float | None], seconds: Sequence[float | None], kind: Kind) -> str:
    """Mean and deviation of each run's joules over its seconds, with the kind of the joules."""
    return marked(spread_text(spread(map(ratio, joules, seconds)), unit="W"), kind)


def share_text(values: Spread) -> str:
    """A share in percent with its deviation, without its sign."""
    mean = values["mean"]
    return spread_text({**values, "mean": None if mean is None else abs(mean)}, 1, scale=100.0, unit="%")


def less_text(saving: Saving) -> str:
    """ "12.0 ± 0.3 % less", with the kind of the joules."""
    word = "more" if saving.share["mean"] is not None and saving.share["mean"] < 0 else "less"
    text = share_text(saving.share)
    return marked(text if text == DASH else f"{text} {word}", saving.joules_kind)


def as_fast_text(saving: Saving) -> str:
    """ "1.667 ± 0.012 × as fast"."""
    return spread_text(saving.speedup, unit="× as fast")


def values_text(values: Iterable[Any]) -> str:
    """Each different value once; a dash where there is none."""
    return (
        " / ".join(
            dict.fromkeys(
                number(value) if isinstance(value, float) else text(value) for value in values if value is not None
            )
        )
        or DASH
    )
