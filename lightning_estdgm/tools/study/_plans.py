"""Named plans of the study, each a list of runs that answers a question."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from lightning_estdgm.presets import PRESETS
from lightning_estdgm.tools.study._contender import SEEDS as REPORTED_SEEDS
from lightning_estdgm.tools.study._contender import Rows
from lightning_estdgm.tools.study._evidence_plan import evidence, tabled_runs
from lightning_estdgm.tools.study._evidence_tasks import EVIDENCE_TASKS
from lightning_estdgm.tools.study._settings import (
    BEST_RATES,
    BLOCKS,
    FINE_UNITS,
    LOW_DENSITY,
    LOW_PEAK_LENGTH,
    MAGNITUDE,
    SCALED,
    SCHEDULES,
    SPARSE_TO_DENSER,
    SPARSE_TO_DENSER_LENGTH,
    WEIGHT_AND_GRADIENT,
    phases,
)
from lightning_estdgm.tools.study._study_run import DENSE, StudyRun
from lightning_estdgm.tools.study._task import Task
from lightning_estdgm.tools.study._tasks import TASKS, task_named

SEEDS = (0, 1, 2)
MORE_SEEDS = (3, 4, 5, 6, 7)
DENSITY = 0.1
RIVALS = ("static", "set", "rigl")
WIDE, MEDIUM = task_named("wide"), task_named("medium")
SMALL = tuple(task for task in TASKS if task not in (WIDE, MEDIUM))


def _best_rate(task: Task, method: str) -> float:
    rates = BEST_RATES[task.name]
    return rates.get(method, rates["est-dgm"])


def _sparse(
    task: Task,
    method: str,
    seed: int,
    *,
    lr: float | None = None,
    density: float = DENSITY,
    length: float = 1.0,
    **more: Any,
) -> StudyRun:
    settings = dict(more) if method == "est-dgm" else {**SCALED, **more}
    settings = {"block_size": 1, **settings}
    return StudyRun(task.name, method, lr or _best_rate(task, method), seed, density, length, settings)


def headline() -> Iterator[StudyRun]:
    """Dense against EST-DGM, RigL, SET and static masks at density 0.10 by single weights, three seeds, each task.

    Beside equal steps, equal FLOPs: dense in 0.3 of the steps against EST-DGM, and against the rivals EST-DGM from
    sparse to denser in more steps. On the wide GPT, blocks of 64. The schedule from sparse to denser was chosen on the
    GPT's seed 0, so there two more seeds are held against static masks and SET. Where labels are few, the low peak in
    fewer steps, kept by weight and gradient; it was chosen on the graph's and the table's seeds 10 to 12. RigL on the
    graph also in fewer steps, at the rate that was the best there.
    """
    for seed in SEEDS:
        for task in SMALL:
            yield StudyRun(task.name, DENSE, _best_rate(task, DENSE), seed)
            yield _sparse(task, "est-dgm", seed)
            for method in RIVALS:
                yield _sparse(task, method, seed)
            yield StudyRun(task.name, DENSE, _best_rate(task, DENSE), seed, length=0.3)
            yield _sparse(task, "est-dgm", seed, length=SPARSE_TO_DENSER_LENGTH[task.name], **SPARSE_TO_DENSER)
        yield StudyRun(WIDE.name, DENSE, _best_rate(WIDE, DENSE), seed)
        yield _sparse(WIDE, "est-dgm", seed, block_size=64)
        yield _sparse(WIDE, "est-dgm", seed, block_size=64, **LOW_DENSITY)
        for name, length in LOW_PEAK_LENGTH.items():
            low_peak = {**SCHEDULES["low-peak"], **WEIGHT_AND_GRADIENT}
            yield _sparse(task_named(name), "est-dgm", seed, length=length, **low_peak)
        for length in (1.0, 0.65):
            yield _sparse(task_named("graph"), "rigl", seed, lr=1e-3, length=length)
    gpt = task_named("gpt")
    for seed in MORE_SEEDS[:2]:
        yield _sparse(gpt, "static", seed)
        yield _sparse(gpt, "set", seed)
        yield _sparse(gpt, "est-dgm", seed, length=SPARSE_TO_DENSER_LENGTH[gpt.name], **SPARSE_TO_DENSER)


def rates() -> Iterator[StudyRun]:
    """Each method at each learning rate, one seed, half the steps: where the rates of the other plans come from.

    On the graph and the GPTs all steps: there half a run favours rates too high for a whole one.
    """
    for task in (*SMALL, WIDE):
        length = 1.0 if task.name in ("graph", "gpt", "wide") else 0.5
        for lr in task.rates:
            yield StudyRun(task.name, DENSE, lr, 0, length=length)
            if task is WIDE:
                yield _sparse(task, "est-dgm", 0, lr=lr, length=length, block_size=64)
                continue
            for method in ("est-dgm", *RIVALS):
                yield _sparse(task, method, 0, lr=lr, length=length)


def methods() -> Iterator[StudyRun]:
    """Every preset with the density-aware step size, three seeds; on two tasks of short runs also without.

    EST-DGM also near the FLOPs of a constant density: at a low density with random growth, which observes nothing, and
    with a low peak in 0.8 of the steps. Learning rates are those swept for the method, or else EST-DGM's.
    """
    published = [method for method in PRESETS if method != "est-dgm"]
    for task in sorted(SMALL, key=lambda task: task.name == "gpt"):  # the longest last
        papers: dict[str, Any] = {"step_exponent": 0.0, "scale_init": False}
        step_sizes = ({}, papers) if task.name in ("digits", "graph") else ({},)
        for seed in SEEDS:
            yield StudyRun(task.name, DENSE, _best_rate(task, DENSE), seed)
            yield _sparse(task, "est-dgm", seed)
            yield _sparse(task, "est-dgm", seed, grow="random", **LOW_DENSITY)
            yield _sparse(task, "est-dgm", seed, length=0.8, **SCHEDULES["low-peak"])
        for method, step_size in itertools.product(published, step_sizes):
            density, own = (0.125, _one_of_eight(task)) if method == "n:m" else (DENSITY, {})
            for seed in SEEDS:
                yield _sparse(task, method, seed, density=density, **own, **step_size)


def _one_of_eight(task: Task) -> dict[str, Any]:
    """Return settings of n:m for the density nearest to one tenth; a first layer of 9 or 30 inputs stays dense."""
    return {"m": 8} if task.name in ("graph", "gpt") else {"m": 8, "exclude": ["net.0"]}


ABLATIONS: tuple[dict[str, Any], ...] = (
    # what mattered most in first runs: step size, growth, drop rule, densities, schedule
    {"step_exponent": 0.0},
    {"step_exponent": 0.5},
    {"grow": "random"},
    {"schedule.observe_steps": 4},  # short runs observe a step or two, and of one step every direction is consistent
    {"schedule.observe_steps": 4, "gamma": 0.0},
    {"drop_fraction": 0.0},
    {"drop_fraction": 0.1},
    {"drop_fraction": 0.5},
    SCHEDULES["low-peak"],
    SCHEDULES["longer-exploration"],
    {"schedule.cycles": 2},
    {"distribution": "uniform"},
    {"scale_init": False},
    # the same choices, otherwise: cycles, shares and peaks of phases
    {"schedule.observe_steps": 4, "gamma": 2.0},
    {"keep": "gradient"},
    {"with.seed_second_moment": {}},
    SCHEDULES["shorter-exploration"],
    SCHEDULES["sparser-exploration"],
    SCHEDULES["denser-exploration"],
    # updates and their observation
    {"schedule.update_every": 4},
    {"schedule.update_every": 25},
    {"schedule.update_every": 15, "schedule.observe_steps": 15},
    {"schedule.freeze": 0.5},
)
"""EST-DGM's own choices, changed one at a time; what matters most comes first."""


