"""Tables of the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.table import Table

from lightning_estdgm.tools._stats import Spread, spread, spread_text
from lightning_estdgm.tools.demo._measures import best_rates, losses_by_rate
from lightning_estdgm.tools.demo._records import DENSE, DGM, TITLES, RunRecord
from lightning_estdgm.tools.report._finished_run import energy_label


def networks_table(summary: Mapping[str, Any], runs: Sequence[RunRecord]) -> Table:
    """What the three networks reached, what they cost to train, and what they cost to serve."""
    seeds, energy = len(summary["pairs"]), runs[0].energy
    devices = [device["name"] for source in energy.get("sources", ()) for device in source["devices"]]
    notes = [
        f"Energy is {energy_label(energy)}: {'; '.join(devices)}." if devices else "No energy source here.",
        "The smaller network has as many weights as EST-DGM leaves, and as many steps as EST-DGM's joules buy.",
        "± is the sample standard deviation over the seeds." if seeds > 1 else "",
    ]
    title = f"Three networks, {seeds} seed{'s' if seeds > 1 else ''}"
    table = _table(title, list(TITLES.values()), " ".join(notes).strip())

    def row(name: str, key: str, digits: int, scale: float = 1.0) -> None:
        table.add_row(name, *(spread_text(summary["modes"][mode][key], digits, scale=scale) for mode in TITLES))

    estimated = " (ESTIMATED)" if energy.get("method") in ("estimated", "mixed") else ""
    row("loss, nats a byte", "val_loss", 3)
    row("perplexity a byte", "perplexity", 2)
    table.add_section()
    row("energy, J" + estimated, "train_j", 0)
    row("training, s", "train_s", 1)
    row("set-up before it, s", "setup_s", 1)
    row("steps", "steps", 0)
    row("width", "width", 0)
    table.add_section()
    row("weights to serve, 1000s", "served_weights", 0, scale=1e-3)
    row("a token of text, ms", "token_s", 2, scale=1e3)
    return table


def steps_table(summary: Mapping[str, Any], runs: Sequence[RunRecord], profile: Mapping[str, Any] | None) -> Table:
    """EST-DGM against dense on the same batches."""
    dense, dgm, against = summary["modes"][DENSE], summary["modes"][DGM], summary["against_dense"]
    note = "Step times are medians of steps that neither observe nor update; in brackets, the mean of all steps."
    title = f"EST-DGM against dense: {len(runs[0].steps)} steps on the same batches"
    table = _table(title, [TITLES[DENSE], TITLES[DGM], "against dense"], note)

    def row(name: str, key: str, digits: int, verdict: str = "", scale: float = 1.0) -> None:
        table.add_row(
            name, spread_text(dense[key], digits, scale=scale), spread_text(dgm[key], digits, scale=scale), verdict
        )

    row("validation loss, nats a byte", "val_loss", 4, spread_text(against["val_loss_difference"], 4, sign=True))
    row("perplexity a byte", "perplexity", 3, _percent_text(against["perplexity_ratio"], 2))
    table.add_section()
    row("training steps, s", "train_s", 1, _speedup_text(against["train_speedup"]))
    row("whole run less validation, s", "run_s", 1, _speedup_text(against["run_speedup"]))
    row("training energy, J", "train_j", 0, _percent_text(against["joules_ratio"], 1))
    row("linear FLOPs against dense, %", "flops_ratio", 1, scale=100)
    table.add_section()
    row("mean density", "mean_density", 3)
    row("final density", "final_density", 4)
    table.add_row("nonzero weights outside masks", "", str(sum(run.nonzero_outside for run in runs)), "")
    table.add_section()
    dense_step = next(iter(dense["phases"].values()))["median_s"]
    for phase, times in dgm["phases"].items():
        both = (spread_text(dense_step, 0, scale=1000), spread_text(times["median_s"], 0, scale=1000))
        every = against["mean_step_speedup"][phase]
        verdict = (
            spread_text(against["step_speedup"][phase], 2) + f" ({spread_text(spread([every['mean']]), 2)}) × as fast"
        )
        table.add_row(f"step in {phase}, ms", *both, verdict)
    work = dgm["mask_work"]
    apart = {"an observing step takes more, ms": "observe_extra_s", "a mask update, ms": "update_extra_s"}
    together = {"a mask update and its observing step, ms": "both_extra_s"}
    is_apart = work["observe_extra_s"]["mean"] is not None or work["both_extra_s"]["mean"] is None
    for label, key in (apart if is_apart else together).items():
        table.add_row(label, "", spread_text(work[key], 0, scale=1000), "")
    table.add_row("observing and updating, % of steps", "", spread_text(work["share"], 1, scale=100), "")
    if profile:
        table.add_section()
        for part in profile[DENSE]["ms"]:
            cells = tuple(f"{profile[m]['ms'][part]:.0f} ({profile[m]['share'][part]:.0%})" for m in (DENSE, DGM))
            table.add_row(f"profile: {part}, ms a step", *cells, "")
    return table


def _table(title: str, headings: Sequence[str], notes: str) -> Table:
    table = Table(title=title, caption=notes, title_justify="left", caption_justify="left")
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def sweep_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Validation loss of each mode at each learning rate; the best of each mode is bold."""
    rates, best = losses_by_rate(runs), best_rates(runs)
    table = Table(title="Validation loss by learning rate (mean over the seeds)", title_justify="left")
    table.add_column("learning rate", justify="right")
    for mode in rates:
        table.add_column(TITLES[mode], justify="right")
    for lr in sorted({lr for losses in rates.values() for lr in losses}):
        cells = []
        for mode, losses in rates.items():
            text = f"{fmean(losses[lr]):.4f}" if lr in losses else ""
            cells.append(f"[bold]{text}[/bold]" if lr == best[mode]["lr"] else text)
        table.add_row(f"{lr:g}", *cells)
    return table


def _speedup_text(values: Spread) -> str:
    return spread_text(values, 2, unit="× as fast")


def _percent_text(values: Spread, places: int) -> str:
    return spread_text(values, places, scale=100.0, unit="%")
