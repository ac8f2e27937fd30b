"""Numbers of the demo from the records of its runs: pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

import numpy as np

from lightning_estdgm.tools._stats import ratio, spread
from lightning_estdgm.tools.demo._records import DENSE, DGM, TITLES, RunRecord, StepLog


def measure(run: RunRecord) -> dict[str, Any]:
    """Numbers of one run: seconds, joules, nats a byte, shares."""
    log, loss = run.steps, run.validation[-1].loss
    train_s = math.fsum(log.wall_s)
    train_j = run.energy.get("train_joules")
    return {
        "mode": run.mode,
        "seed": run.seed,
        "lr": run.lr,
        "width": run.width,
        "steps": len(log),
        "initial": run.initial,
        "batches": run.batches,
        "val_loss": loss,
        "perplexity": math.exp(loss),
        "train_s": train_s,
        "setup_s": run.setup_s,
        "run_s": run.setup_s + train_s,
        "train_j": train_j,
        "joules_per_step": None if train_j is None else train_j / len(log),
        "mean_density": fmean(log.density),
        "final_density": run.active_weights / run.masked_weights if run.masked_weights else 1.0,
        "served_weights": run.served_weights,
        "token_s": run.token_s,
        "masked_weights": run.masked_weights,
        "nonzero_outside": run.nonzero_outside,
        "flops_ratio": run.flops_ratio,
        "phases": phase_times(log),
        "mask_work": mask_work(log),
    }


def phase_times(log: StepLog) -> dict[str, dict[str, float | int | None]]:
    """Median of the plain steps (neither observing nor updating) and mean of all steps, by phase.

    median_s is None where a phase has no plain step, as in runs so short that every step observes.
    """
    times = {}
    for phase in dict.fromkeys(log.phase):
        here = [i for i, name in enumerate(log.phase) if name == phase]
        plain = [log.wall_s[i] for i in here if not (log.observed[i] or log.updated[i])]
        every = [log.wall_s[i] for i in here]
        times[phase] = {
            "steps": len(here),
            "plain_steps": len(plain),
            "median_s": median(plain) if plain else None,
            "mean_s": fmean(every),
            "mean_density": fmean(log.density[i] for i in here),
        }
    return times


def mask_work(log: StepLog) -> dict[str, float | int | None]:
    """Time that observing and updating add to the steps they fall on, over the median plain step of the same phase.

    Returns:
        observing_steps: Number of steps that observe.
        updates: Number of steps that end in an update.
        observe_extra_s: Median over steps that only observe.
        update_extra_s: Median over steps that end in an update, less observe_extra_s where they observed as well.
        both_extra_s: Median over steps that do both, which is all that can be said where no step only observes.
        total_s: Sum over all such steps.
        share: total_s over the time of all training steps.
        All but the counts are None where there is nothing to compare with.
    """
    base = {phase: t["median_s"] for phase, t in phase_times(log).items()}
    steps = list(zip(log.wall_s, log.phase, log.observed, log.updated, strict=True))
    marked = [(wall, base[phase], seen, updated) for wall, phase, seen, updated in steps if seen or updated]
    extra = [(wall - plain, seen, updated) for wall, plain, seen, updated in marked if plain is not None]
    observing = [more for more, seen, updated in extra if seen and not updated]
    observe_s = median(observing) if observing else None
    updating = [more - (observe_s or 0.0) for more, seen, updated in extra if updated and (observing or not seen)]
    both = [more for more, seen, updated in extra if seen and updated]
    total_s = math.fsum(more for more, _, _ in extra) if len(extra) == len(marked) else None
    return {
        "observing_steps": sum(log.observed),
        "updates": sum(log.updated),
        "observe_extra_s": observe_s,
        "update_extra_s": median(updating) if updating else None,
        "both_extra_s": median(both) if both else None,
        "total_s": total_s,
        "share": None if total_s is None else total_s / math.fsum(log.wall_s),
    }


def compare_pair(dense: Mapping[str, Any], dgm: Mapping[str, Any]) -> dict[str, Any]:
    """Hold EST-DGM against dense of the same seed: speed-ups are dense over EST-DGM, energy is EST-DGM over dense."""
    dense_step = next(iter(dense["phases"].values()))["median_s"]
    return {
        "seed": dgm["seed"],
        "same_batches": dgm["batches"] == dense["batches"],
        "same_initial_weights": dgm["initial"] == dense["initial"],
        "val_loss_difference": dgm["val_loss"] - dense["val_loss"],
        "perplexity_ratio": dgm["perplexity"] / dense["perplexity"],
        "train_speedup": dense["train_s"] / dgm["train_s"],
        "run_speedup": dense["run_s"] / dgm["run_s"],
        "joules_ratio": ratio(dgm["train_j"], dense["train_j"]),
        "step_speedup": {phase: ratio(dense_step, t["median_s"]) for phase, t in dgm["phases"].items()},
        "mean_step_speedup": {phase: dense_step / t["mean_s"] for phase, t in dgm["phases"].items()},
    }


def summarize(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Numbers of every run, the paired comparisons, and mean and spread of both over the seeds."""
    measured = [measure(run) for run in runs]
    by_seed = {(m["mode"], m["seed"]): m for m in measured}
    pairs = [compare_pair(m, by_seed[DGM, m["seed"]]) for m in measured if m["mode"] == DENSE]
    modes = {mode: _spread_all(its) for mode in TITLES if (its := [m for m in measured if m["mode"] == mode])}
    return {"runs": measured, "pairs": pairs, "modes": modes, "against_dense": _spread_all(pairs)}


