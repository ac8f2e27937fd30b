"""The command line: ``estdgm demo``, ``estdgm train``, ``estdgm report``, ``estdgm doctor``, ``estdgm bench``."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from lightning_estdgm.tools.bench.commands import app as bench_commands

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
    block_size: Annotated[
        str | None, typer.Option(help="Unit of the masks: auto, 1, 16, 32, 64 or 128 (default: auto).")
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
    sweep: Annotated[bool, typer.Option("--sweep", help="Train both at several learning rates instead.")] = False,
    lr: Annotated[
        list[float] | None,
        typer.Option(help="With --sweep: a rate, at least three times (default: 0.0005, 0.001, 0.002)."),
    ] = None,
) -> None:
    """Train a small GPT dense and by EST-DGM on the same batches, and show what each cost."""
    # Imported here: --help and --version should not wait for torch.
    from lightning_estdgm.tools.bench.environment import command_line
    from lightning_estdgm.tools.demo.demo_config import DemoConfig
    from lightning_estdgm.tools.demo.records import DENSE, DGM
    from lightning_estdgm.tools.demo.run import run_demo
    from lightning_estdgm.tools.demo.sweep import run_sweep

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


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    options_metavar="gpt|resnet|gnn --data PATH [--method NAME] [OPTIONS]",
)
def train(context: typer.Context) -> None:
    """Train a recipe on a data set on disk, dense or by a method.

    Options are LightningCLI's: `estdgm train gpt --help` lists them. --config takes a YAML file, or one of these names:
    gpt-125m, gpt-350m, gpt-1.3b, resnet50, gcn-cora, sage-arxiv.
    """
    recipe, *given = context.args or ["--help"]
    if recipe in ("--help", "-h"):
        typer.echo(context.get_help())
        return
    from lightning_estdgm.tools.train import RECIPES, prepare

    if recipe not in RECIPES:
        raise typer.BadParameter(f"got {recipe!r}, expected first one of {', '.join(RECIPES)}", param_hint="recipe")
    try:
        run = prepare(recipe, given)
    except ModuleNotFoundError as e:
        typer.echo(f"estdgm train {recipe}: {e}", err=True)
        raise typer.Exit(1) from e
    except (OSError, ValueError, TypeError) as e:
        raise typer.BadParameter(str(e)) from e
    run.fit()


@app.command()
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
    from lightning_estdgm.tools.study.figures import draw_study
    from lightning_estdgm.tools.study.plans import plan_named
    from lightning_estdgm.tools.study.results_table import ResultsTable, read_rows
    from lightning_estdgm.tools.study.runner import run_study
    from lightning_estdgm.tools.study.summary import markdown
    from lightning_estdgm.tools.study.tasks import task_named

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


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="[LABEL=]RUN...",
            help="Folders of runs, each with one energy.json inside. Runs of one LABEL are one arm, its seeds; "
            "without labels, those of one method and configuration. The baseline is the arm without a method, or the "
            "first.",
        ),
    ],
    out: Annotated[
        list[Path] | None,
        typer.Option("--out", "-o", help="A .html, .md or .json file; repeatable. Without any, Markdown is printed."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="The logged metric that is to be reached (default: the one named like a validation loss)."),
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="The value to reach (default: the worst of the baseline runs' best values).")
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="min or max: is a low or a high value good? (default: by the metric's name)")
    ] = None,
) -> None:
    """Compare finished runs of one model: joules to the same target and at the same budget, and what they rest on."""
    from lightning_estdgm.tools.report import FORMATS, compare, document, markdown, read_run, write

    for path in out or ():
        if path.suffix not in FORMATS or path.is_dir():
            names = ", ".join(FORMATS)
            raise typer.BadParameter(f"got {str(path)!r}, expected a file that ends in {names}", param_hint="--out")
    if mode not in (None, "min", "max"):
        raise typer.BadParameter(f"got {mode!r}, expected min or max", param_hint="--mode")
    try:
        read = [read_run(folder, label) for folder, label in map(_labelled, runs)]
        comparison = compare(read, metric, target, cast(Any, mode))
    except ValueError as e:
        raise typer.BadParameter(str(e)) from e
    if not out:
        typer.echo(markdown(comparison))
        return
    for headline in document(comparison).headlines:
        typer.echo(headline.text)
    for path in out:
        write(comparison, path)
        typer.echo(str(path))


def _labelled(text: str) -> tuple[Path, str | None]:
    """``label=folder``, or a folder, which may have an equals sign in its own name."""
    label, equals, folder = text.partition("=")
    if not equals or "/" in label or Path(text).exists():
        return Path(text), None
    if not label or not folder:
        raise ValueError(f"got {text!r}, expected a folder, or a label, an equals sign and a folder")
    return Path(folder), label


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="Drop the layer timings of this machine: the next run measures anew.")
    ] = False,
) -> None:
    """Say what can measure energy here, read it for a second, and say why the rest cannot.

    Then which backends can compute layers here, and what was measured to choose between them and dense.
    The exit status is 0 if energy can be measured, and 1 if it could only be estimated, or not even that.
    """
    from json import dumps

    from lightning_estdgm.tools.doctor import diagnose, show

    result = diagnose(remeasure=remeasure)
    if json:
        typer.echo(dumps(result, indent=2))
    else:
        Console(width=max(Console().width, 120)).print(show(result))
    raise typer.Exit(0 if result["measurable"] else 1)


app.add_typer(bench_commands, name="bench")


@app.command()
def densify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="What SparseCheckpointIO has saved.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The ordinary checkpoint (default: CKPT with .dense.ckpt).")
    ] = None,
    weights_only: Annotated[
        bool, typer.Option(help="Refuse objects other than tensors and plain types, as torch.load does.")
    ] = True,
) -> None:
    """Turn a sparse checkpoint into an ordinary one, which needs neither the plugin nor this package."""
    import pickle

    from lightning_estdgm.plugins import densify_checkpoint

    try:
        dense = densify_checkpoint(checkpoint, out, weights_only=weights_only)
    except (OSError, ValueError) as e:
        raise typer.BadParameter(str(e), param_hint="CKPT") from e
    except pickle.UnpicklingError as e:
        message = f"{checkpoint} holds objects of other classes; if you trust it: --no-weights-only. {e}"
        raise typer.BadParameter(message, param_hint="CKPT") from e
    typer.echo(f"{dense}: {dense.stat().st_size:,} bytes, from {checkpoint.stat().st_size:,}")


@app.command()
def plan(
    params: Annotated[
        float | None, typer.Option(help="Size of a GPT by the recipe's shapes, such as 125e6, 13e9 or 70e9.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Your model instead: package.module:factory, made without storage.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of the whole job (default: 8).")] = None,
    density: Annotated[float | None, typer.Option(help="Active share of the masked weights (default: 0.1).")] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="ddp, fsdp2 or 2d; may be given again (default: all three).")
    ] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="GPUs that share a layer, for 2d (default: 2).")] = None,
    precision: Annotated[str | None, typer.Option(help="32-true, bf16-mixed or bf16-true (default: 32-true).")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, sgd-momentum or sgd (default: adamw).")] = None,
    block_size: Annotated[
        str | None, typer.Option(help="Unit of the masks: auto, 1, 16, 32, 64 or 128 (default: auto).")
    ] = None,
    distribution: Annotated[str | None, typer.Option(help="erk or uniform (default: erk).")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens that one GPU trains on in a step (default: 16384).")
    ] = None,
    update_every: Annotated[int | None, typer.Option(help="Steps between mask updates (default: 200).")] = None,
    observe_steps: Annotated[int | None, typer.Option(help="Of them observed (default: 8).")] = None,
    json: Annotated[Path | None, typer.Option(help="Where a JSON of all the numbers goes.")] = None,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Print the tables of docs/scaling.md instead, as Markdown.")
    ] = False,
) -> None:
    """Calculate what each GPU would hold and send, and list the layers that would be masked; nothing is trained."""
    from lightning_estdgm.tools.bench.environment import command_line
    from lightning_estdgm.tools.planner.plan import STRATEGIES, Setup, gpt, load_model, plan_tables, scaling_tables
    from lightning_estdgm.tools.planner.plan import plan as make_plan
    from lightning_estdgm.tools.report import write_json

    if scaling:
        typer.echo(scaling_tables())
        return
    if (params is None) == (model is None):
        raise typer.BadParameter("expected one of --params and --model", param_hint="--params")
    given: dict[str, Any] = {
        "gpus": gpus, "density": density, "tensor_parallel": tensor_parallel, "precision": precision,
        "optimizer": optimizer, "block_size": _block_size(block_size), "distribution": distribution,
        "tokens": tokens, "update_every": update_every, "observe_steps": observe_steps,
    }  # fmt: skip
    try:
        setup = Setup(**{name: value for name, value in given.items() if value is not None})
        result = make_plan(gpt(params) if params is not None else load_model(str(model)), setup, strategy or STRATEGIES)
    except (ValueError, TypeError) as e:
        raise typer.BadParameter(str(e)) from e
    console = Console(width=max(Console().width, 120))
    for table in plan_tables(result):
        console.print(table)
    console.print("calculated, not measured; docs/scaling.md has the formulas", style="dim", soft_wrap=True)
    if json is not None:
        write_json({"command": command_line(), **result}, json)
        console.print(str(json), style="dim", soft_wrap=True)


def _block_size(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text


def main() -> None:
    """Entry point of the ``estdgm`` command."""
    app()


if __name__ == "__main__":
    main()
