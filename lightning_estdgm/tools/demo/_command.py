"""``estdgm demo``: the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lightning_estdgm.tools._progress import waiting
from lightning_estdgm.tools._terminal import command_line, default_console, parse_block_size


def demo(
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of dense and of EST-DGM (default: 300).")] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Rounds of runs (dense, EST-DGM, smaller dense), one seed each (default: 1).")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Where the JSON goes (default: demo.json or sweep.json in OUT).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for PNG, JSON, report and TensorBoard runs (default: runs/demo).")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text file to learn (default: Python's standard library).")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows a step (default: 16).")] = None,
    context: Annotated[int | None, typer.Option(help="Bytes a window (default: 128).")] = None,
    width: Annotated[int | None, typer.Option(help="Width of the model (default: 512).")] = None,
    layers: Annotated[int | None, typer.Option(help="Decoder blocks (default: 2).")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads (default: 8).")] = None,
    lr_dense: Annotated[
        float | None, typer.Option(help="Peak learning rate of the dense runs (default: 0.001).")
    ] = None,
    lr_dgm: Annotated[
        float | None, typer.Option(help="Peak learning rate of the EST-DGM runs (default: 0.001).")
    ] = None,
    lr_small: Annotated[
        float | None, typer.Option(help="Peak learning rate of the smaller dense runs (default: 0.004).")
    ] = None,
    block_size: Annotated[
        str | None, typer.Option(help="Unit of the masks: auto, 1, 4x1, 4, 16, 32, 64 or 128 (default: 64).")
    ] = None,
    distribution: Annotated[
        str | None, typer.Option(help="Densities over the layers: erk or uniform (default: erk).")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="auto, or dense or a backend's name for all masked layers (default: auto)."),
    ] = None,
    val_windows: Annotated[int | None, typer.Option(help="Validation windows (default: 256).")] = None,
    profile_steps: Annotated[
        int | None, typer.Option(help="Steps of the profile after the runs; 0 for none (default: 4).")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Train each at several learning rates instead.")] = False,
    lr: Annotated[
        list[float] | None,
        typer.Option(help="With --sweep: a rate, at least three times (default: 0.0005, 0.001, 0.002, 0.004)."),
    ] = None,
) -> None:
    """Train a small GPT dense, by EST-DGM on the same batches, and a smaller dense one; show what each cost."""
    console = default_console()
    with waiting(console, "Loading PyTorch and Lightning"):  # imported here: --help should not wait for torch
        from lightning_estdgm.tools.demo._demo_config import DemoConfig
        from lightning_estdgm.tools.demo._records import DENSE, DGM, SMALL
        from lightning_estdgm.tools.demo._run import run_demo
        from lightning_estdgm.tools.demo._sweep import run_sweep

    given: dict[str, Any] = {
        "steps": steps, "seeds": seeds, "out": out, "text": text, "batch_size": batch_size, "context": context,
        "width": width, "layers": layers, "heads": heads, "lr_dense": lr_dense, "lr_dgm": lr_dgm, "lr_small": lr_small,
        "val_windows": val_windows, "profile_steps": profile_steps,
    }  # fmt: skip
    units = {"size": block_size and parse_block_size(block_size), "distribution": distribution}
    if lr and not sweep:
        raise typer.BadParameter(
            "expected together with --sweep; the demo takes --lr-dense, --lr-dgm and --lr-small", param_hint="--lr"
        )
    rates = lr or [5e-4, 1e-3, 2e-3, 4e-3]
    if len(set(rates)) < 3:
        raise typer.BadParameter(f"got {rates}, expected at least three different learning rates", param_hint="--lr")
    if json is not None and json.is_dir():
        raise typer.BadParameter(f"got the folder {str(json)!r}, expected a file name", param_hint="--json")
    try:
        config = DemoConfig(**_given(given))
        dgm = config.dgm.merged(units=_given(units), **_given({"backend": backend}))
        config = replace(config, dgm=dgm)
        for rate in rates if sweep else ():
            config.model(rate)
        config.data(seed=0).setup()
    except (ValueError, TypeError) as e:
        raise typer.BadParameter(str(e)) from e
    if sweep:
        run_sweep(config, dict.fromkeys((DENSE, DGM, SMALL), rates), json, command_line(), console)
    else:
        run_demo(config, json, command_line(), console)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
