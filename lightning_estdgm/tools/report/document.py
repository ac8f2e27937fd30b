"""A comparison in words and tables, before any markup: what HTML and Markdown both show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_estdgm.tools.report.compare import Arm, Comparison, Contrast, RunResult, Saving, spread
from lightning_estdgm.tools.report.figures import units_of
from lightning_estdgm.tools.report.runs import Kind, Run
from lightning_estdgm.tools.report.words import Unit, Units, number, percent, text

__all__ = ["Document", "Headline", "Row", "Table", "document"]

NOT_COMPARABLE = "not comparable"
DASH = "–"


@dataclass(frozen=True)
class Headline:
    """What was found, in a sentence, with what stands behind it."""

    tone: Literal["saved", "cost more", "no difference", "not comparable", "single"]
    text: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A row of a table; ``differs`` marks what is not the same in all runs."""

    head: str
    cells: tuple[str, ...]
    differs: bool = False


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column is the rows' heads."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    style: Literal["", "words", "runs"] = ""  # cells with text instead of numbers; cells that stay on one line


@dataclass(frozen=True)
class Document:
    """A whole report but for its plots.

    Attributes:
        label: how the joules were got.
        answers: the tables that the headlines rest on.
        results: what else was found.
        provenance: what ran, and how it was measured.
    """

    title: str
    label: str
    headlines: tuple[Headline, ...]
    warnings: tuple[str, ...]
    answers: tuple[Table, ...]
    results: tuple[Table, ...]
    provenance: tuple[Table, ...]
    notes: tuple[str, ...]


def document(comparison: Comparison) -> Document:
    """Put a comparison into words."""
    units = units_of(comparison)

    def tables(*makers: Callable[[Comparison, Units], Table | None]) -> tuple[Table, ...]:
        return tuple(table for make in makers if (table := make(comparison, units)) is not None)

    models = {str(run.run["model"].get("class")) for runs in comparison.members.values() for run in runs}
    return Document(
        title=f"Energy of training {', '.join(sorted(models))}",
        label=_kinds_text(comparison),
        headlines=tuple(_headlines(comparison, units)),
        warnings=comparison.warnings,
        answers=tables(_target_table, _budget_table),
        results=tables(_whole_table, _phase_table, _derived_table),
        provenance=tables(_runs_table, _method_table, _settings_table, _sensor_table),
        notes=tuple(_notes(comparison)),
    )


# Numbers as text ----------------------------------------------------------------------------------------------


def mean_text(values: Mapping[str, Any], scale: float = 1.0) -> str:
    """Mean ± standard deviation of what `spread` gave, without the deviation of a single value.

    >>> mean_text(spread([1.0, 3.0])), mean_text(spread([2.0])), mean_text(spread([None]))
    ('2.0 ± 1.4', '2.000', '–')
    """
    mean, std = values["mean"], values["std"]
    if mean is None:
        return DASH
    shown = number(mean * scale)
    if std is None:
        return shown
    places = len(shown.partition(".")[2])
    if std:  # no more decimals than two digits of the deviation have
        places = max(0, min(places, 1 - math.floor(math.log10(std * scale))))
    return f"{mean * scale:.{places}f} ± {std * scale:.{places}f}"


def _marked(text: str, kind: Kind) -> str:
    """A figure made from joules says in its own place if they are not measured."""
    return text if text == DASH or kind in ("measured", "unknown") else f"{text} ({kind})"


def _with_unit(values: Mapping[str, Any], unit: str, scale: float = 1.0) -> str:
    text = mean_text(values, scale)
    return text if text == DASH else f"{text} {unit}"


def _steps(values: Iterable[int | None]) -> str:
    found = list(values)
    known = {value for value in found if value is not None}
    if len(known) == 1 and None not in found:
        return str(known.pop())  # as in runs with validations at the same steps
    return mean_text(spread(found))


def _joules(values: Iterable[float | None], unit: Unit, kind: Kind) -> str:
    return _marked(_with_unit(spread(values), unit.name, 1 / unit.size), kind)


def _seconds(values: Iterable[float | None], unit: Unit) -> str:
    return _with_unit(spread(values), unit.name, 1 / unit.size)


def _watts(joules: Sequence[float | None], seconds: Sequence[float | None], kind: Kind) -> str:
    return _marked(_with_unit(spread(map(_ratio, joules, seconds)), "W"), kind)


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under else None


