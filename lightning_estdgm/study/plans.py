"""Which runs answer which question: named plans, each a list of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from lightning_estdgm.presets import PRESETS
from lightning_estdgm.study.runs import DENSE, Run
from lightning_estdgm.study.tasks import TASKS, Task, task_named

__all__ = ["BEST_RATES", "LEAN", "PLANS", "SCALED", "plan_named"]

SEEDS = (0, 1, 2)
DENSITY = 0.1
RIVALS = ("static", "set", "rigl")
SCALED: dict[str, Any] = {"step_exponent": 1.0, "scale_init": True}
"""The density-aware step size and initialisation, given to rivals as well: the mask rule alone is to differ."""


WIDE = task_named("wide")
SMALL = tuple(task for task in TASKS if task is not WIDE)


BEST_RATES: dict[str, dict[str, float]] = {
    "gpt": {"dense": 8e-3, "est-dgm": 8e-3, "static": 8e-3, "set": 8e-3, "rigl": 4e-3},
    "digits": {"dense": 1e-2, "est-dgm": 1e-3, "static": 3e-3, "set": 3e-3, "rigl": 1e-2},
    "clutter": {"dense": 3e-3, "est-dgm": 1e-2, "static": 1e-2, "set": 1e-2, "rigl": 1e-2},
    "graph": {"dense": 1e-3, "est-dgm": 1e-3, "static": 1e-3, "set": 1e-3, "rigl": 3e-4},
    "tabular": {"dense": 1e-3, "est-dgm": 3e-3, "static": 1e-2, "set": 1e-3, "rigl": 1e-2},
    "wide": {"dense": 5e-4, "est-dgm": 5e-4},
}
"""task -> method -> the learning rate that the plan ``rates`` found best; other methods take EST-DGM's."""


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
) -> Run:
    settings = dict(more) if method == "est-dgm" else {**SCALED, **more}
    settings = {"block_size": 1, **settings}
    return Run(task.name, method, lr or _best_rate(task, method), seed, density, length, settings)


def _phases(exploration: list[float], consolidation: list[float], refinement: list[float]) -> dict[str, Any]:
    """Return settings of a schedule from start, end and length of each phase."""
    return {
        "schedule.exploration": exploration,
        "schedule.consolidation": consolidation,
        "schedule.refinement": refinement,
    }


LEAN = _phases([0.3, 0.25, 0.05], [0.25, 0.15, 0.25], [0.12, 0.1, 0.7])
"""A schedule of mean density 0.14, where the default's is 0.25: nearer to the FLOPs of rivals at a constant 0.10."""

LONGER = _phases([0.7, 0.6, 0.25], [0.3, 0.2, 0.5], [0.15, 0.1, 0.25])
"""A schedule of longer exploration and consolidation."""


def headline() -> Iterator[Run]:
    """Dense against EST-DGM, RigL, SET and static masks at density 0.10 by single weights, three seeds, each task.

    Beside equal steps, equal FLOPs: dense in 0.3 of the steps against EST-DGM, and a leaner EST-DGM in 0.8 of the steps
    against the rivals. On the wide GPT, EST-DGM by blocks of 64.
    """
    for seed in SEEDS:
        for task in SMALL:
            yield Run(task.name, DENSE, _best_rate(task, DENSE), seed)
            yield _sparse(task, "est-dgm", seed)
            for method in RIVALS:
                yield _sparse(task, method, seed)
            yield Run(task.name, DENSE, _best_rate(task, DENSE), seed, length=0.3)
            yield _sparse(task, "est-dgm", seed, length=0.8, **LEAN)
        yield Run(WIDE.name, DENSE, _best_rate(WIDE, DENSE), seed)
        yield _sparse(WIDE, "est-dgm", seed, block_size=64)


def rates() -> Iterator[Run]:
    """Each method at each learning rate, one seed, half the steps: where the rates of the other plans come from.

    On the graph all steps: its networks overfit, so that half a run favours rates too high for a whole one.
    """
    for task in TASKS:
        length = 1.0 if task.name == "graph" else 0.5
        for lr in task.rates:
            yield Run(task.name, DENSE, lr, 0, length=length)
            if task is WIDE:
                yield _sparse(task, "est-dgm", 0, lr=lr, length=length, block_size=64)
                continue
            for method in ("est-dgm", *RIVALS):
                yield _sparse(task, method, 0, lr=lr, length=length)


def methods() -> Iterator[Run]:
    """Every preset, by its paper's settings and with the density-aware step size, three seeds."""
    for seed in SEEDS:
        for task in SMALL:
            for method in PRESETS:
                own: dict[str, Any] = {"block_size": 1, **({"m": 8} if method == "n:m" else {})}
                density = 0.125 if method == "n:m" else DENSITY  # the nearest that one of eight weights can be
                for settings in (own, {**own, **SCALED})[: 1 if method == "est-dgm" else 2]:
                    yield Run(task.name, method, _best_rate(task, method), seed, density, settings=settings)


