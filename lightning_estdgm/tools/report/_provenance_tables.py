"""Tables of the runs themselves, their settings, and their measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from lightning_estdgm.tools._stats import DASH, percent, spread, spread_text
from lightning_estdgm.tools.report._cells import joules_text, seconds_text, values_text
from lightning_estdgm.tools.report._comparison import Comparison
from lightning_estdgm.tools.report._finished_run import FinishedRun
from lightning_estdgm.tools.report._parts import ReportTable, Row
from lightning_estdgm.tools.report._results import RunResult
from lightning_estdgm.tools.report._words import Units


def runs_table(comparison: Comparison, units: Units) -> ReportTable:
    """Energy, time and end of each run."""
    rows = []
    for arm in comparison.arms:
        for result, run in zip(arm.runs, comparison.members[arm.name], strict=True):
            covered = DASH if result.kind == "unknown" else percent(run.energy["coverage_ratio"], 2)
            cells = (
                arm.name,
                DASH if result.seed is None else str(result.seed),
                DASH if run.started is None else run.started.strftime("%Y-%m-%d %H:%M:%S %Z").strip(),
                joules_text([result.joules], units.energy, result.kind),
                seconds_text([result.seconds], units.time),
                spread_text(spread([result.best])),
                _reached(result),
                covered,
                str(run.energy["gaps"]),
                "unfinished" if run.unfinished else str(run.summary.get("status", DASH)),
            )
            rows.append(Row(result.name, cells))
    best = f"best {comparison.target.metric}" if comparison.target else "best"
    columns = ("run", "arm", "seed", "started", "energy", "time", best, "target", "coverage", "gaps", "ended")
    return ReportTable("Each run", columns, tuple(rows), style="runs")


def _reached(run: RunResult) -> str:
    return "missed" if run.reached is None else f"at step {run.reached.step}"


def method_table(comparison: Comparison, units: Units) -> ReportTable | None:
    """Descriptions of the sparse methods; None if no arm uses one."""
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
        cells = tuple(values_text(method.get(key) for method in found if method) for found in methods.values())
        if set(cells) != {DASH}:
            rows.append(Row(head, cells))
    return ReportTable("The method", comparison.columns, tuple(rows), style="words")


def settings_table(comparison: Comparison, units: Units) -> ReportTable:
    """Model and settings of each arm, marked where they differ."""
    models = {arm: [run.run["model"] for run in runs] for arm, runs in comparison.members.items()}

    def model(head: str, key: str) -> Row:
        return Row(head, tuple(values_text(each.get(key) for each in found) for found in models.values()))

    prints = tuple(values_text(str(each.get("fingerprint"))[:16] for each in found) for found in models.values())
    rows = [model("model", "class"), model("parameters", "parameters"), Row("fingerprint", prints)]
    for name, by_arm in comparison.settings.items():
        cells = tuple(" / ".join(by_arm.get(arm.name, (DASH,))) for arm in comparison.arms)
        rows.append(Row(name, cells, name in comparison.differing))
    return ReportTable("What ran", comparison.columns, tuple(rows), style="words")


def sensor_table(comparison: Comparison, units: Units) -> ReportTable:
    """Energy sources of each arm, and how complete their readings are."""

    def cells(of: Callable[[FinishedRun], Iterable[str]]) -> tuple[str, ...]:
        found = [dict.fromkeys(text for run in runs for text in of(run)) for runs in comparison.members.values()]
        return tuple("; ".join(each) or DASH for each in found)

    def read(run: FinishedRun) -> list[str]:
        return [
            f"{d['kind']}: {d['name'] or 'unnamed'} [{d['host']} {d['uid']}], {s['name']} "
            f"({'ESTIMATED' if s['method'] == 'estimated' else s['method']}"
            f"{', driver ' + s['driver'] if s.get('driver') else ''}"
            f"{', shared with other users' if d.get('shared') else ''})"
            for s in run.energy["sources"]
            for d in s["devices"]
        ]

    def over(text: Callable[[Sequence[FinishedRun]], str]) -> tuple[str, ...]:
        return tuple(text(runs) for runs in comparison.members.values())

    rows = (
        Row("read", cells(read)),
        Row("not used", cells(lambda run: [f"{a['name']}: {a['reason']}" for a in run.energy.get("absent", ())])),
        Row("lowest coverage", over(lambda runs: percent(min(run.energy["coverage_ratio"] for run in runs), 2))),
        Row("gaps in all runs", over(lambda runs: str(sum(run.energy["gaps"] for run in runs)))),
    )
    return ReportTable("How it was measured", comparison.columns, rows, style="words")