def _percent(values: Mapping[str, Any], digits: int = 1) -> str:
    if values["mean"] is None:
        return DASH
    shown = percent(abs(values["mean"]), digits)
    return shown if values["std"] is None else f"{shown[:-2]} ± {percent(values['std'], digits)}"


def _less(saving: Saving) -> str:
    """ "12.0 ± 0.3 % less", with the kind of the joules."""
    word = "more" if saving.share["mean"] is not None and saving.share["mean"] < 0 else "less"
    text = _percent(saving.share)
    return _marked(text if text == DASH else f"{text} {word}", saving.joules_kind)


def _as_fast(saving: Saving) -> str:
    text = mean_text(saving.speedup)
    return text if text == DASH else f"{text} × as fast"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _kinds_text(comparison: Comparison) -> str:
    kinds = {arm.kind for arm in comparison.arms}
    if kinds == {"measured"}:
        return "measured"
    if kinds == {"unknown"}:
        return "no joules: no energy source"
    if kinds == {"estimated"}:
        return "ESTIMATED, not measured"
    return "; ".join(f"{arm.name}: {arm.kind}" for arm in comparison.arms)


# Headlines ------------------------------------------------------------------------------------------------------


def _headlines(comparison: Comparison, units: Units) -> Iterable[Headline]:
    base = comparison.arms[0]
    if not comparison.contrasts:
        used = _joules([run.joules for run in base.runs], units.energy, base.kind)
        text = f"{base.name} used {used} in {_seconds([run.seconds for run in base.runs], units.time)}."
        if used == DASH:
            text = f"{base.name} took {_seconds([run.seconds for run in base.runs], units.time)}; no joules are known."
        yield Headline("single", text, (f"{_plural(len(base.runs), 'run')}; nothing to compare with.",))
    for arm, contrast in zip(comparison.arms[1:], comparison.contrasts, strict=True):
        yield _headline(comparison, base, arm, contrast, units)


def _headline(comparison: Comparison, base: Arm, arm: Arm, contrast: Contrast, units: Units) -> Headline:
    saving = contrast.at_target
    if saving is None or saving.share["mean"] is None:
        return Headline("not comparable", f"Not comparable: {arm.name} and {base.name}.", contrast.reasons)
    mean, std = saving.share["mean"], saving.share["std"]
    energy = "energy" if arm.kind == "measured" else f"energy ({arm.kind})"
    much = f"{_percent(saving.share)} {'less' if mean >= 0 else 'more'} {energy} than"
    tone: Literal["saved", "cost more", "no difference"] = "saved" if mean > 0 else "cost more"
    if round(mean, 3) == 0:
        tone, much = "no difference", f"as much {energy} as"
    text = f"{arm.name} reached {comparison.target} with {much} {base.name}."
    reached = {each.name: [run.reached for run in each.runs if run.reached] for each in (arm, base)}
    joules, seconds = (
        [_joules([p.joules for p in reached[each.name]], units.energy, each.kind) for each in (arm, base)],
        [_seconds([p.seconds for p in reached[each.name]], units.time) for each in (arm, base)],
    )
    single = len(arm.runs) == 1 or len(base.runs) == 1
    counts = f"{_plural(len(arm.runs), 'run')} of {arm.name}, {len(base.runs)} of {base.name}"
    details = [
        f"{joules[0]} against {joules[1]}; {seconds[0]} against {seconds[1]}, {_as_fast(saving)}.",
        f"{counts}; {'a single run has no spread' if single else '± is the standard deviation over the runs'}.",
    ]
    if std is not None and abs(mean) < std:
        tone = "no difference"
        details.append("The difference is smaller than its spread over the runs: it may be chance.")
    return Headline(tone, text, tuple(details))


# Tables ---------------------------------------------------------------------------------------------------------


def _against(
    comparison: Comparison, saving: Callable[[Contrast], Saving | None], text: Callable[[Saving], str]
) -> tuple[str, ...]:
    """The baseline's dash, then each arm's figure, or that there is none."""
    cells = [DASH]
    for contrast in comparison.contrasts:
        found = saving(contrast)
        cells.append(NOT_COMPARABLE if found is None else text(found))
    return tuple(cells)


