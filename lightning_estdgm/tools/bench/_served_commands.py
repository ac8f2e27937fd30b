"""``estdgm bench``: the commands that measure memory, and what was trained where it is served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lightning_estdgm.tools._terminal import check_output, parse_block_size


def serve(
    network: Annotated[str, typer.Option(help="mlp, or gpt for one decoder block.")] = "mlp",
    width: Annotated[int, typer.Option(help="Of the network, a multiple of 64.")] = 1024,
    density: Annotated[float, typer.Option(help="Active share of the weights.")] = 0.1,
    block_size: Annotated[int, typer.Option(help="Side of the units that are active or not.", min=1)] = 16,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens a call; repeatable (1, 16, 256, 2048).")] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            help="torch, packed, packed-bf16, packed-int8, packed-twice (twice the threads), aoti, aoti-bf16, "
            "torch-csr, onnx, mnn, openvino or openvino-int8; repeatable (default: all)."
        ),
    ] = None,
    generated: Annotated[int, typer.Option(help="Tokens that a GPT generates from its packed form.", min=0)] = 100,
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence at most; more are a batch.", min=1)] = 2048,
    threads: Annotated[int, typer.Option(help="Threads; 0: as many as PyTorch has.", min=0)] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", "--json", help="Where a JSON goes.")] = None,
) -> None:
    """Serve a sparse network in every runtime that is installed: tokens a second and memory, beside dense PyTorch."""
    from lightning_estdgm.tools.bench._goals import goals_table, serve_goals
    from lightning_estdgm.tools.bench._output import console, show
    from lightning_estdgm.tools.bench._serve import ServeConfig, measure_serving, serve_table

    check_output(output)
    given: dict[str, Any] = {"tokens": tokens, "runtimes": runtime}
    given = {name: tuple(value) for name, value in given.items() if value}
    try:
        config = ServeConfig(
            network, width, density, block_size, generated=generated, sequence=sequence, threads=threads, **given
        )
    except ValueError as e:
        raise typer.BadParameter(str(e)) from e
    out = console()
    result = measure_serving(config, lambda text: out.print(text, style="dim"))
    for text in result["left_out"]:
        out.print(f"left out: {text}", soft_wrap=True, markup=False)
    goals = serve_goals(result)
    show(serve_table(result), {"complete": True, "goals": goals, "served": result}, output)
    if goals:
        out.print(goals_table(goals))
    if (generation := result["generation"]) is not None:
        dense, packed = generation["torch"], generation["packed"]
        out.print(
            f"text, one token a step with a key-value cache: {packed:.0f} tokens/s packed, {dense:.0f} dense "
            f"({packed / dense:.2f}x)"
        )


def memory(
    weights: Annotated[
        float | None, typer.Option(help="Train a GPT of so many weights by packed storage alone, such as 3e9.")
    ] = None,
    width: Annotated[int, typer.Option(help="Of the GPT whose memory is measured.", min=1)] = 2048,
    layers: Annotated[int, typer.Option(help="Its decoder blocks.", min=1)] = 12,
    tokens: Annotated[int, typer.Option(help="Tokens of a step.", min=1)] = 256,
    density: Annotated[float, typer.Option(help="Active share of the weights.")] = 0.1,
    block_size: Annotated[
        list[int] | None, typer.Option(help="Sides of the mask units; repeatable (4, 16; with --weights 16).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps (6; with --weights 20).", min=3)] = None,
    rounds: Annotated[int, typer.Option(help="Trainings of each storage whose steps are timed.", min=1)] = 3,
    dense: Annotated[
        bool | None, typer.Option(help="Run dense training too, or calculate it (default: run it where it fits).")
    ] = None,
    speed: Annotated[bool, typer.Option(help="Time steps and mask work too.")] = True,
    json: Annotated[Path | None, typer.Option(help="Where a JSON goes.")] = None,
) -> None:
    """Train a GPT with dense and with packed storage: bytes, peak memory and time, each in a process of its own."""
    from lightning_estdgm.tools.bench._memory import MemoryBenchConfig, measure_memory, memory_table
    from lightning_estdgm.tools.bench._output import console, show

    given: dict[str, Any] = {} if weights is None else {"block_sizes": (16,), "steps": 20}
    asked = {"block_sizes": tuple(block_size or ()), "steps": steps}
    given |= {name: value for name, value in asked.items() if value}
    try:
        config = MemoryBenchConfig(
            width, layers, tokens, density, weights=weights, times_steps=speed, rounds=rounds, runs_dense=dense, **given
        )
    except ValueError as e:
        raise typer.BadParameter(str(e)) from e
    out = console()
    result = measure_memory(config, lambda text: out.print(text, style="dim", soft_wrap=True, markup=False))
    show(memory_table(result), result, json)


def quality(
    steps: Annotated[int, typer.Option(help="Optimizer steps of the demo's network.", min=20)] = 400,
    block_size: Annotated[str, typer.Option(help="Unit of the masks, such as 16 or 1.")] = "16",
    output: Annotated[Path | None, typer.Option("--output", "-o", "--json", help="Where a JSON goes.")] = None,
) -> None:
    """Train the demo's network, and say what packed values in bf16 and int8 cost in perplexity."""
    from lightning_estdgm.config import DGMConfig, Units
    from lightning_estdgm.tools.bench._output import show
    from lightning_estdgm.tools.bench._quality import measure_quality, quality_table
    from lightning_estdgm.tools.demo._demo_config import DemoConfig

    check_output(output)
    try:
        units = Units(size=parse_block_size(block_size))  # type: ignore[arg-type]
        config = DemoConfig(steps=steps, dgm=DGMConfig(units=units))
    except (ValueError, TypeError) as e:
        raise typer.BadParameter(str(e)) from e
    result = measure_quality(config)
    show(quality_table(result), {"complete": True, **result}, output)
