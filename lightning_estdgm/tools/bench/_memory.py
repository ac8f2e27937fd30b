"""``estdgm bench memory``: memory and time of training by storage, each training in a process of its own."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_estdgm._checks import expect_int
from lightning_estdgm.tools.bench._memory_process import EMPTY, WITHOUT, MemoryTask, make_gpt
from lightning_estdgm.tools.bench._output import Columns, terminal_table

HELD_GOAL, PEAK_GOAL, SPEED_GOAL, MASK_GOAL = 0.13, 0.25, 1.15, 0.005
"""Of dense training's bytes, of its peak, of dense storage's steps a second, and of a step."""

RESIDENT_GOAL = 16 * 2**30
"""Resident bytes of a training whose size was given by its weights."""

_BYTES_PER_WEIGHT = 16  # float32: weight, gradient, two moments
_WIDTHS = (256, 512, 1024, 2048, 4096)
_LEAST_LAYERS = 12
SPEED = MemoryTask("packed", width=1024, layers=4, context=128, batch=8, steps=11, update_every=5)
"""Training whose steps are timed."""

_ROUNDS = 3


@dataclass(frozen=True)
class MemoryBenchConfig:
    """What is measured.

    Attributes:
        width: width of the GPT whose memory is measured.
        layers: its decoder blocks.
        tokens: tokens of its step, one sequence.
        density: active share of the masked weights, in all steps.
        block_sizes: sides of the mask units, one measurement each.
        steps: its optimizer steps; every third has a mask update.
        weights: weights of a GPT that is trained instead, by packed storage only; None: as `width` and `layers` say.
        times_steps: whether the steps of `SPEED` are timed by each storage.
        rounds: trainings of each storage that are timed, in turns.
        runs_dense: whether dense training is run, or calculated; None: run where this machine has room for it.

    Raises:
        ValueError: for a value out of range.

    """

    width: int = 2048
    layers: int = 12
    tokens: int = 256
    density: float = 0.1
    block_sizes: tuple[int, ...] = (4, 16)
    steps: int = 6
    weights: float | None = None
    times_steps: bool = True
    rounds: int = _ROUNDS
    runs_dense: bool | None = None

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("layers", 1), ("tokens", 1), ("steps", 3), ("rounds", 1)):
            expect_int(name, getattr(self, name), at_least=least)
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density: got {self.density}, expected a number in (0, 1]")
        if not self.block_sizes or min(self.block_sizes) < 1:
            raise ValueError(f"block_sizes: got {self.block_sizes}, expected sides of units")
        if self.weights is not None and not (math.isfinite(self.weights) and self.weights >= 1e6):
            raise ValueError(f"weights: got {self.weights}, expected at least 1e6, such as 3e9")

    def task(self, arm: str, block_size: int) -> MemoryTask:
        """Return the training whose memory is measured."""
        width, layers = (self.width, self.layers) if self.weights is None else gpt_shape(self.weights)
        return MemoryTask(
            arm, width, layers, self.tokens, 1, self.density, block_size, self.steps,
            threads=torch.get_num_threads(), tells=self.weights is not None,
        )  # fmt: skip


def gpt_shape(weights: float) -> tuple[int, int]:
    """Return width and decoder blocks of a GPT of at least so many weights: the widest that is 12 blocks deep or more.

    >>> gpt_shape(3e9)
    (4096, 15)
    """
    for width in reversed(_WIDTHS):
        layers = math.ceil(weights / (12 * width**2))
        if layers >= _LEAST_LAYERS:
            break
    return width, layers


def measure_memory(config: MemoryBenchConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Train each case in a process of its own.

    Returns:
        The configuration; "memory": one row a unit with what dense and packed training held and took at most; "speed":
        seconds of a step and share of mask work, by unit and storage; "goals": both sides of each goal.

    """
    empty = _measured(MemoryTask(EMPTY), say)["peak_bytes"]
    first = config.block_sizes[0]
    memory = []
    if config.weights is None:
        without = _dense_side(config, empty, say)
        for size in config.block_sizes:
            packed = _over(_measured(config.task("packed", size), say), empty)
            memory.append({"block_size": size, "dense": without, "packed": packed})
    else:
        packed = _over(_measured(config.task("packed", first), say), empty)
        memory.append({"block_size": first, "dense": calculated(packed["parameters"]), "packed": packed})
    speed = []
    if config.weights is None and config.times_steps:
        speed = [_speed(replace(SPEED, block_size=size), config, say) for size in config.block_sizes]
    found = {"config": asdict(config), "empty_bytes": empty, "memory": memory, "speed": speed}
    return found | {"goals": memory_goals(found)}


def calculated(parameters: int) -> dict[str, Any]:
    """Return what dense training holds at least: weights, gradients and AdamW's two moments, without activations."""
    held = {"weights": 4 * parameters, "gradients": 4 * parameters, "optimizer state": 8 * parameters}
    return {"parameters": parameters, "held": held, "peak_bytes": _BYTES_PER_WEIGHT * parameters, "calculated": True}


