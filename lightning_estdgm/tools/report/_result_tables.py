"""Tables of what else was found: whole runs, phases, and what is derived from joules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_estdgm.tools._stats import DASH, spread, spread_text
from lightning_estdgm.tools.report._cells import joules_text, marked, seconds_text, values_text, watts_text
from lightning_estdgm.tools.report._comparison import Comparison
from lightning_estdgm.tools.report._finished_run import FinishedRun, Kind
from lightning_estdgm.tools.report._parts import ReportTable, Row
from lightning_estdgm.tools.report._results import Arm
from lightning_estdgm.tools.report._words import Unit, Units


def whole_table(comparison: Comparison, units: Units) -> ReportTable:
    """Energy, time, power and metric of whole runs."""

    def of(head: str, value: Callable[[FinishedRun], Any], text: Callable[[list[Any], Kind], str]) -> Row | None:
        cells = [[value(run) for run in comparison.members[arm.name]] for arm in comparison.arms]
        if all(item is None for column in cells for item in column):
            return None
        return Row(head, tuple(text(column, arm.kind) for column, arm in zip(cells, comparison.arms, strict=True)))

    def energy(head: str, *keys: str) -> Row | None:
        return of(
            head, lambda run: _dig(run.energy, keys), lambda values, kind: joules_text(values, units.energy, kind)
        )

    def each(head: str, key: str) -> Row | None:
        one = Unit("J", 1.0)
        return of(head, lambda run: run.energy.get(key), lambda values, kind: joules_text(values, one, kind))

    def mean_watts(arm: Arm) -> str:
        return watts_text([run.joules for run in arm.runs], [run.seconds for run in arm.runs], arm.kind)

    idle = of(
        "idle power before the run",
        lambda run: _dig(run.energy, ("idle", "watts")),
        lambda values, kind: marked(spread_text(spread(values), unit="W"), kind),
    )
    rows = [
        energy("energy, gross", "total_joules"),
        energy("of it in training", "train_joules"),
        energy("of it in validation", "val_joules"),
        *(energy(f"of it {kind.upper()}", "by_domain", kind) for kind in ("gpu", "cpu", "dram")),
        idle,
        energy("energy less idle", "idle", "net_joules"),
        of("time", lambda run: run.energy["seconds"], lambda values, _: seconds_text(values, units.time)),
        Row("mean power", tuple(mean_watts(arm) for arm in comparison.arms)),
        each("training energy a step", "joules_per_step"),
        each("training energy a sample", "joules_per_sample"),
    ]
    if comparison.target:
        metric = comparison.target.metric
        rows += [
            Row(f"best {metric}", tuple(spread_text(spread(run.best for run in arm.runs)) for arm in comparison.arms)),
            Row(f"last {metric}", tuple(spread_text(spread(run.final for run in arm.runs)) for arm in comparison.arms)),
        ]
    note = "From the start of fit to its end: set-up, compilation, mask updates and validation are in it."
    return ReportTable("Whole runs", comparison.columns, tuple(row for row in rows if row is not None), note)


def phase_table(comparison: Comparison, units: Units) -> ReportTable | None:
    """Energy, time and power of each arm by phase; None if no run knows its phases."""
    rows = []
    for arm in comparison.arms:
        runs = comparison.members[arm.name]
        for phase in dict.fromkeys(phase for run in runs for phase in run.energy["by_phase"]):
            joules = [run.energy["by_phase"].get(phase) for run in runs]
            seconds = [run.energy["seconds_by_phase"].get(phase) for run in runs]
            cells = (
                phase,
                joules_text(joules, units.energy, arm.kind),
                seconds_text(seconds, units.time),
                watts_text(joules, seconds, arm.kind),
            )
            rows.append(Row(arm.name, cells))
    if not rows:
        return None
    note = "Mean over the runs of an arm. Validation is in the phase in which it ran."
    return ReportTable("By phase", ("arm", "phase", "energy", "time", "mean power"), tuple(rows), note)


def derived_table(comparison: Comparison, units: Units) -> ReportTable | None:
    """Emissions and cost by factors that the user stated; None without them."""
    rows = []
    for key, head in (("grams_co2", "CO2 of the run, g"), ("cost", "cost of the run")):
        cells = []
        for arm in comparison.arms:
            found = [run.energy.get("footprint") or {} for run in comparison.members[arm.name]]
            currency = found[0].get("currency") if key == "cost" else ""
            text = spread_text(spread(each.get(key) for each in found), unit=currency or "")
            cells.append(marked(text, arm.kind))
        if set(cells) != {DASH}:
            rows.append(Row(head, tuple(cells)))
    if not rows:
        return None
    factors = {
        "grams_co2_per_kwh": "g CO2 a kWh",
        "price_per_kwh": "price a kWh",
        "pue": "energy of the building over that of its computers (PUE)",
    }
    for key, head in factors.items():
        values = tuple(
            values_text((run.energy.get("footprint") or {}).get(key) for run in comparison.members[arm.name])
            for arm in comparison.arms
        )
        rows.append(Row(f"stated: {head}", values))
    note = "Joules times factors that the user stated; nothing of it is measured."
    return ReportTable("CO2 and cost, derived", comparison.columns, tuple(rows), note)


def _dig(content: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content
