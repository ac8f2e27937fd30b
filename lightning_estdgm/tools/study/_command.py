"""``estdgm study``: the command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def study(
    preset: Annotated[str, typer.Option(help="Which runs: headline, rates, methods, ablations or quick.")] = "headline",
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
) -> None:
    """Train the methods side by side on small tasks that need no download; go on where an earlier call stopped."""
    # Imported here: --help should not wait for torch.
    from lightning_estdgm.tools.study._figures import draw_study
    from lightning_estdgm.tools.study._plans import plan_named
    from lightning_estdgm.tools.study._results_table import ResultsTable, read_rows
    from lightning_estdgm.tools.study._runner import run_study
    from lightning_estdgm.tools.study._summary import markdown
    from lightning_estdgm.tools.study._tasks import task_named

    console = Console()
    try:
        chosen = {task_named(name).name for name in task or ()}
        runs = [run for run in plan_named(preset) if not chosen or run.task in chosen]
        table = ResultsTable(out / f"{preset}.csv")
        if not report_only:
            run_study(runs, table, jobs or len(os.sched_getaffinity(0)), console)
        rows = read_rows(table.path)
        text = markdown(rows)
        draw_study(rows, out / f"{preset}.png")
    except (ValueError, FileNotFoundError) as e:
        raise typer.BadParameter(str(e)) from e
    (out / f"{preset}.md").write_text(text, encoding="utf-8")
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{table.path}\n{out / f'{preset}.md'}\n{out / f'{preset}.png'}", style="dim", soft_wrap=True)
