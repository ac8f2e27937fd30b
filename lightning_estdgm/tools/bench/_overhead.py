"""Overhead of masks where nothing is skipped: single-weight masks, dense products, against a plain dense step.

In time: of a whole step, and of what the masks do beside forward and backward. In memory: peak of a step.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.table import Table

from lightning_estdgm.config import DGMConfig, Units
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.method._schedules import EstDgm, Phase
from lightning_estdgm.recipes.gpt import ByteGPT
from lightning_estdgm.tools.bench._peak_memory import allocated


@dataclass(frozen=True)
class OverheadConfig:
    """Byte-level GPT, and times of its mask updates.

    Attributes:
        width: width of the model.
        layers: number of decoder blocks.
        batch_size: sequences a step.
        context: tokens a sequence.
        update_every: steps between mask updates; as many steps are timed, one observation window and one update in it.
        rounds: number of comparisons.
        young: numbers of mask updates whose grown weights are young at once; for each, the mask work of a step is timed
            besides. A long run with AdamW's default betas and an update every 200 steps has up to 31.

    """

    width: int = 384
    layers: int = 2
    batch_size: int = 8
    context: int = 256
    update_every: int = 200
    rounds: int = 1
    young: tuple[int, ...] = ()


def measure_overhead(config: OverheadConfig) -> dict[str, Any]:
    """Time dense and masked steps in turn, and return the ratio of their times over one update interval.

    Returns:
        ``dense_step_s`` and ``masked_step_s`` (means over the interval, seconds; median over rounds), ``overhead``
        (their ratio minus 1) and its range over rounds, ``mask_work_s`` and its range (CPU time of all threads in a
        step without observation or update, seconds: of masking gradients, the optimizer's step and what follows it,
        less a dense optimizer's step), the mask ``updates`` and ``observed_steps`` in the interval, ``peak_bytes`` of a
        step (`peak_memory`), for each of ``young`` the numbers of ``updates`` and young ``weights``, with those of the
        first ten steps, and the ``mask_work_s`` (with an update every 16 steps), and the configuration.

    """
    chunk = 10  # steps of one kind before the other takes over: a slow moment of the machine hits both
    overheads, dense_s, masked_s, work_s = [], [], [], []
    updates = observed = 0
    for _ in range(config.rounds):
        loops = {"dense": _Loop(config, masked=False), "masked": _Loop(config, masked=True)}
        for loop in loops.values():  # leave out the first steps: allocation, and the first choice of backends
            loop.run(chunk)
        before = loops["masked"].counts()
        spent = dict.fromkeys(loops, 0.0)
        for loop in loops.values():
            loop.stepping_s.clear()
        for _ in range(config.update_every // chunk):
            for kind, loop in loops.items():
                start = time.perf_counter()
                loop.run(chunk)
                spent[kind] += time.perf_counter() - start
        updates, observed = (now - then for now, then in zip(loops["masked"].counts(), before, strict=True))
        overheads.append(spent["masked"] / spent["dense"] - 1.0)
        dense_s.append(spent["dense"] / config.update_every)
        masked_s.append(spent["masked"] / config.update_every)
        work_s.append(statistics.median(loops["masked"].stepping_s) - statistics.median(loops["dense"].stepping_s))
    return {
        "config": asdict(config),
        "updates": updates,
        "observed_steps": observed,
        "dense_step_s": statistics.median(dense_s),
        "masked_step_s": statistics.median(masked_s),
        "overhead": statistics.median(overheads),
        "overhead_range": [min(overheads), max(overheads)],
        "mask_work_s": statistics.median(work_s),
        "mask_work_range_s": [min(work_s), max(work_s)],
        "peak_bytes": peak_memory(config),
        "young": [_young_work(config, updates) for updates in config.young],
    }


def _young_work(config: OverheadConfig, updates: int) -> dict[str, Any]:
    """Time the mask work of a step when the weights of some updates are young."""
    close = replace(config, update_every=16)
    dense, masked = (_Loop(close, masked=masked, intervals=math.ceil((updates + 1) / 4)) for masked in (False, True))
    assert masked.dgm is not None
    dense.run(10)
    masked.run(10 + close.update_every * updates)
    cohorts = [cohort for weight in masked.dgm.masked_weights for cohort in weight.young.cohorts]
    for loop in (dense, masked):
        loop.stepping_s.clear()
        loop.run(close.update_every)
    work = statistics.median(masked.stepping_s) - statistics.median(dense.stepping_s)
    found = {"updates": len({cohort.age for cohort in cohorts}), "weights": sum(len(c.units) for c in cohorts)}
    return found | {"mask_work_s": work}


def peak_memory(config: OverheadConfig) -> dict[str, int]:
    """Return the most bytes that torch's tensors take in a step, on the CPU, by kind of step.

    Returns:
        Bytes in a dense step, in a masked one (``"masked"``) and in one that is observed (``"observed"``).

    """
    peaks = {}
    for masked in (False, True):
        loops: list[_Loop] = []

        def warm_up(masked: bool = masked, loops: list[_Loop] = loops) -> None:
            loops.append(_Loop(config, masked=masked))
            loops[0].run(12)  # the last of the mask updates at the start, and a step with its masks

        held, _ = allocated(warm_up)
        loop = loops[0]
        peaks["masked" if masked else "dense"] = held + allocated(partial(loop.run, 1))[1]
        if masked:
            held += allocated(loop.run_to_window)[0]
            peaks["observed"] = held + allocated(partial(loop.run, 2))[1]  # the first makes the window
    return peaks


def overhead_table(result: dict[str, Any]) -> Table:
    """Return the results of `measure_overhead` as a table for the terminal."""
    table = Table(title=f"single-weight masks, dense products, update every {result['config']['update_every']} steps")
    for column in ("dense step, ms", "masked step, ms", "overhead", "smallest", "largest", "mask work, CPU ms"):
        table.add_column(column, justify="right")
    for kind in result["peak_bytes"]:
        table.add_column(f"peak of {kind} step, MB", justify="right")
    low, high = result["overhead_range"]
    seconds = (f"{result[name] * 1e3:.1f}" for name in ("dense_step_s", "masked_step_s"))
    shares = (f"{value:.1%}" for value in (result["overhead"], low, high))
    peaks = (f"{peak / 1e6:.1f}" for peak in result["peak_bytes"].values())
    table.add_row(*seconds, *shares, f"{result['mask_work_s'] * 1e3:.1f}", *peaks)
    for young in result["young"]:
        table.caption = (table.caption or "") + (
            f"{young['weights']:,} weights of {young['updates']} updates young: mask work "
            f"{young['mask_work_s'] * 1e3:.1f} CPU ms a step\n"
        )
    return table


def one_interval(update_every: int, intervals: int = 1) -> EstDgm:
    """Return a schedule for a run of 10 steps to warm up and ``4 * update_every * intervals`` more.

    Two short phases during the warm-up steps, then one long one: the first `update_every` steps after them, and each
    stretch of as many that follows, holds exactly one window and one update of refinement, at its end.
    """
    return EstDgm(
        exploration=Phase(0.7, 0.6, 5),
        consolidation=Phase(0.3, 0.2, 5),
        refinement=Phase(0.15, 0.10, 4 * update_every * intervals),
        update_every=update_every,
        observe_steps=8,
        freeze=0.0,
    )


class _Loop:
    """Training steps of a small GPT on one random batch, dense or with single-weight masks."""

    def __init__(self, config: OverheadConfig, masked: bool, intervals: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = ByteGPT(config.width, config.layers, heads=8, context=config.context)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.tokens = torch.randint(0, 256, (config.batch_size, config.context), generator=generator)
        self.dgm: DGMController | None = None
        self.observed = 0
        self.stepping_s: list[float] = []  # CPU time from a backward's end to the next step, of those outside windows
        if masked:
            dgm_config = DGMConfig(schedule=one_interval(config.update_every, intervals), units=Units(size=1))
            total_steps = 4 * config.update_every * intervals + 10
            self.dgm = DGMController(self.model, self.optimizer, dgm_config, total_steps=total_steps)

    def run(self, steps: int) -> None:
        """Do some steps."""
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model.loss((self.tokens, self.tokens)).backward()
            start, busy = time.process_time(), False
            if self.dgm is not None:
                busy = self.dgm.observing
                self.observed += busy
                self.dgm.mask_gradients()
            self.optimizer.step()
            if self.dgm is not None:
                busy |= self.dgm.advance()
            if not busy:
                self.stepping_s.append(time.process_time() - start)

    def run_to_window(self) -> None:
        """Do the steps before the next one that is observed."""
        while self.dgm is not None and not self.dgm.observing:
            self.run(1)

    def counts(self) -> tuple[int, int]:
        """Return the numbers of mask updates and of observed steps so far."""
        return (self.dgm.updates if self.dgm else 0), self.observed
