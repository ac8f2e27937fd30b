"""The preset ``evidence``: who is compared on which published data, and the runs that a table still lacks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_estdgm.tools.study._contender import SEEDS, Contender, Rows
from lightning_estdgm.tools.study._evidence_tasks import EVIDENCE_TASKS
from lightning_estdgm.tools.study._settings import FINE_UNITS, MAGNITUDE, SCALED, SPARSE_TO_DENSER
from lightning_estdgm.tools.study._standing import Standing, best_of_budget, standings
from lightning_estdgm.tools.study._study_run import DENSE, StudyRun

DENSITY = 0.1
DENSE_NAME = "dense"

_SMALL: Mapping[str, Sequence[tuple[str, dict[str, Any]]]] = {
    "cora-gcn": [("hidden 4", {"hidden": 4}), ("hidden 2", {"hidden": 2})],
    "citeseer-gcn": [("hidden 4", {"hidden": 4}), ("hidden 2", {"hidden": 2})],
    "cora-gat": [("2 heads of 8", {"hidden": 16, "heads": 2}), ("1 head of 8", {"hidden": 8, "heads": 1})],
    "citeseer-gat": [("2 heads of 8", {"hidden": 16, "heads": 2}), ("1 head of 8", {"hidden": 8, "heads": 1})],
    "fashion": [("width 32", {"width": 32}), ("width 20", {"width": 20})],
    "stdlib": [("width 124", {"width": 124}), ("width 100", {"width": 100}), ("width 80", {"width": 80})],
    "wikitext": [("width 48", {"width": 48}), ("width 32", {"width": 32})],
}
"""task -> narrower dense networks: at about a quarter of the FLOPs, and with about as many weights as a sparse one."""

_RIVALS: Sequence[tuple[str, str, dict[str, Any]]] = (
    ("static", "static", {}),
    ("SET", "set", {}),
    ("SMET", "set", {"with.ramp": {"steps": 20}}),
    ("RigL", "rigl", {}),
    ("gradual pruning", "gmp", {"begin": 0.25, "end": 0.75}),
)
"""Name, preset and settings of the other methods; all have the density-aware step size, and count steps by unit."""

_UNITS: Sequence[tuple[str, Any]] = (("1", 1), ("4x1", [4, 1]), ("4x4", 4), ("16x16", 16))
_OTHERS: Mapping[str, Sequence[tuple[str, float, dict[str, Any]]]] = {
    "fashion": [(" to 0.075", 0.075, {})],
    "stdlib": [
        (", decay kept", DENSITY, {"scale_decay": False}),
        (", ramp", DENSITY, {"with.ramp": {"steps": 20}}),
    ],
    "wikitext": [
        (", decay kept", DENSITY, {"scale_decay": False}),
        (" to 0.25, width 80, decay kept", 0.25, {"model.width": 80, "include": ["head"], "scale_decay": False}),
    ],
}
"""task -> other *rising* single weights: what they are, the final density, and what else differs."""

_SCHEDULES: Sequence[tuple[str, dict[str, Any]]] = (("cycle", {}), ("rising", SPARSE_TO_DENSER))


def contenders(task: str) -> list[Contender]:
    """Return who is compared on a task, the cheapest question first."""
    how: dict[str, Any] = {"choice_length": 0.25 if task == "wikitext" else 0.5}
    is_graph = task.startswith(("cora", "citeseer"))
    if is_graph:  # seconds a run, of which each says little
        how = {"choice_length": 1.0, "choice_seeds": (100, 101)}
    found = [Contender(task, DENSE_NAME, lengths=(0.5, 1.0), **how)]
    for name, sizes in _SMALL[task]:
        settings = {f"model.{key}": value for key, value in sizes.items()}
        found.append(Contender(task, f"small dense, {name}", settings=settings, **how))
    for unit, size in _UNITS[: 4 if task == "stdlib" else 3 if task == "fashion" else 2]:
        for schedule, changes in _SCHEDULES:
            keep = MAGNITUDE if size in FINE_UNITS else {}
            stem = {"exclude": ["net.0"]} if task == "fashion" and size == 4 else {}  # it has one input
            settings = {"block_size": size, **keep, **stem, **changes}
            found.append(Contender(task, f"EST-DGM {unit}, {schedule}", "est-dgm", settings, DENSITY, **how))
    for name, density, changes in _OTHERS.get(task, ()):
        settings = {"block_size": 1, **SPARSE_TO_DENSER, **changes}
        found.append(Contender(task, f"EST-DGM 1, rising{name}", "est-dgm", settings, density, **how))
    for name, method, changes in _RIVALS:
        settings = {"block_size": 1, **SCALED, **changes}
        found.append(Contender(task, name, method, settings, DENSITY, **how))
    return found


EVIDENCE: tuple[Contender, ...] = tuple(each for task in EVIDENCE_TASKS for each in contenders(task.name))
"""All contenders, the tasks of the shortest runs first."""


_MOST = 0.9
"""Share of dense's joules that runs of as many joules take at least."""


