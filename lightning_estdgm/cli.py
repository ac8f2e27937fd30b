"""The command line, ``estdgm``: the short commands, and those of the tools that have a module for theirs.

Commands import what they run when they run: ``--help`` and ``--version`` load neither torch nor Lightning.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from lightning_estdgm.tools._export_command import export
from lightning_estdgm.tools._terminal import reading_checkpoint, wide_console
from lightning_estdgm.tools.bench._commands import app as bench_commands
from lightning_estdgm.tools.demo._command import demo
from lightning_estdgm.tools.planner._command import plan
from lightning_estdgm.tools.study._command import study

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


app.command()(demo)


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
    from lightning_estdgm.tools._train import RECIPES, prepare

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


app.command()(study)


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
    from lightning_estdgm.tools.report import compare, markdown, read_run, write
    from lightning_estdgm.tools.report._document import document
    from lightning_estdgm.tools.report._render import FORMATS

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
        try:
            write(comparison, path)
        except OSError as e:
            raise typer.BadParameter(str(e), param_hint="--out") from e
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

    from lightning_estdgm.tools._doctor import diagnose, show

    result = diagnose(remeasure=remeasure)
    if json:
        typer.echo(dumps(result, indent=2))
    else:
        wide_console(120).print(show(result))
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
    from lightning_estdgm.export import densify_checkpoint

    try:
        with reading_checkpoint(checkpoint):
            dense = densify_checkpoint(checkpoint, out, weights_only=weights_only)
    except (OSError, ValueError) as e:
        raise typer.BadParameter(str(e), param_hint="CKPT") from e
    typer.echo(f"{dense}: {dense.stat().st_size:,} bytes, from {checkpoint.stat().st_size:,}")


app.command()(export)


app.command()(plan)


def main() -> None:
    """Entry point of the ``estdgm`` command."""
    app()


if __name__ == "__main__":
    main()
