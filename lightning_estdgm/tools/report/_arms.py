"""Runs grouped into arms: those that differ in nothing but their seeds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_estdgm.tools.report._finished_run import FinishedRun
from lightning_estdgm.tools.report._words import text


def group(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Group runs by arm, in the order in which they were named.

    Without a label, runs of one method are one arm if their configurations agree; arms of one method are told apart
    by what differs.
    """
    labelled: dict[str, list[FinishedRun]] = {}
    found: dict[tuple[str, tuple[tuple[str, str], ...]], list[FinishedRun]] = {}
    for run in runs:
        if run.label is not None:
            labelled.setdefault(run.label, []).append(run)
        else:
            name = "dense" if run.method is None else str(run.method.get("name", "unnamed method"))
            found.setdefault((name, tuple(_configuration(run).items())), []).append(run)
    arms = dict(labelled)
    for (name, configuration), members in found.items():
        others = [dict(c) for n, c in found if n == name and c != configuration]
        own = [f"{key} {value}" for key, value in configuration if any(other.get(key) != value for other in others)]
        title = ", ".join([name, *own])
        arms[title] = [*arms.get(title, []), *members]
    return arms


def _configuration(run: FinishedRun) -> dict[str, str]:
    """Settings in which runs of one method agree that are seeds of each other."""
    settings = ("batch_size", "accumulate_grad_batches", "world_size", "precision", "strategy", "compiled")
    method = run.method or {}
    return {
        **{name.replace("_", " "): text(run.run.get(name)) for name in settings},
        **({"schedule": text(method["schedule"])} if "schedule" in method else {}),
    }


def check_runs(runs: Sequence[FinishedRun]) -> None:
    """Check that runs can be compared.

    Raises:
        ValueError: There is no run, or one run twice, or there are runs of different models.
    """
    if not runs:
        raise ValueError("got no run, expected at least one")
    seen: dict[Any, FinishedRun] = {}
    for run in runs:
        fit = next(reversed(run.fits), None)  # the same in each copy of a run's file
        for key in (run.path.resolve(), fit):
            if key in seen:
                raise ValueError(f"{run.path}: named twice, which would count its joules twice")
            if key is not None:
                seen[key] = run
    first = runs[0]
    for run in runs[1:]:
        models = run.run["model"], first.run["model"]
        # A fingerprint is None where the parameters had no shapes yet.
        if any(len({model.get(key) for model in models} - {None}) > 1 for key in ("class", "fingerprint")):
            raise ValueError(
                f"expected runs of one model, got two: {first.path} is {_model_text(first)}, "
                f"{run.path} is {_model_text(run)}"
            )


def short_names(runs: Sequence[FinishedRun]) -> dict[Path, str]:
    """Shortest end of each run's folder that tells the runs apart, by folder."""
    folders = [run.path.resolve() for run in runs]
    common = os.path.commonpath([folder.parent for folder in folders])
    return {run.path: os.path.relpath(folder, common) for run, folder in zip(runs, folders, strict=True)}


def _model_text(run: FinishedRun) -> str:
    model = run.run["model"]
    fingerprint = str(model.get("fingerprint"))[:12]
    return f"{model.get('class')} with {model.get('parameters')} parameters (fingerprint {fingerprint})"