def evidence(rows: Rows = (), costs: Rows = ()) -> Iterator[StudyRun]:
    """Dense, small dense, other methods and EST-DGM on published data, each at its own best rate.

    A rate is chosen on seeds of its own; the runs to report, on three others, can be named only then, so the plan grows
    with the table. Of a task all are run at equal FLOPs before any is run at other lengths, and last, where its costs
    are known, the best narrower dense network and the best of EST-DGM by as many joules as dense takes.
    """
    known = {row["key"] for row in rows}
    for task in dict.fromkeys(each.task for each in EVIDENCE):
        entered = [each for each in EVIDENCE if each.task == task]
        equal = [run for each in entered for run in each.runs_of_budget(rows)]
        yield from equal
        are_level = all(run.key in known for run in equal)
        for each in entered:
            yield from (run for run in each.runs_of_lengths(rows) if are_level or run.key in known)
        found = standings(entered, rows, costs)
        ours = [each for each in found if each.contender.method == "est-dgm"]
        best = [best_of_budget(some, rows) for some in (narrower(found), ours)] if are_level else []
        for standing, runs in _runs_of_joules(found):
            yield from (run for run in runs if standing in best or run.key in known)


def narrower(found: Sequence[Standing]) -> list[Standing]:
    """Return those that are narrower dense networks."""
    return [each for each in found if each.contender.method == DENSE and each.contender.name != DENSE_NAME]


def _runs_of_joules(found: Sequence[Standing]) -> Iterator[tuple[Standing, list[StudyRun]]]:
    """Yield the runs of each of one task that are as long as dense's joules last, where these are known.

    Costs are measured anew at times, and never come out the same: runs that take most of these joules stay.
    """
    dense = next((each.costs["joules"] for each in found if each.contender.name == DENSE_NAME and each.costs), None)
    for each in found:
        if dense is not None and each.costs:
            lasts = dense / each.costs["joules"]
            near = [length for length in each.lengths if _MOST * lasts < length <= lasts]
            lengths = near or [math.floor(10 * lasts) / 10]
            yield each, [each.contender.run(each.lr, seed, length) for length in lengths for seed in SEEDS]


def cost_runs(rows: Rows) -> Iterator[StudyRun]:
    """Yield the runs whose seconds and joules count: one of each contender that has chosen its rate."""
    for contender in EVIDENCE:
        if (lr := contender.rate(rows)) is not None:
            yield contender.cost_run(lr)


def tabled_runs(rows: Rows) -> Iterator[StudyRun]:
    """Yield the contenders' runs that rows of a table are of, whatever their rate and length."""
    for contender in EVIDENCE:
        for row in rows:
            if contender.owns(row):
                yield contender.run(row["lr"], int(row["seed"]), row["length"])