def _target_table(comparison: Comparison, units: Units) -> Table | None:
    target = comparison.target
    if target is None:
        return None

    def reached(cell: Callable[[Arm], str]) -> tuple[str, ...]:
        return tuple(cell(arm) if all(run.reached for run in arm.runs) else DASH for arm in comparison.arms)

    def points(arm: Arm, name: str) -> list[float | None]:
        return [getattr(run.reached, name) for run in arm.runs]

    rows = [
        Row("runs that reached it", tuple(f"{len(a.runs) - _misses(a)} of {len(a.runs)}" for a in comparison.arms)),
        Row("energy until then", reached(lambda a: _joules(points(a, "joules"), units.energy, a.kind))),
        Row("time until then", reached(lambda a: _seconds(points(a, "seconds"), units.time))),
        Row("mean power until then", reached(lambda a: _watts(points(a, "joules"), points(a, "seconds"), a.kind))),
        Row("at step", reached(lambda a: _steps(point.step for run in a.runs if (point := run.reached)))),
        Row("last step seen to miss it", reached(lambda a: _steps(run.missed_before for run in a.runs))),
    ]
    if comparison.contrasts:
        rows += [
            Row(f"energy against {comparison.baseline}", _against(comparison, lambda c: c.at_target, _less)),
            Row(f"speed against {comparison.baseline}", _against(comparison, lambda c: c.at_target, _as_fast)),
        ]
    note = f"Target: {target.rule}. The first logged value that meets it counts; the joules are those at its step."
    return Table(f"Energy to the target {target}", _columns(comparison), tuple(rows), note)


def _misses(arm: Arm) -> int:
    return sum(run.reached is None for run in arm.runs)


def _columns(comparison: Comparison) -> tuple[str, ...]:
    return ("", *(arm.name for arm in comparison.arms))


def _budget_table(comparison: Comparison, units: Units) -> Table | None:
    steps = comparison.budget_steps
    if steps is None or not comparison.contrasts:
        return None

    def row(head: str, cell: Callable[[Arm], str]) -> Row:
        return Row(head, tuple(cell(arm) for arm in comparison.arms))

    def points(arm: Arm, name: str) -> list[float | None]:
        return [getattr(run.budget, name) for run in arm.runs]

    rows = [
        row("energy", lambda a: _joules(points(a, "joules"), units.energy, a.kind)),
        row("time", lambda a: _seconds(points(a, "seconds"), units.time)),
        row("mean power", lambda a: _watts(points(a, "joules"), points(a, "seconds"), a.kind)),
    ]
    if comparison.target:
        rows.append(
            row(f"best {comparison.target.metric} so far", lambda a: mean_text(spread(r.budget_best for r in a.runs)))
        )
    rows += [
        Row(f"energy against {comparison.baseline}", _against(comparison, lambda c: c.at_budget, _less)),
        Row(f"speed against {comparison.baseline}", _against(comparison, lambda c: c.at_budget, _as_fast)),
    ]
    note = "The steps that every run came to. A saving stands here only where all runs reached the target by then."
    return Table(f"At the same budget of {steps} steps", _columns(comparison), tuple(rows), note)


