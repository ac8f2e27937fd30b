"""Settings of ``estdgm bench train``, and the sizes that this machine has room and time for."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

import torch

from lightning_estdgm._checks import expect_int
from lightning_estdgm.method._masks import BlockSize
from lightning_estdgm.method._schedules import EstDgm, Phase
from lightning_estdgm.tools.bench._environment import default_device

NOMINAL_STEPS = 10_000
"""Length of the run whose whole default schedule is calculated."""

SETTLE_STEPS = 2
"""Steps after the start and after each mask update that are left out: allocation, tuning, compilation."""

_WANTED = {512: 8, 1024: 24, 2048: 24, 4096: 32}  # layers; from 1024 on the shapes of 350 M, 1.3 B and 6.7 B parameters
_BYTES_PER_WEIGHT = 22  # float32: weight, gradient, two moments, observation window; and a bf16 copy
_BYTES_PER_ACTIVATION = 2 * 34  # of a token and channel in a block: twice the 16-bit figure of Korthikanti et al. 2022
_DENSE_RATE_SHARE = 0.5  # of a bare product's FLOP rate, that a training step reaches
_PRODUCTS = 3  # output and two gradients


@dataclass(frozen=True)
class TrainConfig:
    """Measurement of one workload.

    Attributes:
        block_size: side of a mask unit, or "auto"; as in `Units`.
        backend: backend of the masked layers; as in `DGMConfig`.
        compiled: whether the blocks of both models are compiled.
        device: device of the runs; the GPU if there is one. There it is bf16-mixed, else float32.
        densities: number of densities in each phase, at its start, at its end and evenly between.
        interval: steps at each density.
        observe_steps: number of them that are observed, at least 4; the rest, less the first two, are the steps
            between windows.
        dense_steps: steps of each dense run, less the first two.
        rounds: number of sparse runs; each lies between two dense ones.
        profile_steps: number of steps of refinement that are profiled; 0 for none.

    Raises:
        ValueError: for counts that leave nothing to time.
    """

    block_size: BlockSize | str = "auto"
    backend: str = "auto"
    compiled: bool = False
    device: str = field(default_factory=default_device)
    densities: int = 3
    interval: int = 20
    observe_steps: int = 8
    dense_steps: int = 10
    rounds: int = 3
    profile_steps: int = 3

    def __post_init__(self) -> None:
        least = {"densities": 2, "observe_steps": 4, "dense_steps": 1, "rounds": 1, "profile_steps": 0}
        for name, minimum in least.items():
            expect_int(name, getattr(self, name), at_least=minimum)
        if self.interval < self.observe_steps + SETTLE_STEPS + 1:
            raise ValueError(
                f"interval: got {self.interval}, expected at least {self.observe_steps + SETTLE_STEPS + 1}: "
                f"{SETTLE_STEPS} steps to settle, one to time and {self.observe_steps} observed ones"
            )

    @property
    def mode(self) -> str:
        """Compiled or eager, in one word."""
        return "compiled" if self.compiled else "eager"

    @property
    def precision(self) -> str:
        """Precision of the Trainer."""
        return "32-true" if self.device == "cpu" else "bf16-mixed"


def compressed_schedule(config: TrainConfig) -> EstDgm:
    """Return the default phases and densities, a few steps at each of some densities, each change after a window."""
    default = EstDgm()
    length = config.densities * config.interval

    def squeeze(phase: Phase) -> Phase:
        return Phase(phase.start, phase.end, length)

    return EstDgm(
        exploration=squeeze(default.exploration),
        consolidation=squeeze(default.consolidation),
        refinement=squeeze(default.refinement),
        update_every=config.interval,
        observe_steps=config.observe_steps,
        freeze=1.0 / config.densities,
    )


def wanted_layers(width: int) -> int:
    """Return the decoder blocks of a GPT of this width, where nothing limits them.

    >>> wanted_layers(2048)
    24
    """
    return _WANTED.get(width, 12)


def fitting_layers(
    width: int, tokens: int, free_bytes: float, step_limit_s: float, flop_per_s: float
) -> tuple[int, str]:
    """Return how many decoder blocks of a GPT to train here, and what limits them.

    Args:
        width: width of the model.
        tokens: number of tokens a step.
        free_bytes: memory that may be used.
        step_limit_s: longest time of a dense step.
        flop_per_s: rate of a bare product of this width.

    Returns:
        0 blocks where not even one fits into the memory.
    """
    weights = 12 * width**2
    by_memory = int(0.8 * free_bytes / (weights * _BYTES_PER_WEIGHT + tokens * width * _BYTES_PER_ACTIVATION))
    layer_s = _PRODUCTS * 2.0 * weights * tokens / (_DENSE_RATE_SHARE * flop_per_s)
    by_time = max(1, int(step_limit_s / layer_s))
    wanted = wanted_layers(width)
    layers = min(wanted, by_memory, by_time)
    reason = "as published models" if layers == wanted else "memory" if layers == by_memory else "time"
    return layers, reason


def free_memory(device: str) -> float:
    """Return the bytes that are free on the device."""
    if device != "cpu":
        return float(torch.cuda.mem_get_info()[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):  # not Linux
        return 8e9


def product_rate(width: int, tokens: int, device: str) -> float:
    """Return the FLOP/s of one dense product ``tokens x width x 4 width``, in the dtype of training."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x, weight = (
        torch.randn(tokens, width, dtype=dtype, device=device),
        torch.randn(width, 4 * width, dtype=dtype, device=device),
    )
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        product = x @ weight
        float(product[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - begin)
    return 2.0 * tokens * width * 4 * width / best
