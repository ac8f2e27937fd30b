"""Sweep of learning rates over all modes of the demo."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_estdgm.tools._progress import waiting
from lightning_estdgm.tools._terminal import default_console
from lightning_estdgm.tools.demo._arms import train
from lightning_estdgm.tools.demo._demo_config import DemoConfig
from lightning_estdgm.tools.demo._measures import best_rates
from lightning_estdgm.tools.demo._records import DENSE, DGM, SMALL, RunRecord
from lightning_estdgm.tools.demo._rival import rival_of
from lightning_estdgm.tools.demo._session import header, session
from lightning_estdgm.tools.demo._tables import sweep_table
from lightning_estdgm.tools.report._json_format import write_json


def run_sweep(
    config: DemoConfig,
    rates: Mapping[str, Sequence[float]],
    json_path: Path | None = None,
    command: str = "",
    console: Console | None = None,
) -> dict[str, Any]:
    """Train each mode at each of its learning rates, else as in the demo; print and write the validation losses.

    Args:
        config: Model, data and training.
        rates: Learning rates by mode: `DENSE` and `DGM`; `SMALL` as well, which gets the joules of EST-DGM's best run.
        json_path: File for the JSON; ``out/sweep.json`` if None.
        command: Command line, to be kept in the JSON.
        console: Console for the progress bar and the table.

    Returns:
        Content of the JSON.

    Raises:
        ValueError: A mode has fewer than three different rates, which cannot show that the best is not at an end.
    """
    for mode in dict.fromkeys((DENSE, DGM, *rates)):
        given = list(rates.get(mode, ()))
        if len(set(given)) < 3:
            raise ValueError(f"learning rates of {mode}: got {given}, expected at least three different ones")
    console = console or default_console()
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    with waiting(console, "Reading the text"):
        content = header(config, command)
    logs, runs = config.out / "tensorboard" / f"sweep-{stamp}", []
    different = {mode: list(dict.fromkeys(given)) for mode, given in rates.items()}
    with session(config, config.seeds * (len(different[DENSE]) + len(different[DGM])), console) as bar:

        def train_each(its: DemoConfig, mode: str, seed: int) -> list[RunRecord]:
            done = []
            for lr in different[mode]:
                done.append(train(its, mode, seed, lr, bar, logs))
                bar.say(f"{mode} seed {seed} lr {lr:g}: validation loss {done[-1].validation[-1].loss:.4f}")
            return done

        for seed in range(config.seeds):
            runs += train_each(config, DENSE, seed)
            sparse = train_each(config, DGM, seed)
            runs += sparse
            if SMALL in different:
                its = rival_of(config, min(sparse, key=lambda run: run.validation[-1].loss))
                bar.expect(its.steps * len(different[SMALL]))
                runs += train_each(its, SMALL, seed)
    losses = [
        {
            "mode": run.mode,
            "lr": run.lr,
            "seed": run.seed,
            "width": run.width,
            "steps": len(run.steps),
            "val_loss": run.validation[-1].loss,
            "curve": [asdict(v) for v in run.validation],
            "train_s": math.fsum(run.steps.wall_s),
            "train_j": run.energy.get("train_joules"),
            "energy_method": run.energy.get("method"),
        }
        for run in runs
    ]
    best = best_rates(losses)
    at_end = {mode: best[mode]["lr"] in (min(rates[mode]), max(rates[mode])) for mode in best}
    content |= {"best": best, "best_is_at_an_end": at_end, "sweep": losses}
    json_path = json_path or config.out / "sweep.json"
    write_json(content, json_path)
    console.print(sweep_table(losses))
    for mode, is_end in at_end.items():
        if is_end:
            console.print(f"the best rate of {mode} is at an end of its range: widen the range", style="yellow")
    console.print(str(json_path), style="dim", soft_wrap=True)
    return content
