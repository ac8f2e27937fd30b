"""From the records of the demo's runs to its numbers, its table and its figure: pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.table import Table

from lightning_estdgm.tools.report import energy_label
from lightning_estdgm.tools.stats import spread

DENSE, DGM = "dense", "dgm"

_TITLES = {DENSE: "Dense", DGM: "EST-DGM"}
_COLOURS = {DENSE: "#5b6573", DGM: "#c2410c"}
_SHADES = ("#fde68a", "#bfdbfe", "#bbf7d0", "#e9d5ff", "#fecaca")
_INK, _GRID = "#1f2933", "#e4e7eb"


@dataclass(frozen=True)
class StepLog:
    """One entry per training step, in columns.

    wall_s is the whole step, from the end of the one before: data, forward, backward, optimizer, every callback; not
    validation. clock_s is the time since training began at the step's end, validation included. train_j and total_j
    are the joules until then, without and with validation; None where no energy source could be read.
    observed: gradients of inactive units were collected. updated: masks were re-decided at the step's end.
    """

    wall_s: list[float] = field(default_factory=list)
    clock_s: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    train_j: list[float | None] = field(default_factory=list)
    total_j: list[float | None] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    phase: list[str] = field(default_factory=list)
    observed: list[bool] = field(default_factory=list)
    updated: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.wall_s)


@dataclass(frozen=True)
class Validation:
    """Mean validation loss in nats a byte after ``step`` training steps."""

    step: int
    clock_s: float
    train_j: float | None
    loss: float


@dataclass(frozen=True)
class MaskMoment:
    """The mask of one layer at the start of a step; ``cells`` are active shares in rows of the (out, in) matrix."""

    layer: str
    step: int
    phase: str
    density: float
    cells: list[list[float]]


@dataclass(frozen=True)
class RunRecord:
    """All that is kept of one run.

    initial and batches are digests of the initial weights and of every training batch in order. setup_s is the
    time from the call of fit to the first step. energy is the EnergyMonitor's summary at the end of training.
    nonzero_outside counts the weights outside the masks that are not exactly zero.
    """

    mode: str
    seed: int
    lr: float
    parameters: int
    setup_s: float
    steps: StepLog
    validation: list[Validation]
    initial: str
    batches: str
    energy: dict[str, Any]
    layers: list[dict[str, Any]] = field(default_factory=list)
    masks: list[MaskMoment] = field(default_factory=list)
    masked_weights: int = 0
    active_weights: int = 0
    nonzero_outside: int = 0
    flops_ratio: float = 1.0

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> RunRecord:
        """The inverse of dataclasses.asdict, for a record read from JSON."""
        return cls(
            **{
                **plain,
                "steps": StepLog(**plain["steps"]),
                "validation": [Validation(**v) for v in plain["validation"]],
                "masks": [MaskMoment(**m) for m in plain["masks"]],
            }
        )


# Numbers ----------------------------------------------------------------------------------------------------


def measure(run: RunRecord) -> dict[str, Any]:
    """The numbers of one run: seconds, joules, nats a byte, shares."""
    log, loss = run.steps, run.validation[-1].loss
    train_s = math.fsum(log.wall_s)
    train_j = run.energy.get("train_joules")
    return {
        "mode": run.mode,
        "seed": run.seed,
        "lr": run.lr,
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
        "masked_weights": run.masked_weights,
        "nonzero_outside": run.nonzero_outside,
        "flops_ratio": run.flops_ratio,
        "phases": phase_times(log),
        "mask_work": mask_work(log),
    }


def phase_times(log: StepLog) -> dict[str, dict[str, float | int | None]]:
    """Per phase: the median of its plain steps (neither observing nor updating), and the mean of all its steps.

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
    """What observing and updating add to the steps they fall on, over the median plain step of the same phase.

    observe_extra_s: median over steps that only observe. update_extra_s: median over steps that end in an
    update, less observe_extra_s where they observed as well. total_s: all such steps together. share: of the
    time of all training steps. None where there is nothing to compare with.
    """
    base = {phase: t["median_s"] for phase, t in phase_times(log).items()}
    steps = list(zip(log.wall_s, log.phase, log.observed, log.updated, strict=True))
    marked = [(wall, base[phase], seen, updated) for wall, phase, seen, updated in steps if seen or updated]
    extra = [(wall - plain, seen, updated) for wall, plain, seen, updated in marked if plain is not None]
    observing = [more for more, seen, updated in extra if seen and not updated]
    observe_s = median(observing) if observing else None
    updating = [more - (observe_s or 0.0) for more, seen, updated in extra if updated and (observing or not seen)]
    total_s = math.fsum(more for more, _, _ in extra) if len(extra) == len(marked) else None
    return {
        "observing_steps": sum(log.observed),
        "updates": sum(log.updated),
        "observe_extra_s": observe_s,
        "update_extra_s": median(updating) if updating else None,
        "total_s": total_s,
        "share": None if total_s is None else total_s / math.fsum(log.wall_s),
    }


