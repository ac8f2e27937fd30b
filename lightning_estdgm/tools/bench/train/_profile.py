"""Time of a step by part: torch's profiler over a few refinement steps, or dense ones."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile, record_function

from lightning_estdgm.callbacks.dgm import DGMCallback
from lightning_estdgm.method._schedules import EstDgm
from lightning_estdgm.tools._quiet import environment_variable
from lightning_estdgm.tools.bench.train._single_run import dgm_config, fit
from lightning_estdgm.tools.bench.train._train_config import TrainConfig
from lightning_estdgm.tools.bench.train._workloads import Workload
from lightning_estdgm.tools.demo._step_profile import LightningRanges

SPARSE, DENSE, ATTENTION, POINTWISE, OPTIMIZER, MASKS, OTHER = (
    "sparse products",
    "dense products",
    "attention",
    "norms, activations, loss",
    "optimizer",
    "masks",
    "other",
)
PARTS = (SPARSE, DENSE, ATTENTION, POINTWISE, OPTIMIZER, MASKS, OTHER)
"""Parts of a step's time; "other" is the rest of its wall time: Lightning, Python, an idle GPU."""

_SETTLE = 10  # steps before those that are profiled

# What an operation, or the nearest one around it that tells, belongs to; the first that fits.
_OPERATIONS = (
    (SPARSE, re.compile(r"^estdgm::")),
    (ATTENTION, re.compile(r"scaled_dot_product|flash_attention|efficient_attention")),
    (DENSE, re.compile(r"^aten::(mm|addmm|bmm|baddbmm|linear|matmul|_?conv|cudnn_conv|mkldnn_(re|linear|conv))")),
    (OPTIMIZER, re.compile(r"_fused_(adam|sgd)|_foreach_|configure_gradient_clipping")),
    (MASKS, re.compile(r"\[Callback\]DGMCallback")),
    (OTHER, re.compile(r"^\[")),  # another range of Lightning's, such as the backward: ends the search upwards
    (OPTIMIZER, re.compile(r"^Optimizer\.step#")),  # but not what lies between its operations, Lightning's closure
)
_HOOK = "[Callback]DGMCallback, hook on the optimizer's step"
_POINTWISE = re.compile(r"^aten::|^triton_|CompiledFunction|CompiledFxGraph|Torch-Compiled|Backward\d*$")

# Kernels of a GPU, where no operation around them tells.
_KERNELS = (
    (ATTENTION, re.compile(r"flash|fmha|attention", re.I)),
    (DENSE, re.compile(r"gemm|nvjet|cutlass|xmma|Cijk_|convolve|implicit_con|wgrad|dgrad", re.I)),
    (OPTIMIZER, re.compile(r"multi_tensor|fused_adam", re.I)),
    (POINTWISE, re.compile(r"triton_|norm|elementwise|softmax|reduce|nll", re.I)),
)


def profile_train(workload: Workload, config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Profile `config.profile_steps` steps of a dense run and of the frozen end of refinement.

    The profiler slows small operations down: read the shares, and take times from the timed runs.

    Returns:
        For "dense" and "refinement": "steps", "wall_s" a step, and by part of `PARTS` "seconds" a step and "share".
    """
    found = {}
    length = _SETTLE + config.profile_steps + 4
    for arm in ("dense", "refinement"):
        profiler = _StepProfiler(length, config.profile_steps, config.device)
        callbacks: list[Callback] = [profiler]
        if arm == "refinement":
            callbacks.insert(0, DGMCallback(dgm_config(workload, config, _refinement(config, length))))
        fit(workload, config, length + 1, callbacks, profiler=LightningRanges())
        found[arm] = profiler.shares()
    return found


def _refinement(config: TrainConfig, length: int) -> EstDgm:
    """Return a schedule of two steps of each earlier phase, then refinement, whose second half is frozen."""
    default, last = EstDgm(), length + 1 - 4
    return EstDgm(
        exploration=replace(default.exploration, length=2),
        consolidation=replace(default.consolidation, length=2),
        refinement=replace(default.refinement, length=last),
        update_every=length,
        observe_steps=1,
        freeze=(config.profile_steps + 3) / last,
    )


class _StepProfiler(Callback):
    """Profiles the last `count` of the first `length` steps, from batch start to batch start."""

    def __init__(self, length: int, count: int, device: str) -> None:
        self.length, self.count, self.on_gpu = length, count, device != "cpu"
        self.seen, self.wall_s = 0, 0.0
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        self.profile = profile(activities=activities)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the hooks on the optimizer's step, which are the masks', in the profile."""
        for optimizer in trainer.optimizers:
            for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks):
                hooks.update({key: _named(hook) for key, hook in hooks.items()})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start or stop at the border of two steps."""
        if self.seen == self.length - self.count:
            with environment_variable("KINETO_LOG_LEVEL", "99"):  # else it announces itself on stderr
                self._synchronize()
                self.profile.start()
            self.wall_s = time.perf_counter()
        elif self.seen == self.length:
            self._synchronize()
            self.wall_s = time.perf_counter() - self.wall_s
            self.profile.stop()
        self.seen += 1

    def shares(self) -> dict[str, Any]:
        """Return seconds a step and share of it by part; an operation counts without those that it calls."""
        spent = dict.fromkeys(PARTS, 0.0)
        for part, seconds in _kernel_times(self.profile.events()) if self.on_gpu else _cpu_times(self.profile.events()):
            spent[part] += seconds
        spent[OTHER] = self.wall_s - sum(seconds for part, seconds in spent.items() if part != OTHER)
        return {
            "steps": self.count,
            "wall_s": self.wall_s / self.count,
            "seconds": {part: seconds / self.count for part, seconds in spent.items()},
            "share": {part: seconds / self.wall_s for part, seconds in spent.items()},
        }

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def _named(hook: Callable[..., Any]) -> Callable[..., Any]:
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(_HOOK):
            return hook(*args, **kwargs)

    return named


def _cpu_times(events: Any) -> Iterable[tuple[str, float]]:
    for event in events:
        yield part_of(_names(event)), event.self_cpu_time_total / 1e6


def _kernel_times(events: Any) -> Iterable[tuple[str, float]]:
    """Yield each kernel's part and seconds, by the operation that launched it, or else by its own name."""
    for event in events:
        for kernel in getattr(event, "kernels", ()):
            part = part_of(_names(event))
            if part in (OTHER, POINTWISE):
                part = next((name for name, pattern in _KERNELS if pattern.search(kernel.name)), part)
            yield part, kernel.duration / 1e6


def _names(event: Any) -> list[str]:
    """Return the event's name and those of the events around it, from the inside."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def part_of(names: list[str]) -> str:
    """Return the part that an operation belongs to, by its name and those around it, from the inside.

    >>> part_of(["aten::mm", "estdgm::masked_linear"]), part_of(["aten::gelu", "[Strategy]SingleDevice.training_step"])
    ('sparse products', 'norms, activations, loss')
    """
    for part, pattern in _OPERATIONS[:2]:  # a product inside a sparse operator, or inside attention, is theirs
        if any(pattern.search(name) for name in names):
            return part
    if names[0].startswith("Optimizer.step#"):
        return OTHER
    for name in names:
        for part, pattern in _OPERATIONS:
            if pattern.search(name):
                return part if part != OTHER else POINTWISE if _POINTWISE.search(names[0]) else OTHER
    return POINTWISE if _POINTWISE.search(names[0]) else OTHER