def memory_goals(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each goal with both sides: "what", "dense", "packed", "measured", "goal", "reached" and "at_most"."""
    goals = []
    by_weights = found["config"]["weights"] is not None
    for row in found["memory"]:
        dense, packed, unit = row["dense"], row["packed"], f"units of {row['block_size']}"
        source = "calculated" if dense["calculated"] else "run"
        held = [sum(side["held"].values()) for side in (dense, packed)]
        peaks = [dense["peak_bytes"], packed["peak_bytes"]]
        if by_weights:
            losses = packed["losses"]
            what = (
                f"{packed['parameters'] / 1e9:.2f}B weights, {unit}, {len(losses)} steps, "
                f"loss {losses[0]:.3f} to {losses[-1]:.3f}"
            )
            resident = packed["resident_bytes"]
            goals.append(
                _goal(
                    f"{what}: resident bytes",
                    _size(peaks[0]) + f" ({source})",
                    _size(resident),
                    resident,
                    RESIDENT_GOAL,
                )
            )
            continue
        for what, (left, right), goal in (
            ("weights, gradients, AdamW's states", held, HELD_GOAL),
            ("peak of the process over an empty one", peaks, PEAK_GOAL),
        ):
            goals.append(
                _goal(f"{what}, {unit}", f"{_size(left)} ({source})", _size(right), right / max(left, 1), goal)
            )
    for row in found["speed"]:
        unit = f"units of {row['block_size']}"
        dense, packed = (row[arm]["seconds"] for arm in ("dense", "packed"))
        left, right = (f"{1000 * seconds:.0f} ms" for seconds in (dense, packed))
        goals.append(
            _goal(f"step over that of dense storage, {unit}", left, right, dense / packed, SPEED_GOAL, least=True)
        )
        shares = [row[arm]["mask_share"] for arm in ("dense", "packed")]
        left, right = (f"{share:.2%} of a step" for share in shares)
        goals.append(_goal(f"mask work outside updates, {unit}", left, right, shares[1], MASK_GOAL))
    return goals


def memory_table(found: Mapping[str, Any]) -> Any:
    """Return the goals as a table for the terminal."""
    c = found["config"]
    title = f"training by storage, density {c['density']}; an empty process: {_size(found['empty_bytes'])}"
    return terminal_table(title, memory_columns(found), left=(0, 5), wrapped=(0,))


def memory_columns(found: Mapping[str, Any]) -> Columns:
    """Return head and cells: one row a goal, with both sides."""
    head = ["what", "dense", "packed", "measured", "goal", ""]
    cells = []
    for goal in found["goals"]:
        show = _size if goal["goal"] > 1e6 else "{:.4g}".format
        sign = "at least" if goal["at_least"] else "at most"
        reached = "reached" if goal["reached"] else "not reached"
        cells.append(
            [
                goal["what"],
                goal["dense"],
                goal["packed"],
                show(goal["measured"]),
                f"{sign} {show(goal['goal'])}",
                reached,
            ]
        )
    return head, cells


# ---- measurements


def _dense_side(config: MemoryBenchConfig, empty: int, say: Callable[[str], None]) -> dict[str, Any]:
    task = config.task(WITHOUT, config.block_sizes[0])
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in _parameters(task))
    needed, here = 1.25 * _BYTES_PER_WEIGHT * parameters, available_bytes()
    runs = config.runs_dense if config.runs_dense is not None else here is not None and here > needed
    if runs:
        return _over(_measured(task, say), empty)
    if config.runs_dense is None:
        room = "unknown memory" if here is None else f"{_size(here)} free"
        say(f"dense training is calculated, not run: it would take about {_size(needed)}, this machine has {room}")
    return calculated(parameters)


def _parameters(task: MemoryTask) -> list[nn.Parameter]:
    return list(make_gpt(task).parameters())


def _speed(task: MemoryTask, config: MemoryBenchConfig, say: Callable[[str], None]) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"dense": [], "packed": []}
    shares: dict[str, list[float]] = {"dense": [], "packed": []}
    for turn in range(config.rounds):
        for arm in ("dense", "packed") if turn % 2 == 0 else ("packed", "dense"):
            case = replace(task, arm=arm, density=config.density, threads=torch.get_num_threads())
            found = _measured(case, say)
            plain = settled(found["plain"])
            seconds[arm] += [found["seconds"][i] for i in plain]
            shares[arm] += [found["mask_seconds"][i] / found["seconds"][i] for i in plain]
    return {
        "block_size": task.block_size,
        **{
            arm: {"seconds": statistics.median(seconds[arm]), "mask_share": statistics.median(shares[arm])}
            for arm in seconds
        },
    }


def settled(plain: Sequence[bool]) -> list[int]:
    """Return the plain steps after the first mask update, which have grown units to care for; all, if there is none.

    >>> settled([True, False, True, True])
    [2, 3]
    """
    first = plain.index(False) if False in plain else -1
    return [step for step, is_plain in enumerate(plain) if is_plain and step > first]


def _over(found: dict[str, Any], empty: int) -> dict[str, Any]:
    resident = found["peak_bytes"]
    return found | {"peak_bytes": resident - empty, "resident_bytes": resident, "calculated": False}


def _measured(task: MemoryTask, say: Callable[[str], None]) -> dict[str, Any]:
    """Train in a process of its own, and tell its lines as they come."""
    if task.arm != EMPTY:
        say(f"{task.arm}, width {task.width}, {task.layers} layers, units of {task.block_size} ...")
    call = [sys.executable, "-m", "lightning_estdgm.tools.bench._memory_process", json.dumps(asdict(task))]
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "OMP_NUM_THREADS": str(task.threads), "PYTHONPATH": path}
    last = ""
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process:
            for line in process.stdout or ():
                last = line.strip()
                if last.startswith("step "):
                    say(last)
        errors.seek(0)
        said = errors.read().strip() or f"exit status {process.returncode}"
    if process.returncode:
        raise RuntimeError(f"{task.arm} training failed: " + "\n".join(said.splitlines()[-6:]))
    found: dict[str, Any] = json.loads(last)
    return found


def available_bytes() -> int | None:
    """Return the memory that new processes could have, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _goal(what: str, dense: str, packed: str, measured: float, goal: float, *, least: bool = False) -> dict[str, Any]:
    reached = measured >= goal if least else measured <= goal
    return {
        "what": what, "dense": dense, "packed": packed, "measured": measured, "goal": goal, "at_least": least,
        "reached": reached,
    }  # fmt: skip


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