def compare(dense: Mapping[str, Any], dgm: Mapping[str, Any]) -> dict[str, Any]:
    """EST-DGM against dense, same seed: speed-ups are dense over EST-DGM seconds; energy is EST-DGM over dense."""
    dense_step = next(iter(dense["phases"].values()))["median_s"]
    return {
        "seed": dgm["seed"],
        "same_batches": dgm["batches"] == dense["batches"],
        "same_initial_weights": dgm["initial"] == dense["initial"],
        "val_loss_difference": dgm["val_loss"] - dense["val_loss"],
        "perplexity_ratio": dgm["perplexity"] / dense["perplexity"],
        "train_speedup": dense["train_s"] / dgm["train_s"],
        "run_speedup": dense["run_s"] / dgm["run_s"],
        "joules_ratio": _ratio(dgm["train_j"], dense["train_j"]),
        "step_speedup": {phase: _ratio(dense_step, t["median_s"]) for phase, t in dgm["phases"].items()},
        "mean_step_speedup": {phase: dense_step / t["mean_s"] for phase, t in dgm["phases"].items()},
    }


def summarize(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Every run's numbers, the paired comparisons, and mean and spread of both over the seeds."""
    measured = [measure(run) for run in runs]
    by_seed = {(m["mode"], m["seed"]): m for m in measured}
    pairs = [compare(m, by_seed[DGM, m["seed"]]) for m in measured if m["mode"] == DENSE]
    modes = {mode: _spread_all([m for m in measured if m["mode"] == mode]) for mode in (DENSE, DGM)}
    return {"runs": measured, "pairs": pairs, "modes": modes, "against_dense": _spread_all(pairs)}


def best_rates(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Per mode of a sweep, the rate of lowest mean validation loss over the seeds, and that loss.

    >>> runs = [{"mode": "dense", "lr": lr, "val_loss": loss} for lr, loss in ((1e-3, 2.0), (2e-3, 1.5))]
    >>> best_rates(runs)
    {'dense': {'lr': 0.002, 'val_loss': 1.5}}
    """
    best: dict[str, dict[str, float]] = {}
    for mode, rates in _by_rate(runs).items():
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
    """The same keys as one row, each number replaced by its spread over the rows."""
    result: dict[str, Any] = {}
    for key, value in rows[0].items():
        if key == "seed" or isinstance(value, (str, bool)):
            continue
        column = [row[key] for row in rows]
        result[key] = _spread_all(column) if isinstance(value, Mapping) else spread(column)
    return result


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under else None


def _by_rate(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[float, list[float]]]:
    rates: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        rates.setdefault(run["mode"], {}).setdefault(run["lr"], []).append(run["val_loss"])
    return rates


def records(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The runs as plain types."""
    return [asdict(run) for run in runs]


# Table ------------------------------------------------------------------------------------------------------


def results_table(summary: Mapping[str, Any], runs: Sequence[RunRecord], profile: Mapping[str, Any] | None) -> Table:
    """The side-by-side table of the demo."""
    dense, dgm, against = summary["modes"][DENSE], summary["modes"][DGM], summary["against_dense"]
    seeds, steps = len(summary["pairs"]), len(runs[0].steps)
    energy = runs[0].energy
    devices = [device["name"] for source in energy.get("sources", ()) for device in source["devices"]]
    notes = [
        f"Energy is {energy_label(energy)}: {'; '.join(devices)}." if devices else "No energy source here.",
        "Step times are medians of steps that neither observe nor update; in brackets, the mean of all steps.",
        "± is the sample standard deviation over the seeds." if seeds > 1 else "",
    ]
    table = Table(
        title=f"{steps} steps on the same batches, {seeds} seed{'s' if seeds > 1 else ''}",
        caption=" ".join(notes).strip(),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for heading in ("Dense", "EST-DGM", "against dense"):
        table.add_column(heading, justify="right")

    def row(name: str, key: str, digits: int, verdict: str = "", scale: float = 1.0) -> None:
        table.add_row(name, _text(dense[key], digits, scale), _text(dgm[key], digits, scale), verdict)

    row("validation loss, nats a byte", "val_loss", 4, _text(against["val_loss_difference"], 4, sign=True))
    row("perplexity a byte", "perplexity", 3, _share(against["perplexity_ratio"], 2))
    table.add_section()
    row("training steps, s", "train_s", 1, _times(against["train_speedup"]))
    row("set-up before them, s", "setup_s", 1)
    row("whole run less validation, s", "run_s", 1, _times(against["run_speedup"]))
    estimated = " (ESTIMATED)" if energy.get("method") in ("estimated", "mixed") else ""
    row(f"training energy, J{estimated}", "train_j", 0, _share(against["joules_ratio"]))
    row("linear FLOPs against dense, %", "flops_ratio", 1, scale=100)
    table.add_section()
    row("mean density", "mean_density", 3)
    row("final density", "final_density", 4)
    table.add_row("nonzero weights outside masks", "", str(sum(run.nonzero_outside for run in runs)), "")
    table.add_section()
    dense_step = next(iter(dense["phases"].values()))["median_s"]
    for phase, times in dgm["phases"].items():
        both = (_text(dense_step, 0, 1000), _text(times["median_s"], 0, 1000))
        every = against["mean_step_speedup"][phase]
        verdict = _text(against["step_speedup"][phase], 2) + f" ({_text(every | {'std': None}, 2)}) × as fast"
        table.add_row(f"step in {phase}, ms", *both, verdict)
    work = dgm["mask_work"]
    table.add_row("an observing step takes more, ms", "", _text(work["observe_extra_s"], 0, 1000), "")
    table.add_row("a mask update, ms", "", _text(work["update_extra_s"], 0, 1000), "")
    table.add_row("observing and updating, % of steps", "", _text(work["share"], 1, 100), "")
    if profile:
        table.add_section()
        for part in profile[DENSE]["ms"]:
            cells = tuple(f"{profile[m]['ms'][part]:.0f} ({profile[m]['share'][part]:.0%})" for m in (DENSE, DGM))
            table.add_row(f"profile: {part}, ms a step", *cells, "")
    return table


def sweep_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Validation loss of each mode at each learning rate; the best of each mode is bold."""
    rates, best = _by_rate(runs), best_rates(runs)
    table = Table(title="Validation loss by learning rate (mean over the seeds)", title_justify="left")
    table.add_column("learning rate", justify="right")
    for mode in rates:
        table.add_column(_TITLES[mode], justify="right")
    for lr in sorted({lr for losses in rates.values() for lr in losses}):
        cells = []
        for mode, losses in rates.items():
            text = f"{fmean(losses[lr]):.4f}" if lr in losses else ""
            cells.append(f"[bold]{text}[/bold]" if lr == best[mode]["lr"] else text)
        table.add_row(f"{lr:g}", *cells)
    return table


def _text(value: Mapping[str, Any], digits: int, scale: float = 1.0, sign: bool = False) -> str:
    if value["mean"] is None:
        return "–"
    text = f"{value['mean'] * scale:{'+' if sign else ''}.{digits}f}"
    return text if value["std"] is None else f"{text} ± {value['std'] * scale:.{digits}f}"


def _times(value: Mapping[str, Any]) -> str:
    return "–" if value["mean"] is None else f"{_text(value, 2)} × as fast"


def _share(value: Mapping[str, Any], digits: int = 1) -> str:
    return "–" if value["mean"] is None else f"{_text(value, digits, 100)} %"


# Figure -----------------------------------------------------------------------------------------------------


def figure(runs: Sequence[RunRecord], path: Path) -> None:
    """Write the PNG: loss over joules, watts over time, density over time by phase, masks of one layer."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.04)
    canvas = Figure(figsize=(13, 8.6), dpi=130, facecolor="white", layout=layout)
    FigureCanvasAgg(canvas)
    grid = canvas.add_gridspec(2, 2)
    has_joules = all(run.steps.train_j[-1] is not None for run in runs)
    label = energy_label(runs[0].energy)
    _draw_loss(canvas.add_subplot(grid[0, 0]), runs, has_joules, label)
    _draw_watts(canvas.add_subplot(grid[0, 1]), runs, label)
    _draw_density(canvas.add_subplot(grid[1, 0]), runs)
    moments = next((run.masks for run in runs if run.masks), [])
    masks = grid[1, 1].subgridspec(1, max(1, len(moments)))
    for i, moment in enumerate(moments):
        _draw_mask(canvas.add_subplot(masks[0, i]), moment, i == 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path)


def _draw_loss(axes: Axes, runs: Sequence[RunRecord], has_joules: bool, label: str) -> None:
    for run in runs:
        x = np.array(run.steps.train_j, dtype=float) if has_joules else np.cumsum(run.steps.wall_s)
        first = run.seed == runs[0].seed
        colour, alpha = _COLOURS[run.mode], 0.9 if first else 0.3
        axes.plot(x, _smooth(run.steps.loss), color=colour, alpha=0.45 * alpha, lw=1.2)
        points = [((v.train_j if has_joules else v.clock_s), v.loss) for v in run.validation]
        axes.plot(
            *zip(*points, strict=True),
            "o-",
            color=colour,
            alpha=alpha,
            lw=1.8,
            ms=5,
            label=_TITLES[run.mode] if first else None,
        )
    unit = f"training energy, J ({label})" if has_joules else "training time, s (no energy source)"
    _style(axes, "(a) Loss over energy" if has_joules else "(a) Loss over time", unit, "loss, nats a byte")
    smooth = [loss for run in runs for loss in _smooth(run.steps.loss)[len(run.steps) // 20 :]]
    lowest, highest = min(*smooth, *(v.loss for run in runs for v in run.validation)), max(smooth)
    axes.set_ylim(lowest - 0.06 * (highest - lowest) - 1e-3, highest + 1e-3)
    axes.plot([], [], color=_INK, alpha=0.4, lw=1.2, label="training, smoothed")
    axes.plot([], [], "o-", color=_INK, lw=1.8, ms=5, label="validation")
    _legend(axes)


def _draw_watts(axes: Axes, runs: Sequence[RunRecord], label: str) -> None:
    drawn = []
    for run in runs:
        times, power = watts(run.steps.clock_s, run.steps.total_j)
        drawn += power
        if power:
            first = run.seed == runs[0].seed
            axes.plot(
                times,
                power,
                color=_COLOURS[run.mode],
                alpha=0.9 if first else 0.3,
                label=_TITLES[run.mode] if first else None,
            )
    _style(axes, "(b) Power over time", "time since training began, s", f"watts ({label})")
    if drawn:
        axes.set_ylim(0, 1.2 * max(drawn))
        _legend(axes)
    else:
        axes.text(0.5, 0.5, label, ha="center", va="center", transform=axes.transAxes, color=_INK)


def _draw_density(axes: Axes, runs: Sequence[RunRecord]) -> None:
    run = next(run for run in runs if run.mode == DGM)
    dense = next(run for run in runs if run.mode == DENSE)
    log = run.steps
    starts = [0.0, *log.clock_s[:-1]]
    changes = [i for i in range(len(log)) if i == 0 or log.phase[i] != log.phase[i - 1]]
    phases = list(dict.fromkeys(log.phase))
    for i, j in zip(changes, [*changes[1:], len(log)], strict=True):
        end = log.clock_s[j - 1]
        axes.axvspan(starts[i], end, color=_SHADES[phases.index(log.phase[i]) % len(_SHADES)], alpha=0.55, lw=0)
        axes.text((starts[i] + end) / 2, 1.04, log.phase[i], ha="center", va="bottom", fontsize=9, color=_INK)
    axes.plot([0, dense.steps.clock_s[-1]], [1, 1], color=_COLOURS[DENSE], lw=1.8, label="Dense")
    axes.step(
        [*starts, log.clock_s[-1]],
        [*log.density, log.density[-1]],
        where="post",
        color=_COLOURS[DGM],
        lw=1.8,
        label="EST-DGM",
    )
    axes.annotate(
        f"{log.density[-1]:.2f}",
        (log.clock_s[-1], log.density[-1]),
        (6, 0),
        textcoords="offset points",
        va="center",
        color=_COLOURS[DGM],
    )
    _style(axes, "(c) Density over time", "time since training began, s", "active share of the masked weights")
    axes.set_ylim(0, 1.14)
    _legend(axes, "center right")


def _draw_mask(axes: Axes, moment: MaskMoment, first: bool) -> None:
    colours = ListedColormap(
        [tuple(np.array((1, 1, 1)) * (1 - s) + np.array((0.76, 0.25, 0.05)) * s) for s in np.linspace(0.06, 1, 64)]
    )
    cells = np.array(moment.cells)
    axes.imshow(cells, cmap=colours, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    if max(cells.shape) <= 48:
        axes.set_xticks(np.arange(cells.shape[1]) - 0.5, minor=True)
        axes.set_yticks(np.arange(cells.shape[0]) - 0.5, minor=True)
        axes.grid(which="minor", color="white", lw=0.8)
        axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_color(_GRID)
    axes.set_xlabel(f"step {moment.step}, {moment.phase}\nlayer density {moment.density:.2f}", fontsize=9, color=_INK)
    if first:
        axes.set_title(f"(d) Mask of {moment.layer}", loc="left", fontsize=11, fontweight="bold", color=_INK)
        axes.set_ylabel("outputs (rows), inputs (columns)", fontsize=9, color=_INK)


def _style(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.set_xlabel(x, fontsize=9, color=_INK)
    axes.set_ylabel(y, fontsize=9, color=_INK)
    axes.tick_params(labelsize=9, colors=_INK, length=3)
    axes.grid(color=_GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9aa5b1")


def _legend(axes: Axes, where: Literal["best", "center right"] = "best") -> None:
    axes.legend(loc=where, fontsize=9, frameon=True, framealpha=0.9, edgecolor=_GRID)


def _smooth(values: Sequence[float], share: float = 0.03) -> list[float]:
    """Centred moving mean over ``share`` of the values; shorter at the ends."""
    half = max(1, round(share * len(values) / 2))
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