def _whole_table(comparison: Comparison, units: Units) -> Table:
    def of(head: str, value: Callable[[Run], Any], text: Callable[[list[Any], Kind], str]) -> Row | None:
        cells = [[value(run) for run in comparison.members[arm.name]] for arm in comparison.arms]
        if all(item is None for column in cells for item in column):
            return None
        return Row(head, tuple(text(column, arm.kind) for column, arm in zip(cells, comparison.arms, strict=True)))

    def energy(head: str, *keys: str) -> Row | None:
        return of(head, lambda run: _dig(run.energy, keys), lambda values, kind: _joules(values, units.energy, kind))

    def each(head: str, key: str) -> Row | None:
        one = Unit("J", 1.0)
        return of(head, lambda run: run.energy.get(key), lambda values, kind: _joules(values, one, kind))

    def mean_watts(arm: Arm) -> str:
        return _watts([run.joules for run in arm.runs], [run.seconds for run in arm.runs], arm.kind)

    idle = of(
        "idle power before the run",
        lambda run: _dig(run.energy, ("idle", "watts")),
        lambda values, kind: _marked(_with_unit(spread(values), "W"), kind),
    )
    rows = [
        energy("energy, gross", "total_joules"),
        energy("of it in training", "train_joules"),
        energy("of it in validation", "val_joules"),
        *(energy(f"of it {kind.upper()}", "by_domain", kind) for kind in ("gpu", "cpu", "dram")),
        idle,
        energy("energy less idle", "idle", "net_joules"),
        of("time", lambda run: run.energy["seconds"], lambda values, _: _seconds(values, units.time)),
        Row("mean power", tuple(mean_watts(arm) for arm in comparison.arms)),
        each("training energy a step", "joules_per_step"),
        each("training energy a sample", "joules_per_sample"),
    ]
    if comparison.target:
        metric = comparison.target.metric
        rows += [
            Row(f"best {metric}", tuple(mean_text(spread(run.best for run in arm.runs)) for arm in comparison.arms)),
            Row(f"last {metric}", tuple(mean_text(spread(run.final for run in arm.runs)) for arm in comparison.arms)),
        ]
    note = "From the start of fit to its end: set-up, compilation, mask updates and validation are in it."
    return Table("Whole runs", _columns(comparison), tuple(row for row in rows if row is not None), note)


def _phase_table(comparison: Comparison, units: Units) -> Table | None:
    rows = []
    for arm in comparison.arms:
        runs = comparison.members[arm.name]
        for phase in dict.fromkeys(phase for run in runs for phase in run.energy["by_phase"]):
            joules = [run.energy["by_phase"].get(phase) for run in runs]
            seconds = [run.energy["seconds_by_phase"].get(phase) for run in runs]
            cells = (
                phase,
                _joules(joules, units.energy, arm.kind),
                _seconds(seconds, units.time),
                _watts(joules, seconds, arm.kind),
            )
            rows.append(Row(arm.name, cells))
    if not rows:
        return None
    note = "Mean over the runs of an arm. Validation is in the phase in which it ran."
    return Table("By phase", ("arm", "phase", "energy", "time", "mean power"), tuple(rows), note)


def _derived_table(comparison: Comparison, units: Units) -> Table | None:
    rows = []
    for key, head in (("grams_co2", "CO2 of the run, g"), ("cost", "cost of the run")):
        cells = []
        for arm in comparison.arms:
            found = [run.energy.get("footprint") or {} for run in comparison.members[arm.name]]
            text = mean_text(spread(each.get(key) for each in found))
            currency = found[0].get("currency") if key == "cost" else ""
            cells.append(_marked(f"{text} {currency}".strip() if text != DASH else DASH, arm.kind))
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
            _values((run.energy.get("footprint") or {}).get(key) for run in comparison.members[arm.name])
            for arm in comparison.arms
        )
        rows.append(Row(f"stated: {head}", values))
    note = "Joules times factors that the user stated; nothing of it is measured."
    return Table("CO2 and cost, derived", _columns(comparison), tuple(rows), note)


def _runs_table(comparison: Comparison, units: Units) -> Table:
    rows = []
    for arm in comparison.arms:
        for result, run in zip(arm.runs, comparison.members[arm.name], strict=True):
            covered = DASH if result.kind == "unknown" else percent(run.energy["coverage_ratio"], 2)
            cells = (
                arm.name,
                DASH if result.seed is None else str(result.seed),
                DASH if run.started is None else run.started.strftime("%Y-%m-%d %H:%M:%S %Z").strip(),
                _joules([result.joules], units.energy, result.kind),
                _seconds([result.seconds], units.time),
                mean_text(spread([result.best])),
                _reached(result),
                covered,
                str(run.energy["gaps"]),
                str(run.summary.get("status", DASH)),
            )
            rows.append(Row(result.name, cells))
    best = f"best {comparison.target.metric}" if comparison.target else "best"
    columns = ("run", "arm", "seed", "started", "energy", "time", best, "target", "coverage", "gaps", "ended")
    return Table("Each run", columns, tuple(rows), style="runs")


def _reached(run: RunResult) -> str:
    return "missed" if run.reached is None else f"at step {run.reached.step}"


