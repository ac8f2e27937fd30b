"""Cost of a mask update where several ranks train together, and traffic that the communication hook saves."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from lightning_estdgm.config import DGMConfig, Units
from lightning_estdgm.distributed._comm_hook import ActiveUnits, active_units_hook
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.recipes.gpt import ByteGPT
from lightning_estdgm.tools.bench._overhead import one_interval

_WARM_UP = 10


@dataclass(frozen=True)
class DistributedConfig:
    """Byte-level GPT under DDP (gloo, CPU), and times of its mask updates.

    Attributes:
        ranks: number of processes; the machine's threads are shared out.
        width: width of the model.
        layers: number of decoder blocks.
        batch_size: sequences a step and rank.
        context: tokens a sequence.
        block_size: side of a mask unit.
        update_every: steps between mask updates.
        intervals: number of such stretches that are timed.

    """

    ranks: int = 2
    width: int = 384
    layers: int = 2
    batch_size: int = 4
    context: int = 256
    block_size: int = 1
    update_every: int = 200
    intervals: int = 1


def measure_distributed(config: DistributedConfig) -> dict[str, Any]:
    """Start the ranks, and return rank 0's `measure_on_this_rank` with the configuration."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (config, folder), nprocs=config.ranks)
        result = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    return {"config": asdict(config), **result}


def _rank(rank: int, config: DistributedConfig, folder: str) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // config.ranks))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=config.ranks)
    result = measure_on_this_rank(config)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measure_on_this_rank(config: DistributedConfig) -> dict[str, Any]:
    """Train with and without the hook, in a process group that is there already.

    Returns:
        For ``"dense all-reduce"`` and ``"active units only"``: ``step_s`` (median seconds of a step that observes and
        updates nothing), ``observed_step_s`` (of one in a window), ``update_s`` (median seconds of a mask update with
        its comparison over ranks), ``update_share`` (one update over an interval's steps) and ``bytes_per_step``
        (handed to all-reduce by a rank; mean over the interval, in its last step, and dense).

    """
    return {"dense all-reduce": _measure(config, hooked=False), "active units only": _measure(config, hooked=True)}


def _measure(config: DistributedConfig, hooked: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = ByteGPT(config.width, config.layers, heads=8, context=config.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ddp = DistributedDataParallel(model)
    schedule = one_interval(config.update_every, config.intervals)
    total_steps = 4 * config.update_every * config.intervals + _WARM_UP
    dgm_config = DGMConfig(schedule=schedule, units=Units(size=config.block_size), backend="dense")
    dense_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    tokens = torch.randint(
        0, 256, (config.batch_size, config.context), generator=torch.Generator().manual_seed(dist.get_rank())
    )
    times: dict[str, list[float]] = {"step": [], "observed": [], "update": []}
    sent = []
    with DGMController(model, optimizer, dgm_config, total_steps=total_steps, group=dist.group.WORLD) as dgm:
        units = ActiveUnits(dgm.masked_weights, lambda: dgm.observing)
        if hooked:
            ddp.register_comm_hook(units, active_units_hook)
        for step in range(_WARM_UP + config.update_every * config.intervals):
            before, observed = units.bytes, dgm.observing
            start = time.perf_counter()
            optimizer.zero_grad()
            functional.cross_entropy(ddp(tokens).flatten(0, 1), tokens.flatten()).backward()
            dgm.mask_gradients()
            optimizer.step()
            advancing = time.perf_counter()
            updated = dgm.advance()
            end = time.perf_counter()
            if step < _WARM_UP:
                continue
            sent.append(units.bytes - before if hooked else dense_bytes)
            times["observed" if observed else "step"].append(advancing - start)
            if updated:
                times["update"].append(end - advancing)
    step_s, update_s = statistics.median(times["step"]), statistics.median(times["update"])
    return {
        "step_s": step_s,
        "observed_step_s": statistics.median(times["observed"]),
        "update_s": update_s,
        "updates": len(times["update"]),
        "update_share": update_s / (config.update_every * step_s),
        "density": dgm.density,
        "bytes_per_step": {"mean": statistics.mean(sent), "last": sent[-1], "dense": dense_bytes},
    }


def distributed_table(result: dict[str, Any]) -> Table:
    """Return the results of `measure_distributed` as a table for the terminal."""
    config = result["config"]
    table = Table(
        title=f"{config['ranks']} ranks, DDP over gloo; masks of {config['block_size']} x {config['block_size']}, "
        f"an update every {config['update_every']} steps; products dense"
    )
    columns = ("step, ms", "observed step, ms", "update, ms", "update's share", "MB a step", "dense MB")
    table.add_column("gradients")
    for column in columns:
        table.add_column(column, justify="right")
    for name in ("dense all-reduce", "active units only"):
        row = result[name]
        seconds = (f"{row[key] * 1e3:.1f}" for key in ("step_s", "observed_step_s", "update_s"))
        sent = row["bytes_per_step"]
        table.add_row(
            name, *seconds, f"{row['update_share']:.2%}", *(f"{sent[key] / 1e6:.1f}" for key in ("mean", "dense"))
        )
    return table
