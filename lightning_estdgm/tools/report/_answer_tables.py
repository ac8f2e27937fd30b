"""Tables that the headlines rest on: energy to the target, and at the same budget of steps."""

from __future__ import annotations

from collections.abc import Callable

from lightning_estdgm.tools._stats import DASH, spread, spread_text
from lightning_estdgm.tools.report._cells import (
    NOT_COMPARABLE,
    as_fast_text,
    joules_text,
    less_text,
    seconds_text,
    steps_text,
    watts_text,
)
from lightning_estdgm.tools.report._comparison import Comparison
from lightning_estdgm.tools.report._contrast import Contrast, Saving
from lightning_estdgm.tools.report._parts import ReportTable, Row
from lightning_estdgm.tools.report._results import Arm
from lightning_estdgm.tools.report._words import Units


def target_table(comparison: Comparison, units: Units) -> ReportTable | None:
    """Energy and time until each arm reached the target; None without a target."""
    target = comparison.target
    if target is None:
        return None

    def reached(cell: Callable[[Arm], str]) -> tuple[str, ...]:
        return tuple(cell(arm) if all(run.reached for run in arm.runs) else DASH for arm in comparison.arms)

    def points(arm: Arm, name: str) -> list[float | None]:
        return [getattr(run.reached, name) for run in arm.runs]

    rows = [
        Row("runs that reached it", tuple(f"{len(a.runs) - _misses(a)} of {len(a.runs)}" for a in comparison.arms)),
        Row("energy until then", reached(lambda a: joules_text(points(a, "joules"), units.energy, a.kind))),
        Row("time until then", reached(lambda a: seconds_text(points(a, "seconds"), units.time))),
        Row("mean power until then", reached(lambda a: watts_text(points(a, "joules"), points(a, "seconds"), a.kind))),
        Row("at step", reached(lambda a: steps_text(point.step for run in a.runs if (point := run.reached)))),
        Row("last step seen to miss it", reached(lambda a: steps_text(run.missed_before for run in a.runs))),
    ]
    if comparison.contrasts:
        rows += [
            Row(f"energy against {comparison.baseline}", _against(comparison, lambda c: c.at_target, less_text)),
            Row(f"speed against {comparison.baseline}", _against(comparison, lambda c: c.at_target, as_fast_text)),
        ]
    note = f"Target: {target.rule}. The first logged value that meets it counts; the joules are those at its step."
    return ReportTable(f"Energy to the target {target}", comparison.columns, tuple(rows), note)


def _misses(arm: Arm) -> int:
    return sum(run.reached is None for run in arm.runs)


def budget_table(comparison: Comparison, units: Units) -> ReportTable | None:
    """Energy and time at the step that all runs came to; None for one arm, or if that step is not known."""
    steps = comparison.budget_steps
    if steps is None or not comparison.contrasts:
        return None

    def row(head: str, cell: Callable[[Arm], str]) -> Row:
        return Row(head, tuple(cell(arm) for arm in comparison.arms))

    def points(arm: Arm, name: str) -> list[float | None]:
        return [getattr(run.budget, name) for run in arm.runs]

    rows = [
        row("energy", lambda a: joules_text(points(a, "joules"), units.energy, a.kind)),
        row("time", lambda a: seconds_text(points(a, "seconds"), units.time)),
        row("mean power", lambda a: watts_text(points(a, "joules"), points(a, "seconds"), a.kind)),
    ]
    if comparison.target:
        rows.append(
            row(f"best {comparison.target.metric} so far", lambda a: spread_text(spread(r.budget_best for r in a.runs)))
        )
    rows += [
        Row(f"energy against {comparison.baseline}", _against(comparison, lambda c: c.at_budget, less_text)),
        Row(f"speed against {comparison.baseline}", _against(comparison, lambda c: c.at_budget, as_fast_text)),
    ]
    note = "The steps that every run came to. A saving stands here only where all runs reached the target by then."
    return ReportTable(f"At the same budget of {steps} steps", comparison.columns, tuple(rows), note)


def _against(
    comparison: Comparison, saving: Callable[[Contrast], Saving | None], text: Callable[[Saving], str]
) -> tuple[str, ...]:
    """The baseline's dash, then each arm's saving, or that there is none."""
    cells = [DASH]
    for contrast in comparison.contrasts:
        found = saving(contrast)
        cells.append(NOT_COMPARABLE if found is None else text(found))
    return tuple(cells)
