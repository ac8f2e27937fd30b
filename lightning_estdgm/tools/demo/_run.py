"""The demo: a GPT trained dense and by EST-DGM on the same batches, then a smaller dense one for the same joules."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_estdgm.tools._progress import waiting
from lightning_estdgm.tools._terminal import default_console
from lightning_estdgm.tools.demo._arms import run_name, train
from lightning_estdgm.tools.demo._demo_config import DemoConfig
from lightning_estdgm.tools.demo._figures import draw_demo
from lightning_estdgm.tools.demo._measures import summarize
from lightning_estdgm.tools.demo._records import DENSE, DGM, SMALL, RunRecord, records
from lightning_estdgm.tools.demo._rival import rival_of
from lightning_estdgm.tools.demo._session import header, session
from lightning_estdgm.tools.demo._step_profile import profile_steps
from lightning_estdgm.tools.demo._tables import networks_table, steps_table
from lightning_estdgm.tools.demo._texts import announcement, next_steps, result_line
from lightning_estdgm.tools.report import compare, read_run, write
from lightning_estdgm.tools.report._json_format import write_json


def run_demo(
    config: DemoConfig, json_path: Path | None = None, command: str = "", console: Console | None = None
) -> dict[str, Any]:
    """Train in turns, seed by seed; print the table; write PNG, JSON, report and TensorBoard runs.

    Dense and EST-DGM take the same steps. The smaller dense network has as many weights to serve as EST-DGM leaves, and
    as many steps as EST-DGM's joules buy.

    Args:
        config: Model, data and training.
        json_path: File for the JSON; ``out/demo.json`` if None.
        command: Command line, to be kept in the JSON.
        console: Console for the progress bar and the table.

    Returns:
        Content of the JSON.
    """
    console = console or default_console()
    began = time.perf_counter()
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    with waiting(console, "Reading the text"):
        content = header(config, command)
    console.print(announcement(config, content), soft_wrap=True)
    logs = config.out / "tensorboard" / stamp
    runs: list[RunRecord] = []
    with session(config, 2 * config.seeds, console) as bar:
        for seed in range(config.seeds):
            for mode in (DENSE, DGM, SMALL):
                its = config
                if mode == SMALL:
                    bar.say("A few steps of a smaller network, to see how many its joules buy ...")
                    its = rival_of(config, runs[-1])
                    bar.expect(its.steps)
                runs.append(train(its, mode, seed, its.lr(mode), bar, logs))
                bar.say(result_line(runs[-1]))
    profiled = None
    if config.profile_steps:
        with waiting(console, "Profiling a few steps of both"):
            profiled = {mode: profile_steps(config, mode) for mode in (DENSE, DGM)}
    with waiting(console, "Drawing the figures, writing the report"):
        summary = summarize(runs)
        png = config.out / "demo.png"
        draw_demo(runs, png)
        report = config.out / "report.html"
        same_steps = [run_name(run.mode, run.seed, run.lr) for run in runs if run.mode != SMALL]
        write(compare([read_run(logs / name) for name in same_steps], "val/loss"), report)
    files = {"png": str(png), "report": str(report), "tensorboard": str(logs)}
    content |= {"files": files, "seconds": time.perf_counter() - began}
    content |= {"summary": summary, "profile": profiled, "runs": records(runs)}
    json_path = json_path or config.out / "demo.json"
    write_json(content, json_path)
    console.print(steps_table(summary, runs, profiled))
    console.print(networks_table(summary, runs))
    console.print(next_steps(json_path, png, report, logs), soft_wrap=True, highlight=False)
    return content