def _method_table(comparison: Comparison, units: Units) -> Table | None:
    names = {
        "name": "method",
        "phases": "phases",
        "density": "density at the end",
        "final_density": "density planned for the end",
        "flops_ratio": "FLOPs asked for, against dense",
        "flops_executed_ratio": "FLOPs computed, against dense",
        "block_sizes": "layers by block size",
        "backends": "layers by backend",
        "sparse_operators_ran": "sparse operators ran",
    }
    methods = {arm: [run.method or {} for run in runs] for arm, runs in comparison.members.items()}
    if not any(method for found in methods.values() for method in found):
        return None
    rows = []
    for key, head in names.items():
        cells = tuple(_values(method.get(key) for method in found if method) for found in methods.values())
        if set(cells) != {DASH}:
            rows.append(Row(head, cells))
    return Table("The method", _columns(comparison), tuple(rows), style="words")


def _settings_table(comparison: Comparison, units: Units) -> Table:
    models = {arm: [run.run["model"] for run in runs] for arm, runs in comparison.members.items()}

    def model(head: str, key: str) -> Row:
        return Row(head, tuple(_values(each.get(key) for each in found) for found in models.values()))

    prints = tuple(_values(str(each.get("fingerprint"))[:16] for each in found) for found in models.values())
    rows = [model("model", "class"), model("parameters", "parameters"), Row("fingerprint", prints)]
    for name, by_arm in comparison.settings.items():
        cells = tuple(" / ".join(by_arm.get(arm.name, (DASH,))) for arm in comparison.arms)
        rows.append(Row(name, cells, name in comparison.differing))
    return Table("What ran", _columns(comparison), tuple(rows), style="words")


def _sensor_table(comparison: Comparison, units: Units) -> Table:
    def cells(of: Callable[[Run], Iterable[str]]) -> tuple[str, ...]:
        found = [dict.fromkeys(text for run in runs for text in of(run)) for runs in comparison.members.values()]
        return tuple("; ".join(each) or DASH for each in found)

    def read(run: Run) -> list[str]:
        return [
            f"{d['kind']}: {d['name'] or 'unnamed'} [{d['host']} {d['uid']}], {s['name']} "
            f"({'ESTIMATED' if s['method'] == 'estimated' else s['method']}"
            f"{', driver ' + s['driver'] if s.get('driver') else ''}"
            f"{', shared with other users' if d.get('shared') else ''})"
            for s in run.energy["sources"]
            for d in s["devices"]
        ]

    def over(text: Callable[[Sequence[Run]], str]) -> tuple[str, ...]:
        return tuple(text(runs) for runs in comparison.members.values())

    rows = (
        Row("read", cells(read)),
        Row("not used", cells(lambda run: [f"{a['name']}: {a['reason']}" for a in run.energy.get("absent", ())])),
        Row("lowest coverage", over(lambda runs: percent(min(run.energy["coverage_ratio"] for run in runs), 2))),
        Row("gaps in all runs", over(lambda runs: str(sum(run.energy["gaps"] for run in runs)))),
    )
    return Table("How it was measured", _columns(comparison), rows, style="words")


def _dig(content: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _values(values: Iterable[Any]) -> str:
    """Each different value once."""
    return (
        " / ".join(
            dict.fromkeys(
                number(value) if isinstance(value, float) else text(value) for value in values if value is not None
            )
        )
        or DASH
    )


def _notes(comparison: Comparison) -> Iterable[str]:
    yield (
        "Joules are gross, over the devices named under “How it was measured”, from the start of fit to its end. "
        "Sensors on board are not a meter at the plug: power supplies, fans, discs and network are not in it."
    )
    if any("estimated" in arm.kind for arm in comparison.arms):
        yield (
            "Estimated joules were not measured. They are busy time times an assumed power, so between runs on one "
            "machine their ratio is the ratio of busy times, and no more."
        )
    if comparison.target:
        yield (
            f"The target is {comparison.target} ({comparison.target.rule}). A run reaches it at the first logged value "
            "that meets it. Joules and seconds at that step are read from the log, linearly between two entries and "
            "never beyond them; the validation that gave the value is not in them, earlier ones are."
        )
    else:
        yield f"There is no target: {comparison.no_target}. Without one no saving can be stated."
    if any(len(arm.runs) > 1 for arm in comparison.arms):
        yield (
            "± is the sample standard deviation over the runs of an arm. Savings and speed-ups are formed per pair of "
            "equal seeds where both arms have the same seeds, else once from the means, without a deviation."
        )
