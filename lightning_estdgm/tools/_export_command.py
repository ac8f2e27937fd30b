"""``estdgm export``: the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lightning_estdgm.tools._terminal import reading_checkpoint


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint, sparse or ordinary.")],
    to: Annotated[str, typer.Option(help="packed, aoti, torch-csr, onnx, mnn or 2:4.")],
    model: Annotated[
        str, typer.Option(help="The LightningModule's class, or a function that makes the module: package.module:name.")
    ],
    example: Annotated[
        str | None,
        typer.Option(
            help="An example input: package.module:name of a tensor, tuple or dict, or of a function that returns one "
            "(default: the module's example_input_array)."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file (default: beside the checkpoint).")] = None,
    values: Annotated[str | None, typer.Option(help="Type of stored values, such as bf16 or int8, by target.")] = None,
    dynamic: Annotated[
        str, typer.Option(help="What of the inputs may vary: batch, shape (all that can: text, graphs) or none.")
    ] = "batch",
    evaluate: Annotated[
        str | None,
        typer.Option(
            help="package.module:function that takes the model as a function and returns a number: its quality, told "
            "for the model and for what was written."
        ),
    ] = None,
    weights_only: Annotated[
        bool, typer.Option(help="Refuse objects other than tensors and plain types, as torch.load does.")
    ] = True,
) -> None:
    """Write a trained model in a form that it is served from, check it against PyTorch, and say its size and time."""
    from lightning_estdgm.export import ExportError, export_checkpoint
    from lightning_estdgm.tools._named_object import named_object

    try:
        given: Any = named_object("--example", example) if example is not None else None
        with reading_checkpoint(checkpoint):
            report = export_checkpoint(
                checkpoint,
                to,
                out,
                model=named_object("--model", model),
                example=given() if callable(given) else given,
                weights_only=weights_only,
                values=values,
                dynamic=dynamic,
                evaluate=named_object("--evaluate", evaluate) if evaluate is not None else None,
            )
    except (ExportError, ModuleNotFoundError) as e:
        typer.echo(f"estdgm export --to {to}: {e}", err=True)
        raise typer.Exit(1) from e
    except (OSError, ValueError) as e:
        raise typer.BadParameter(str(e)) from e
    typer.echo(str(report))
