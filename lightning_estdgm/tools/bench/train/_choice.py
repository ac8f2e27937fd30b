"""Choice of the workloads that ``estdgm bench train`` runs here, and of the time for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_estdgm.tools.bench.train._train_config import (
    SETTLE_STEPS,
    TrainConfig,
    fitting_layers,
    free_memory,
    product_rate,
    wanted_layers,
)
from lightning_estdgm.tools.bench.train._workloads import GptWorkload, ResNetWorkload, Workload

MODELS = ("gpt", "resnet50")

_SPARSE_OVER_DENSE = 0.7  # mean time of a sparse step, for planning only
_PROFILED_STEPS = 30


@dataclass(frozen=True)
class TrainChoice:
    """Wishes of the command line; None where it has none.

    Attributes:
        models: names of `MODELS`.
        widths: widths of GPTs.
        layers: decoder blocks of GPTs; None for as many as memory and time allow.
        context: tokens a sequence.
        batch: sequences or images a step.
        image_size: height and width of a ResNet's images, in pixels.
        seconds: time for the steps of one workload, about; layers of GPTs are chosen for it.
        quick: whether to take the smaller defaults.

    Raises:
        ValueError: for an unknown model, and for no time.

    """

    models: Sequence[str] = MODELS
    widths: Sequence[int] = ()
    layers: int | None = None
    context: int | None = None
    batch: int | None = None
    image_size: int | None = None
    seconds: float = 600.0
    quick: bool = False

    def __post_init__(self) -> None:
        for model in self.models:
            if model not in MODELS:
                raise ValueError(f"model: got {model!r}, expected one of {', '.join(MODELS)}")
        if not self.seconds > 0:
            raise ValueError(f"seconds: got {self.seconds}, expected more than 0")


def quick_config(**settings: Any) -> TrainConfig:
    """Return settings of few steps: two densities in each phase, two rounds."""
    quick = TrainConfig(densities=2, interval=8, observe_steps=4, dense_steps=4, rounds=2, profile_steps=2)
    return replace(quick, **settings)


def choose(choice: TrainChoice, config: TrainConfig, say: Callable[[str], None] = lambda text: None) -> list[Workload]:
    """Return the workloads to run, in order.

    Args:
        choice: wishes of the command line.
        config: measurement of one workload.
        say: function that is told how many layers each GPT gets and why, and which GPTs are left out.

    """
    on_gpu = config.device != "cpu"
    found: list[Workload] = []
    widths = choice.widths or _default_widths(on_gpu, choice.quick)
    for width in widths if "gpt" in choice.models else ():
        context, batch = choice.context or (1024 if on_gpu else 128), choice.batch or 8
        layers, reason = choice.layers, "as asked for"
        if layers is None:
            tokens = context * batch
            limit_s = choice.seconds / _dense_steps(config)
            rate = product_rate(width, tokens, config.device)
            layers, reason = fitting_layers(width, tokens, free_memory(config.device), limit_s, rate)
        if layers == 0:
            say(f"GPT of width {width} left out: not even one layer fits into the free memory")
            continue
        say(f"GPT of width {width}: {layers} layers of {wanted_layers(width)} ({reason})")
        found.append(GptWorkload(width, layers, context, batch))
    if "resnet50" in choice.models:
        size = choice.image_size or (224 if on_gpu or not choice.quick else 96)
        found.append(ResNetWorkload(size, choice.batch or (128 if on_gpu else 4)))
    return found


def _default_widths(on_gpu: bool, quick: bool) -> tuple[int, ...]:
    if quick:
        return (2048,) if on_gpu else (1024,)
    return (512, 1024, 2048, 4096) if on_gpu else (512, 1024)


def _dense_steps(config: TrainConfig) -> float:
    """Return about how many dense steps take as long as all runs of one workload."""
    sparse = config.rounds * 3 * config.densities * config.interval * _SPARSE_OVER_DENSE
    dense = (config.rounds + 1) * (SETTLE_STEPS + config.dense_steps + 1)
    return sparse + dense + (_PROFILED_STEPS if config.profile_steps else 0)
