"""Training the runs of a plan that a table lacks, several at a time."""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from datetime import datetime, timezone
from typing import Any

import torch
from rich.console import Console

from lightning_estdgm.tools.bench._environment import environment
from lightning_estdgm.tools.study._results_table import ResultsTable
from lightning_estdgm.tools.study._study_run import StudyRun
from lightning_estdgm.tools.study._training import train


def run_study(
    runs: Sequence[StudyRun],
    table: ResultsTable,
    jobs: int,
    console: Console,
    *,
    until: float = math.inf,
    how: Callable[[StudyRun], Mapping[str, Any]] = train,
    command: str = "estdgm study",
) -> None:
    """Train the runs that a table lacks, several at a time with an equal share of the threads; append row by row.

    Small networks gain nothing from several threads, so one run a core is the fastest. Seconds are then those of a busy
    machine: compare them with each other, not with a run alone.

    Args:
        runs: Runs that the table is to hold.
        table: Table to append to.
        jobs: Number of runs at a time.
        console: Console for a line a run.
        until: Time of `time.perf_counter` after which no run begins; those under way end and are written.
        how: Trains a run, and returns the values of its row.
        command: Command to which ``--run`` and the run's name are added, for the table.

    Raises:
        ValueError: `jobs` is below 1.
        Exception: A run raised it; the runs under way have ended and been written before.

    """
    if jobs < 1:
        raise ValueError(f"jobs: got {jobs}, expected at least 1")
    todo, began = table.lacks(runs), time.perf_counter()
    console.print(f"{len(runs) - len(todo)} of {len(runs)} runs are in {table.path}; {len(todo)} to train")
    if not todo:
        return
    about = environment()
    threads = max(1, min(about["cores"] or 1, about["threads"]) // jobs)  # OMP_NUM_THREADS has its say
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_prepare, initargs=(threads,)) as pool:
        waiting: dict[Future[Mapping[str, Any]], StudyRun] = {pool.submit(how, run): run for run in todo}
        failed: BaseException | None = None
        for count, future in enumerate(as_completed(waiting), 1):
            run = waiting[future]
            if future.cancelled():
                continue
            if (error := future.exception()) is not None:
                failed = failed or error
                for other in waiting:
                    other.cancel()  # as_completed would not learn of shutdown(cancel_futures=True), and wait forever
                continue
            if time.perf_counter() > until:
                for other in waiting:
                    other.cancel()
            when = datetime.now(timezone.utc).isoformat(timespec="seconds")
            result = future.result()
            about_run = {"when": when, "torch": about["torch"], "cpu": about["cpu"]}
            about_run["command"] = f"{command} --run {run.id}"
            table.add(run, {**result, **about_run})
            left = (time.perf_counter() - began) / count * (len(todo) - count)
            console.print(
                f"[{count}/{len(todo)}] {run.task} {run.method} {run.variant} lr {run.lr:g} seed {run.seed} "
                f"x{run.length:g}: loss {result['val_loss']:.4f} accuracy {result['val_accuracy']:.4f} "
                f"({result['seconds']:.0f} s; about {left / 60:.0f} min left)",
                highlight=False,
                soft_wrap=True,
            )
        if failed is not None:
            raise failed


def _prepare(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the study ends, however it does: a Trainer takes SIGTERM for itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