def ablations() -> Iterator[StudyRun]:
    """EST-DGM with one choice changed at a time, three seeds: all on the graph, in whole runs.

    On clutter and the GPT the twelve that matter most, in half of the steps.
    """
    for task, length, changes in (
        ("graph", 1.0, ABLATIONS),
        ("clutter", 0.5, ABLATIONS[:12]),
        ("gpt", 0.5, ABLATIONS[:12]),
    ):
        for seed in SEEDS:
            yield StudyRun(task, DENSE, BEST_RATES[task][DENSE], seed, length=length)
        for change in ({}, *changes):
            for seed in SEEDS:
                yield _sparse(task_named(task), "est-dgm", seed, length=length, **change)


DENSE_ATTENTION: dict[str, Any] = {"exclude": ["*.query", "*.key", "*.value", "*.proj"]}
"""The GPT's attention left dense; its feed-forward is two thirds of the weights."""

WIN_BACK: tuple[tuple[float, dict[str, Any]], ...] = (
    # a companion of low rank that takes 0.025 of the density
    (0.075, {"model.companion_rank": 8, "exclude": ["*.down", "*.up"]}),
    # wider and sparser: as many FLOPs, 2.25 times the weights
    (
        0.0444,
        {
            "model.width": 768,
            "model.heads": 12,
            **phases([0.3111, 0.2667, 0.15], [0.1333, 0.0889, 0.35], [0.0667, 0.0444, 0.5]),
        },
    ),
    # a dense start, without and with a permutation of channels at its end
    (DENSITY, {"schedule.warmup": 0.1}),
    (DENSITY, {"schedule.warmup": 0.1, "with.group_hidden": {}}),
    (DENSITY, {"with.distill": {"share": 0.3}}),
    (DENSITY, {"step_exponent": 0.5}),
    (DENSITY, {"drop_fraction": 0.1}),
    (DENSITY, {"distribution": "uniform"}),
    (DENSITY, SCHEDULES["longer-exploration"]),
    (DENSITY, DENSE_ATTENTION),
    (DENSITY, {**DENSE_ATTENTION, **LOW_DENSITY}),
    # the choices of the low density one at a time
    (DENSITY, {"grow": "random", **LOW_DENSITY}),
    (DENSITY, {"drop_fraction": 0.3, **LOW_DENSITY}),
    (DENSITY, {"drop_fraction": 0.0, **LOW_DENSITY}),
)
"""Final density and settings of arms that may win back the loss of blocks of 64 by `MAGNITUDE`."""


