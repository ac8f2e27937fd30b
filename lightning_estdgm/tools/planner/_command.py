"""``estdgm plan``: the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lightning_estdgm.tools._terminal import command_line, parse_block_size, wide_console


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
        str | None,
        typer.Option(help="Unit of the masks: 1, 16, 32, 64, 128, or auto, here the largest block (default)."),
    ] = None,
    distribution: Annotated[str | None, typer.Option(help="erk or uniform (default: erk).")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens that one GPU trains on in a step (default: 16384).")
    ] = None,
    update_every: Annotated[int | None, typer.Option(help="Steps between mask updates (default: 200).")] = None,
    observe_steps: Annotated[int | None, typer.Option(help="Of them observed (default: 8).")] = None,
    json: Annotated[Path | None, typer.Option(help="Where a JSON of all the numbers goes.")] = None,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Print the tables of docs/guides/scaling.md instead, as Markdown.")
    ] = False,
) -> None:
    """Calculate what each GPU would hold and send, and list the layers that would be masked; nothing is trained."""
    # Imported here: --help should not wait for torch.
    from lightning_estdgm.tools.planner._gpt_sizes import gpt
    from lightning_estdgm.tools.planner._model_plan import plan_model
    from lightning_estdgm.tools.planner._planned_model import load_model
    from lightning_estdgm.tools.planner._scaling import scaling_tables
    from lightning_estdgm.tools.planner._setup import STRATEGIES, TrainingSetup
    from lightning_estdgm.tools.planner._tables import plan_tables
    from lightning_estdgm.tools.report._json_format import write_json

    if scaling:
        typer.echo(scaling_tables())
        return
    if (params is None) == (model is None):
        raise typer.BadParameter("expected one of --params and --model", param_hint="--params")
    given: dict[str, Any] = {
        "gpus": gpus, "density": density, "tensor_parallel": tensor_parallel, "precision": precision,
        "optimizer": optimizer, "block_size": block_size and parse_block_size(block_size), "distribution": distribution,
        "tokens": tokens, "update_every": update_every, "observe_steps": observe_steps,
    }  # fmt: skip
    try:
        setup = TrainingSetup(**{name: value for name, value in given.items() if value is not None})
        planned = gpt(params) if params is not None else load_model(str(model))
        result = plan_model(planned, setup, strategy or STRATEGIES)
    except (ValueError, TypeError) as e:
        raise typer.BadParameter(str(e)) from e
    console = wide_console(120)
    for table in plan_tables(result):
        console.print(table)
    console.print("calculated, not measured; docs/guides/scaling.md has the formulas", style="dim", soft_wrap=True)
    if json is not None:
        write_json({"command": command_line(), **result}, json)
        console.print(str(json), style="dim", soft_wrap=True)