ABLATIONS: tuple[dict[str, Any], ...] = (
    # growth, drop rule, step size
    {"gamma": 0.0},
    {"gamma": 2.0},
    {"grow": "random"},
    {"drop_fraction": 0.0},
    {"drop_fraction": 0.1},
    {"drop_fraction": 0.5},
    {"step_exponent": 0.0},
    {"step_exponent": 0.5},
    {"with.seed_second_moment": {}},
    # schedule: cycles, shares and peaks of phases
    LEAN,
    {"schedule.cycles": 2},
    _phases([0.7, 0.6, 0.05], [0.3, 0.2, 0.35], [0.15, 0.1, 0.6]),
    LONGER,
    _phases([0.4, 0.35, 0.15], [0.3, 0.2, 0.35], [0.15, 0.1, 0.5]),
    _phases([1.0, 0.7, 0.15], [0.3, 0.2, 0.35], [0.15, 0.1, 0.5]),
    # initialisation, layer densities, updates and their observation
    {"scale_init": False},
    {"distribution": "uniform"},
    {"schedule.update_every": 6},
    {"schedule.update_every": 45},
    {"schedule.update_every": 15, "schedule.observe_steps": 15},
    {"schedule.freeze": 0.5},
    {"keep": "gradient"},
)
"""EST-DGM's own choices, changed one at a time; what matters most comes first."""


def ablations() -> Iterator[Run]:
    """EST-DGM with one choice changed at a time, three seeds: the graph; clutter and GPT in a quarter of the steps."""
    for task, length in (("graph", 1.0), ("clutter", 0.25), ("gpt", 0.25)):
        for seed in SEEDS:
            yield Run(task, DENSE, BEST_RATES[task][DENSE], seed, length=length)
        for change in ({}, *ABLATIONS):
            for seed in SEEDS:
                yield _sparse(task_named(task), "est-dgm", seed, length=length, **change)


WIN_BACK: tuple[tuple[float, dict[str, Any]], ...] = (
    # dense attention
    (DENSITY, {"exclude": ["*.query", "*.key", "*.value", "*.proj"]}),
    # a companion of low rank that takes 0.025 of the density
    (0.075, {"model.companion_rank": 8, "exclude": ["*.down", "*.up"]}),
    # wider and sparser: as many FLOPs, 2.25 times the weights
    (
        0.0444,
        {
            "model.width": 768,
            "model.heads": 12,
            **_phases([0.3111, 0.2667, 0.15], [0.1333, 0.0889, 0.35], [0.0667, 0.0444, 0.5]),
        },
    ),
    # a dense start, without and with a permutation of channels at its end
    (DENSITY, {"schedule.warmup": 0.1}),
    (DENSITY, {"schedule.warmup": 0.1, "with.group_hidden": {}}),
    (DENSITY, {"with.distill": {"share": 0.3}}),
    (DENSITY, {"step_exponent": 0.5}),
    (DENSITY, {"drop_fraction": 0.1}),
    (DENSITY, {"distribution": "uniform"}),
    (DENSITY, LONGER),
)
"""What may win back the accuracy of blocks of 64: final density, settings."""


def blocks() -> Iterator[Run]:
    """Density by block size on a GPT of width 512, and what may win back what blocks lose, three seeds."""
    # the shorter dense ones are for equal joules and equal FLOPs
    arms: list[Callable[..., Run]] = [
        partial(Run, WIDE.name, DENSE, _best_rate(WIDE, DENSE), length=length) for length in (1.0, 0.5)
    ]
    sparse = partial(_sparse, WIDE, "est-dgm")
    arms += [partial(sparse, block_size=block) for block in (64, 16, 1)]
    arms += [partial(sparse, density=density, block_size=64) for density in (0.2, 0.05)]
    arms += [partial(sparse, density=density, block_size=64, **change) for density, change in WIN_BACK]
    arms += [partial(sparse, block_size=32)]
    arms += [partial(sparse, density=density, block_size=block) for density in (0.2, 0.05) for block in (16, 1)]
    for arm in arms:
        for seed in SEEDS:
            yield arm(seed=seed)


def quick() -> Iterator[Run]:
    """Two tiny runs, to see that the study works."""
    task = task_named("tabular")
    yield Run(task.name, DENSE, 3e-3, 0, length=0.2)
    yield _sparse(task, "est-dgm", 0, length=0.2)


PLANS: dict[str, Callable[[], Iterator[Run]]] = {
    plan.__name__: plan for plan in (headline, rates, methods, ablations, blocks, quick)
}
"""Plans by name."""


def plan_named(name: str) -> Sequence[Run]:
    """Return the runs of a plan.

    Raises:
        ValueError: there is none of that name; the message lists the known ones.

    """
    if name not in PLANS:
        raise ValueError(f"unknown preset {name!r}, expected one of: {', '.join(PLANS)}")
    return list(PLANS[name]())
