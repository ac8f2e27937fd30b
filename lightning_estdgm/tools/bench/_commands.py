"""``estdgm bench``: the commands. Arguments in, tables, JSON and PNG out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lightning_estdgm.tools._terminal import check_output, parse_block_size
from lightning_estdgm.tools.bench._served_commands import memory, quality, serve

app = typer.Typer(help="Speed on this machine, as ratios against dense in the same run.", no_args_is_help=True)

_OUTPUT_HELP = "Where a JSON goes; a PNG goes beside it."
_Output = Annotated[Path | None, typer.Option("--output", "-o", "--json", help=_OUTPUT_HELP)]


@app.command()
def overhead(
    update_every: Annotated[int, typer.Option(help="Steps between mask updates; as many are timed.", min=20)] = 200,
    rounds: Annotated[int, typer.Option(help="How often it is repeated.", min=1)] = 3,
    young: Annotated[
        list[int] | None,
        typer.Option(help="Time mask work besides with grown weights of so many updates young; repeatable.", min=1),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Where a JSON goes.")] = None,
) -> None:
    """Time what single-weight masks add to a dense step of a small GPT; nothing is skipped there."""
    # Imported here, as in every command: --help should not wait for torch.
    from lightning_estdgm.tools.bench._output import show
    from lightning_estdgm.tools.bench._overhead import OverheadConfig, measure_overhead, overhead_table

    result = measure_overhead(OverheadConfig(update_every=update_every, rounds=rounds, young=tuple(young or ())))
    show(overhead_table(result), result, json)


@app.command()
def energy(
    steps: Annotated[int, typer.Option(help="Steps of each run; the monitor logs once in as many.", min=10)] = 50,
    pairs: Annotated[int, typer.Option(help="Runs with the monitor and without, in turns.", min=1)] = 40,
    against: Annotated[
        bool, typer.Option("--against", help="On an NVIDIA GPU: its joules against nvidia-smi's and Zeus's instead.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="With --against: how long to train.", min=1.0)] = 60.0,
    json: Annotated[Path | None, typer.Option(help="Where a JSON goes.")] = None,
) -> None:
    """Time what EnergyMonitor adds to a step of a small GPT."""
    from lightning_estdgm.tools.bench._energy import EnergyBenchConfig, energy_table, measure_energy_overhead
    from lightning_estdgm.tools.bench._other_meters import against_table, measure_against
    from lightning_estdgm.tools.bench._output import show

    config = EnergyBenchConfig(steps=steps, pairs=pairs)
    if not against:
        result = measure_energy_overhead(config)
        show(energy_table(result), result, json)
        return
    try:
        result = measure_against(seconds, config)
    except RuntimeError as e:
        typer.echo(f"estdgm bench energy --against: {e}", err=True)
        raise typer.Exit(1) from e
    show(against_table(result), result, json)


@app.command()
def distributed(
    update_every: Annotated[int, typer.Option(help="Steps between mask updates.", min=20)] = 200,
    intervals: Annotated[int, typer.Option(help="How many such stretches are timed.", min=1)] = 3,
    ranks: Annotated[int, typer.Option(help="Processes.", min=2)] = 2,
    block_size: Annotated[int, typer.Option(help="Unit of the masks: 1, 16, 32, 64 or 128.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Where a JSON goes.")] = None,
) -> None:
    """Time mask updates of a small GPT under DDP (gloo), and count its traffic with and without the hook."""
    from lightning_estdgm.tools.bench._distributed import DistributedConfig, distributed_table, measure_distributed
    from lightning_estdgm.tools.bench._output import show

    config = DistributedConfig(ranks=ranks, block_size=block_size, update_every=update_every, intervals=intervals)
    result = measure_distributed(config)
    show(distributed_table(result), result, json)


@app.command()
def kernels(
    kind: Annotated[list[str] | None, typer.Option(help="linear or convolution; repeatable (default: both).")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="Of a linear layer: TOKENSxOUTxIN, such as 8192x4096x4096; repeatable.")
    ] = None,
    block_size: Annotated[list[str] | None, typer.Option(help="Units, such as 64 or 4x1; repeatable.")] = None,
    density: Annotated[list[float] | None, typer.Option(help="Active shares; repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Data types; repeatable (CPU: float32, bfloat16).")] = None,
    images: Annotated[int | None, typer.Option(help="Batch of the convolutions (CPU: 2, GPU: 64).")] = None,
    image_size: Annotated[int | None, typer.Option(help="Of the ResNet-50's images, in pixels.")] = None,
    peers: Annotated[bool, typer.Option(help="PyTorch's own BSR, CSR and 2:4, and oneDNN's dense product too.")] = True,
    rounds: Annotated[int | None, typer.Option(help="Timed turns, 1 to 12; the fastest counts.", min=1, max=12)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The few cases that show most, in minutes.")] = False,
    output: _Output = None,
) -> None:
    """Time the three products of sparse linear layers and convolutions against dense, and against PyTorch's own.

    The exit status is 1 if a backend failed or computed something wrong.
    """
    from dataclasses import replace

    from lightning_estdgm.tools.bench._goals import goals_table, kernel_goals
    from lightning_estdgm.tools.bench._output import Record, console, machine_name
    from lightning_estdgm.tools.bench.kernels._convolution import conv_rows
    from lightning_estdgm.tools.bench.kernels._kernels_config import KernelsConfig, quick_kernels
    from lightning_estdgm.tools.bench.kernels._linear import linear_rows
    from lightning_estdgm.tools.bench.kernels._report import draw_kernels, drawable, kernels_table
    from lightning_estdgm.tools.bench.kernels._timing import METHOD

    check_output(output)
    sizes = [parse_block_size(text) for text in block_size or ()]
    given: dict[str, Any] = {
        "kinds": kind, "shapes": shape and [_shape(text) for text in shape], "block_sizes": sizes,
        "densities": density, "dtypes": dtype, "images": images, "image_size": image_size, "rounds": rounds,
    }  # fmt: skip
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None and v != []}
    try:
        config = replace(quick_kernels() if quick else KernelsConfig(), peers=peers, **given)
    except (ValueError, TypeError) as e:
        raise typer.BadParameter(str(e)) from e
    out, record = console(), Record(output)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []

    def say(text: str) -> None:
        left_out.append(text)
        out.print(text, style="dim", soft_wrap=True)

    def content() -> dict[str, Any]:
        gpu = record.header["environment"]["gpu"] if config.device != "cpu" else None
        method = METHOD["cpu" if config.device == "cpu" else "cuda"]
        return {"timing": method, "left_out": left_out, "goals": kernel_goals(rows, gpu), "rows": rows}

    for name, measure in (("linear", linear_rows), ("convolution", conv_rows)):
        if name in config.kinds:
            for found in measure(config, say):
                rows.append(found)
                record.write(content(), complete=False)
    record.write(content(), complete=True)
    out.print(kernels_table(rows))
    _finish(out, record, goals_table(goals) if (goals := content()["goals"]) else None)
    if record.picture is not None and drawable(rows):
        draw_kernels(rows, record.picture, machine_name(record.header["environment"]))
    bad = [row for row in rows if row["wrong"] or "failed" in row["notes"]]
    for row in bad:
        text = row["notes"].get("failed", "a product came out wrong")
        where = f"{row['backend']}, {row['dtype']}, block {row['block_size']}"
        out.print(f"{where}: {text}", style="bold red", soft_wrap=True, markup=False)
    raise typer.Exit(1 if bad else 0)


@app.command()
def train(
    model: Annotated[list[str] | None, typer.Option(help="gpt or resnet50; repeatable (default: both).")] = None,
    width: Annotated[
        list[int] | None, typer.Option(help="Of the GPT; repeatable (GPU: 512 to 4096, CPU: 512, 1024).")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Of the GPT (default: what memory and time allow).")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens a sequence (GPU: 1024, CPU: 128).")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences or images a step (GPU: 8 or 128, CPU: 8 or 4).")] = None,
    image_size: Annotated[int | None, typer.Option(help="Of the ResNet-50's images, in pixels (224).")] = None,
    block_size: Annotated[str, typer.Option(help="Unit of the masks: auto, 1, 16, 32, 64 or 128.")] = "auto",
    backend: Annotated[str, typer.Option(help="auto, dense, or a backend's name for all masked layers.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="Time it compiled too, dense and sparse.")] = False,
    only_compiled: Annotated[bool, typer.Option("--only-compiled", help="Time it compiled and not eager.")] = False,
    rounds: Annotated[int | None, typer.Option(help="Sparse runs, each between two dense ones (3).")] = None,
    interval: Annotated[int | None, typer.Option(help="Steps at each density (20).")] = None,
    profile_steps: Annotated[int | None, typer.Option(help="Steps that are profiled; 0 for none (3).")] = None,
    minutes: Annotated[float | None, typer.Option(help="About this long for each GPT: its layers follow (10).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few steps and small models: minutes in all.")] = False,
    output: _Output = None,
) -> None:
    """Train GPTs and a ResNet-50 dense and by EST-DGM in turns: speed by phase and over a whole default schedule."""
    from lightning_estdgm.config import DGMConfig, Units
    from lightning_estdgm.tools.bench._goals import goals_table, train_goals
    from lightning_estdgm.tools.bench._output import Record, console, machine_name
    from lightning_estdgm.tools.bench.train._choice import MODELS, TrainChoice, choose, quick_config
    from lightning_estdgm.tools.bench.train._profile import profile_train
    from lightning_estdgm.tools.bench.train._report import draw_train, profile_table, train_table
    from lightning_estdgm.tools.bench.train._run import measure_train
    from lightning_estdgm.tools.bench.train._train_config import TrainConfig

    check_output(output)
    unit = parse_block_size(block_size)
    given: dict[str, Any] = {"rounds": rounds, "interval": interval, "profile_steps": profile_steps}
    given = {name: value for name, value in given.items() if value is not None}
    make = quick_config if quick else TrainConfig
    out, record = console(), Record(output)
    modes = [True] if only_compiled else [False, True] if compiled else [False]
    try:
        DGMConfig(units=Units(size=unit), backend=backend)  # type: ignore[arg-type]
        configs = [make(block_size=unit, backend=backend, compiled=mode, **given) for mode in modes]
        choice = TrainChoice(
            model or MODELS, width or (), layers, context, batch, image_size,
            60.0 * (minutes if minutes is not None else 1.5 if quick else 10.0), quick,
        )  # fmt: skip
        workloads = choose(choice, configs[0], lambda text: out.print(text, soft_wrap=True))
    except (ValueError, TypeError) as e:
        raise typer.BadParameter(str(e)) from e
    results: list[dict[str, Any]] = []

    def content() -> dict[str, Any]:
        gpu = record.header["environment"]["gpu"] if configs[0].device != "cpu" else None
        return {"goals": train_goals(results, gpu), "results": results}

    for workload in workloads:
        for config in configs:
            result = measure_train(workload, config, lambda text: out.print(text, style="dim", soft_wrap=True))
            results.append(result)
            record.write(content(), complete=False)
            out.print(train_table(result))
            if config.profile_steps:
                result["profile"] = profile_train(workload, config)
                out.print(profile_table(result))
            if record.picture is not None:
                draw_train(results, record.picture, machine_name(record.header["environment"]))
    record.write(content(), complete=True)
    _finish(out, record, goals_table(goals) if (goals := content()["goals"]) else None)


for _command in (serve, memory, quality):
    app.command()(_command)


@app.command(name="all")
def everything(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A folder (default: docs/benchmarks/<device>).")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Minutes in all: fewer cases, fewer steps.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure parts anew that are there already.")] = False,
    part: Annotated[list[str] | None, typer.Option(help="Only this part; repeatable.")] = None,
) -> None:
    """Run `kernels` and `train` part by part, each in a process of its own, and write one page of tables.

    A part that an earlier call has finished, with the same settings, is not measured again: after a cut, call it anew.
    The exit status is 1 if a part failed.
    """
    from lightning_estdgm.tools.bench._suite import device_folder, parts, run_parts, write_page

    folder = output or Path("docs") / "benchmarks" / device_folder()
    if folder.exists() and not folder.is_dir():
        raise typer.BadParameter(f"got the file {str(folder)!r}, expected a folder", param_hint="--output")
    wanted = parts(quick)
    if unknown := sorted(set(part or ()) - {p.name for p in wanted}):
        known = ", ".join(p.name for p in wanted)
        raise typer.BadParameter(f"got {', '.join(unknown)}, expected some of {known}", param_hint="--part")
    wanted = [p for p in wanted if not part or p.name in part]
    failed = run_parts(wanted, folder, again=again, say=typer.echo)
    typer.echo(str(write_page(folder)))
    raise typer.Exit(1 if failed else 0)


def _finish(out: Any, record: Any, goals: Any) -> None:
    from lightning_estdgm.tools.bench._output import machine_name

    if goals is not None:
        out.print(goals)
    out.print(machine_name(record.header["environment"]), style="dim", soft_wrap=True)
    if record.path is not None:
        out.print(f"{record.path}, {record.picture}", style="dim", soft_wrap=True)


def _shape(text: str) -> Sequence[int]:
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() for size in sizes):
        raise typer.BadParameter(f"got {text!r}, expected TOKENSxOUTxIN, such as 2048x1024x1024", param_hint="--shape")
    return tuple(map(int, sizes))