def blocks() -> Iterator[StudyRun]:
    """Density by block size on a GPT of width 512, rivals, and what may win back what blocks lose, three seeds.

    Where EST-DGM by blocks of 64 is held against rivals and dense, eight seeds, since three did not tell them apart;
    and three of runs three times as long.
    """
    dense = partial(StudyRun, WIDE.name, DENSE, _best_rate(WIDE, DENSE))
    sparse = partial(_sparse, WIDE, "est-dgm")
    contest: list[Callable[..., StudyRun]] = [
        dense,
        partial(sparse, block_size=64),
        partial(sparse, block_size=64, **LOW_DENSITY),
    ]
    rivals: list[Callable[..., StudyRun]] = [partial(_sparse, WIDE, method, block_size=64) for method in RIVALS]
    by_magnitude: list[Callable[..., StudyRun]] = [partial(arm, **MAGNITUDE) for arm in contest[1:]]
    contest += rivals
    # at most the FLOPs of static masks and SET, which observe nothing and have no denser phases
    equal_flops = partial(sparse, block_size=64, length=0.87, **LOW_DENSITY)
    long_equal_flops = partial(sparse, block_size=64, length=2.45, **LOW_DENSITY)
    # the shorter dense ones are for equal joules and equal FLOPs
    arms: list[Callable[..., StudyRun]] = [partial(dense, length=0.5), *contest, *by_magnitude, equal_flops]
    feed_forward = partial(sparse, block_size=64, **DENSE_ATTENTION)
    low_density_feed_forward = partial(feed_forward, **LOW_DENSITY)
    arms += [feed_forward, low_density_feed_forward]
    arms += [partial(sparse, block_size=block) for block in (32, 16, 1)]
    for density in (0.2, 0.05):
        arms += [partial(sparse, density=density, block_size=block) for block in (64, 16, 1)]
        arms += [partial(sparse, density=density, block_size=64, **LOW_DENSITY)]
    arms += [partial(sparse, block_size=64, length=0.8, **SCHEDULES["low-peak"], **MAGNITUDE)]
    arms += [partial(sparse, density=density, block_size=64, **change, **MAGNITUDE) for density, change in WIN_BACK]
    long: list[Callable[..., StudyRun]] = [
        *contest,
        *by_magnitude,
        low_density_feed_forward,
        partial(low_density_feed_forward, **MAGNITUDE),
    ]
    arms += [partial(arm, length=3.0) for arm in long] + [long_equal_flops]
    for arm in arms:
        for seed in SEEDS:
            yield arm(seed=seed)
    more: list[Callable[..., StudyRun]] = [*contest, *by_magnitude, equal_flops]
    for arm in more:
        for seed in MORE_SEEDS:
            yield arm(seed=seed)
    for seed in MORE_SEEDS[:2]:
        yield long_equal_flops(seed=seed)
        for arm in rivals:
            yield arm(seed=seed, length=3.0)


