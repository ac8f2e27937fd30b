"""Settings of compared runs, and warnings of what makes the comparison unfair or weak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from lightning_estdgm.energy._run_file import FINISHED
from lightning_estdgm.tools._stats import percent
from lightning_estdgm.tools.report._finished_run import FinishedRun
from lightning_estdgm.tools.report._overlap import Overlap, some
from lightning_estdgm.tools.report._words import text

_MIN_COVERAGE = 0.95
_MIN_SEEDS = 3


def settings_of(arms: Mapping[str, Sequence[FinishedRun]]) -> dict[str, dict[str, tuple[str, ...]]]:
    """Values in use by name of the setting and arm, each once."""
    table: dict[str, dict[str, tuple[str, ...]]] = {}
    for arm, runs in arms.items():
        for run in runs:
            for name, value in _setting(run).items():
                row = table.setdefault(name, {})
                row[arm] = tuple(dict.fromkeys((*row.get(arm, ()), value)))
    return table


def _setting(run: FinishedRun) -> dict[str, str]:
    of, sources = run.run, run.energy["sources"]
    drivers = {f"{s['name']} {s['driver']}" for s in sources if s.get("driver")}
    plain = {
        "steps": "global_step",
        "batch size": "batch_size",
        "batches accumulated": "accumulate_grad_batches",
        "precision": "precision",
        "compiled": "compiled",
        "processes": "world_size",
        "strategy": "strategy",
        "accelerator": "accelerator",
        "devices": "devices",
        "hosts": "hosts",
        "host": "host",
    }
    versions = of.get("versions") or {}
    return {
        **{name: text(of.get(key)) for name, key in plain.items()},
        "energy sources": text(sorted({f"{s['name']} ({s['method']})" for s in sources})),
        "energy drivers": text(sorted(drivers)),
        **{f"{name} version": text(version) for name, version in versions.items() if version is not None},
    }


def warnings_of(
    arms: Mapping[str, Sequence[FinishedRun]],
    names: Mapping[Path, str],
    settings: Mapping[str, Mapping[str, tuple[str, ...]]],
    differing: frozenset[str],
    overlaps: Sequence[Overlap] = (),
) -> list[str]:
    """Sentences on what makes a comparison unfair or weak, or leaves joules out.

    Args:
        arms: Runs by arm.
        names: Name of each run by its folder.
        settings: Values of each setting by arm.
        differing: Names of the settings that are not the same in all runs.
        overlaps: Pairs of runs that used one counter at the same time.
    """
    found = some(overlap.sentence(names) for overlap in overlaps)
    runs = [run for members in arms.values() for run in members]
    for name, by_arm in settings.items():
        if name in differing:
            values = "; ".join(f"{arm}: {' / '.join(by_arm.get(arm, ('not stated',)))}" for arm in arms)
            found.append(f"{name} differ{'' if name.endswith('s') else 's'} ({values})")
    if len(arms) > 1:
        found += _seed_warnings(arms)
        if _one_after_the_other(arms):
            found.append(
                "the arms ran one after the other, not in turns: a machine that warms up or is busier for a while "
                "counts against one of them"
            )
    for run in runs:
        if run.kind != "unknown" and run.energy["coverage_ratio"] < _MIN_COVERAGE:
            found.append(f"{names[run.path]}: readings cover only {percent(run.energy['coverage_ratio'])} of the time")
        if run.energy["gaps"]:
            found.append(
                f"{names[run.path]}: {run.energy['gaps']} gap(s) in the readings; joules in a gap may be missing"
            )
        failing = [f"{d['kind']} {d['uid']} on {d['host']}" for d in run.energy.get("failing", ())]
        if failing:
            found.append(f"{names[run.path]}: {text(failing)} could not be read at the end: joules are missing")
        if run.unfinished:
            found.append(
                f"{names[run.path]}: not finished: it was killed or is still running, and its figures end with its "
                "last checkpoint"
            )
        elif run.summary.get("status") not in (FINISHED, None):
            found.append(f"{names[run.path]}: ended with an exception")
        shared = [d["name"] for s in run.energy["sources"] for d in s["devices"] if d.get("shared")]
        if shared:
            found.append(f"{names[run.path]}: other users' work is in the joules of {text(shared)}")
    for name, members in arms.items():
        if any(run.method and run.method.get("sparse_operators_ran") is False for run in members):
            found.append(f"{name}: no sparse operator ran, so its masks saved no arithmetic")
    return found


def _seed_warnings(arms: Mapping[str, Sequence[FinishedRun]]) -> list[str]:
    found = []
    for name, members in arms.items():
        seeds = [run.run.get("seed") for run in members]
        if len(members) == 1:
            found.append(f"{name}: a single run, so its spread is not known")
        elif len(members) < _MIN_SEEDS:
            found.append(f"{name}: only {len(members)} runs; at least {_MIN_SEEDS} seeds tell a difference from chance")
        if None not in seeds and len(set(seeds)) < len(seeds):
            found.append(f"{name}: runs of one seed ({text(seeds)}) are not independent")
    return found


def _one_after_the_other(arms: Mapping[str, Sequence[FinishedRun]]) -> bool:
    """Whether two arms of several runs did not overlap in time."""
    spans = []
    for members in arms.values():
        times = [run.started for run in members if run.started is not None]
        if len(times) > 1:
            spans.append((min(times), max(times)))
    spans.sort()
    return any(before[1] < after[0] for before, after in pairwise(spans))
