"""``estdgm study``: the command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def study(
    preset: Annotated[
        str,
        typer.Option(
            help="Which runs: headline, rates, methods, ablations, references, allocations, evidence or quick."
        ),
    ] = "headline",
    out: Annotated[
        Path, typer.Option(help="Folder for the table, its Markdown and its picture; a study there goes on.")
    ] = Path("runs/study"),
    jobs: Annotated[
        int | None, typer.Option(help="Runs at a time (default: one a core; the networks are small).")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this task; repeatable (default: all).")] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Train nothing: write Markdown and picture of the table as it is.")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with fashion-mnist, planetoid and wikitext-2 in it (default: ESTDGM_DATA, or data)."),
    ] = None,
    run: Annotated[
        list[str] | None, typer.Option(help="Train this run again, or the seeds of this arm, as tables name them.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no run after so long; the same command goes on where this one ended.")
    ] = None,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", help="Nothing else runs on this machine: take seconds and joules (preset evidence)."),
    ] = False,
) -> None:
    """Train methods side by side; go on where an earlier call stopped. Nothing is downloaded."""
    # Imported here: --help should not wait for torch.
    from lightning_estdgm.tools.study._data_folders import DATA_VARIABLE
    from lightning_estdgm.tools.study._session import Session

    console = Console()
    if data is not None:
        os.environ[DATA_VARIABLE] = str(data.absolute())
    try:
        session = Session(preset, out, console, task or (), run or (), quiet)
        if not report_only:
            session.train(jobs or len(os.sched_getaffinity(0)), minutes)
        text, files = session.report()
    except (ValueError, FileNotFoundError) as e:
        raise typer.BadParameter(str(e)) from e
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print("\n".join(str(file) for file in files), style="dim", soft_wrap=True)