def units() -> Iterator[StudyRun]:
    """Loss by mask unit at equal steps, one seed, and single weights in fewer steps: what a unit costs in steps."""
    (lr,) = MEDIUM.rates
    sparse = partial(_sparse, MEDIUM, "est-dgm", seed=0, lr=lr)
    yield StudyRun(MEDIUM.name, DENSE, lr, 0)
    for length in (1.0, 0.5, 0.75):
        yield sparse(length=length)
    for unit in FINE_UNITS:
        yield sparse(block_size=unit, **MAGNITUDE)
    for unit in (*FINE_UNITS, *BLOCKS):
        yield sparse(block_size=unit, **WEIGHT_AND_GRADIENT)


def quick() -> Iterator[StudyRun]:
    """Two tiny runs, to see that the study works."""
    task = task_named("tabular")
    yield StudyRun(task.name, DENSE, 3e-3, 0, length=0.2)
    yield _sparse(task, "est-dgm", 0, length=0.2)


def references() -> Iterator[StudyRun]:
    """The published networks on Cora and CiteSeer, dense, by the published settings: GCN on ten seeds, GAT on five."""
    for kind, seeds in (("gcn", 10), ("gat", 5)):
        for task in EVIDENCE_TASKS:
            if task.name.endswith(kind):
                published = sorted(task.rates)[1]
                yield from (StudyRun(task.name, DENSE, published, seed) for seed in range(seeds))


def allocations() -> Iterator[StudyRun]:
    """Where a small text network's weights are best: width, density and the head, one short run of each.

    *Rising* single weights and a narrower dense network on WikiText's files, at the rates that `evidence` has chosen.
    """
    short = partial(StudyRun, "wikitext", seed=100, length=0.25)
    yield short(DENSE, 0.016, settings={"model.width": 48})
    with_head = {"include": ["head"]}
    for width, density, changes in (
        (96, 0.1, {}),
        (96, 0.2, {}),
        (80, 0.2, {}),
        (64, 0.3, {}),
        (96, 0.1, with_head),
        (96, 0.2, with_head),
        (80, 0.25, with_head),
        (128, 0.15, with_head),
    ):
        settings = {"block_size": 1, **SPARSE_TO_DENSER, "model.width": width, **changes}
        yield short("est-dgm", 0.008, density=density, settings=settings)


PLANS: dict[str, Callable[[], Iterator[StudyRun]]] = {
    plan.__name__: plan
    for plan in (headline, rates, methods, ablations, blocks, units, references, allocations, evidence, quick)
}
"""Plans by name."""


def is_evidence(name: str) -> bool:
    """Whether a plan grows with its table, and has a report of its own."""
    return PLANS.get(name) is evidence


def plan_named(name: str, rows: Rows = (), costs: Rows = ()) -> Sequence[StudyRun]:
    """Return the runs of a plan, those that can be named by what its table, and that of its costs, hold.

    Raises:
        ValueError: There is none of that name; the message lists the known ones.

    """
    if name not in PLANS:
        raise ValueError(f"unknown preset {name!r}, expected one of: {', '.join(PLANS)}")
    return list(evidence(rows, costs) if is_evidence(name) else PLANS[name]())


def runs_named(preset: str, names: Sequence[str], rows: Rows = ()) -> list[StudyRun]:
    """Return runs of a plan by `StudyRun.id`, or all reported seeds of a `StudyRun.arm_id`.

    Args:
        preset: Name of the plan.
        names: Names of runs and arms.
        rows: Rows of its table: of the plan evidence, runs of theirs are found whatever their rate and length.

    Raises:
        ValueError: A name is none of the plan's.

    """
    known = {run.id: run for run in (*plan_named(preset, rows), *(tabled_runs(rows) if is_evidence(preset) else ()))}
    found = []
    for name in names:
        arm = [
            run
            for run in known.values()
            if run.arm_id == name and (run.seed in REPORTED_SEEDS or not is_evidence(preset))
        ]
        mine = [known[name]] if name in known else arm
        if not mine:
            raise ValueError(f"run: got {name!r}, expected the name of a run or arm in the plan {preset}")
        found += mine
    return found