def best_rates(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Rate of lowest mean validation loss over the seeds, and that loss, by mode of a sweep.

    >>> runs = [{"mode": "dense", "lr": lr, "val_loss": loss} for lr, loss in ((1e-3, 2.0), (2e-3, 1.5))]
    >>> best_rates(runs)
    {'dense': {'lr': 0.002, 'val_loss': 1.5}}
    """
    best: dict[str, dict[str, float]] = {}
    for mode, rates in losses_by_rate(runs).items():
        lr = min(rates, key=lambda rate: fmean(rates[rate]))
        best[mode] = {"lr": lr, "val_loss": fmean(rates[lr])}
    return best


def watts(clock_s: Sequence[float], joules: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """Mean power in bins of 2 s, or of 1/80 of a long run, as (bin centres in s, watts); empty if nothing was read.

    A total that has not moved since the step before was not read since, so such steps do not count.

    >>> watts([0.0, 1.0, 2.0, 4.0], [0.0, 0.0, 20.0, 60.0])
    ([1.0, 3.0], [10.0, 20.0])
    """
    known: list[tuple[float, float]] = []
    for time, total in zip(clock_s, joules, strict=True):
        if total is not None and (not known or total > known[-1][1]):
            known.append((time, total))
    if len(known) < 2:
        return [], []
    times, totals = np.array(known).T
    span = times[-1] - times[0]
    edges = np.linspace(times[0], times[-1], 1 + max(1, round(span / max(2.0, span / 80))))
    power = np.diff(np.interp(edges, times, totals)) / np.diff(edges)
    return ((edges[:-1] + edges[1:]) / 2).tolist(), power.tolist()


def _spread_all(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of the same keys, with each number replaced by its spread over the rows."""
    result: dict[str, Any] = {}
    for key, value in rows[0].items():
        if key == "seed" or isinstance(value, (str, bool)):
            continue
        column = [row[key] for row in rows]
        result[key] = _spread_all(column) if isinstance(value, Mapping) else spread(column)
    return result


def losses_by_rate(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[float, list[float]]]:
    """Validation losses of a sweep by mode and learning rate."""
    rates: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        rates.setdefault(run["mode"], {}).setdefault(run["lr"], []).append(run["val_loss"])
    return rates
