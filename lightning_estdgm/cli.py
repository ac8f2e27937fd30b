"""The command line: ``estdgm demo``, ``estdgm bench``."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="estdgm",
    help="Efficient sparse training by dynamic gradient masking: see it work, and what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(version("lightning-estdgm"))
        except PackageNotFoundError:
            typer.echo("unknown: running from a source tree that was never installed")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each run (default: 400).")] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Pairs of runs (dense and EST-DGM), one seed each (default: 1).")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Where the JSON goes (default: demo.json or sweep.json in OUT).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for PNG, JSON and TensorBoard runs (default: runs/demo).")
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
    block_size: Annotated[
        str | None, typer.Option(help="Unit of the masks: auto, 1, 16, 32, 64 or 128 (default: auto).")
    ] = None,
    distribution: Annotated[
        str | None, typer.Option(help="Densities over the layers: erk or uniform (default: erk).")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="auto, dense, reference or cpu, the last three for all masked layers (default: auto)."),
    ] = None,
    val_windows: Annotated[int | None, typer.Option(help="Validation windows (default: 256).")] = None,
    profile_steps: Annotated[
        int | None, typer.Option(help="Steps of the profile after the runs; 0 for none (default: 4).")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Train both at several learning rates instead.")] = False,
    lr: Annotated[
        list[float] | None,
        typer.Option(help="With --sweep: a rate, at least three times (default: 0.0005, 0.001, 0.002)."),
    ] = None,
) -> None:
    """Train a small GPT dense and by EST-DGM on the same batches, and show what each cost."""
    # Imported here: --help and --version should not wait for torch.
    from lightning_estdgm.bench.demo import DemoConfig, command_line, run_demo, run_sweep
    from lightning_estdgm.report import DENSE, DGM

    given: dict[str, Any] = {
        "steps": steps, "seeds": seeds, "out": out, "text": text, "batch_size": batch_size, "context": context,
        "width": width, "layers": layers, "heads": heads, "lr_dense": lr_dense, "lr_dgm": lr_dgm,
        "val_windows": val_windows, "profile_steps": profile_steps,
    }  # fmt: skip
    masks: dict[str, Any] = {"block_size": _block_size(block_size), "distribution": distribution, "backend": backend}
    if lr and not sweep:
        raise typer.BadParameter(
            "expected together with --sweep; the demo takes --lr-dense and --lr-dgm", param_hint="--lr"
        )
    rates = lr or [5e-4, 1e-3, 2e-3]
    if len(set(rates)) < 3:
        raise typer.BadParameter(f"got {rates}, expected at least three different learning rates", param_hint="--lr")
    if json is not None and json.is_dir():
        raise typer.BadParameter(f"got the folder {str(json)!r}, expected a file name", param_hint="--json")
    try:
        config = DemoConfig(**{name: value for name, value in given.items() if value is not None})
        dgm = replace(config.dgm, **{name: value for name, value in masks.items() if value is not None})
        config = replace(config, dgm=dgm)
        for rate in rates if sweep else ():
            config.model(rate)
        config.data(seed=0).setup()
    except (ValueError, TypeError) as e:
        raise typer.BadParameter(str(e)) from e
    if sweep:
        run_sweep(config, {DENSE: rates, DGM: rates}, json, command_line())
    else:
        run_demo(config, json, command_line())


bench = typer.Typer(help="Speed on this machine, as ratios against dense in the same run.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command()
def overhead(
    update_every: Annotated[int, typer.Option(help="Steps between mask updates; as many are timed.", min=20)] = 200,
    rounds: Annotated[int, typer.Option(help="How often it is repeated.", min=1)] = 3,
    json: Annotated[Path | None, typer.Option(help="Where a JSON goes.")] = None,
) -> None:
    """Time what single-weight masks add to a dense step of a small GPT; nothing is skipped there."""
    from lightning_estdgm.bench.overhead import OverheadConfig, measure_overhead, overhead_table

    result = measure_overhead(OverheadConfig(update_every=update_every, rounds=rounds))
    _show(overhead_table(result), result, json)


@bench.command()
def kernels(
    dtype: Annotated[list[str] | None, typer.Option(help="Data types (default: float32 bfloat16).")] = None,
    rounds: Annotated[int, typer.Option(help="Timed repetitions; the fastest counts.", min=1, max=12)] = 5,
    json: Annotated[Path | None, typer.Option(help="Where a JSON goes.")] = None,
) -> None:
    """Time forward, input gradient and weight gradient of sparse linear layers against dense ones."""
    from lightning_estdgm.bench.kernels import KernelsConfig, kernels_table, measure_kernels

    config = KernelsConfig(dtypes=dtype, rounds=rounds) if dtype else KernelsConfig(rounds=rounds)
    rows = list(measure_kernels(config))
    _show(kernels_table(rows), {"rows": rows}, json)


def _show(table: Table, content: dict[str, Any], json: Path | None) -> None:
    """Print a benchmark's table with the machine it ran on, and write its JSON where one is wanted."""
    from lightning_estdgm.bench.demo import command_line
    from lightning_estdgm.bench.environment import environment
    from lightning_estdgm.report import write_json

    machine = environment()
    console = Console(width=max(Console().width, 120))  # a log file has no width; the columns need this
    console.print(table)
    console.print(
        f"{machine['cpu']}, {machine['threads']} thread(s), torch {machine['torch']}", style="dim", soft_wrap=True
    )
    if json is not None:
        write_json({"command": command_line(), "environment": machine, **content}, json)
        console.print(str(json), style="dim", soft_wrap=True)


def _block_size(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text


def main() -> None:
    """Entry point of the ``estdgm`` command."""
    app()


if __name__ == "__main__":
    main()
