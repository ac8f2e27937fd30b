"""One training of ``estdgm bench memory`` in a process of its own: what it held and took, as JSON on the last line.

Run as a module with one argument, the JSON of a `MemoryTask`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_estdgm.callbacks.dgm import DGMCallback
from lightning_estdgm.config import DGMConfig, Units
from lightning_estdgm.engine._hooked_optimizers import closure_of, with_closure
from lightning_estdgm.method._schedules import ConstantDensity
from lightning_estdgm.recipes.gpt import ByteGPT
from lightning_estdgm.tools._quiet import QUIET_TRAINER, quiet_lightning
from lightning_estdgm.tools.bench._peak_memory import peak_resident

EMPTY, WITHOUT = "empty", "without"
ARMS = (EMPTY, WITHOUT, "dense", "packed")
"""Nothing at all; training without the method; with it, by storage."""

_HEAD = 128
_RATE = 1e-4


@dataclass(frozen=True)
class MemoryTask:
    """What a process trains: a byte-level GPT by AdamW, always on the same batch.

    Attributes:
        arm: one of `ARMS`.
        width: width of the GPT.
        layers: decoder blocks.
        context: tokens of a sequence.
        batch: sequences of a step.
        density: active share of the masked weights, the same in all steps.
        block_size: side of a mask unit.
        steps: optimizer steps.
        update_every: steps between mask updates, of which the last is observed.
        threads: threads.
        tells: whether it prints the loss of each step.

    """

    arm: str
    width: int = 256
    layers: int = 1
    context: int = 128
    batch: int = 2
    density: float = 0.1
    block_size: int = 16
    steps: int = 6
    update_every: int = 3
    threads: int = 1
    tells: bool = False


def train(task: MemoryTask) -> dict[str, Any]:
    """Train, and return what the process held and took.

    Returns:
        "peak_bytes" of the process; but for an empty one also "parameters" of the whole network, "held" bytes of
        weights, gradients and optimizer state, and of each step but the first "losses", "seconds", "mask_seconds" and
        whether it is "plain": neither observed nor with an update.
    """
    torch.set_num_threads(task.threads)
    if task.arm == EMPTY:
        return {"peak_bytes": peak_resident()}
    torch.manual_seed(0)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in make_gpt(task).parameters())
    callbacks: list[Callback] = []
    dgm = None
    if task.arm != WITHOUT:
        schedule = ConstantDensity(task.density, task.update_every, observe_steps=1, stop=1.0)
        units = Units(size=task.block_size, distribution="uniform")
        dgm = DGMCallback(DGMConfig(schedule, units, storage=task.arm))  # type: ignore[arg-type]
        callbacks.append(dgm)
    clock = _Clock(dgm, task.tells)
    with quiet_lightning(), contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            **QUIET_TRAINER | {"accelerator": "cpu"},
            devices=1,
            max_steps=task.steps + 1,
            callbacks=[clock, *callbacks],
            gradient_clip_val=1.0,
            logger=False,
            limit_val_batches=0,
        )
        x, y = torch.randint(256, (2, task.batch, task.context))
        loader = DataLoader(_Same(((x, y), task.steps + 1)), batch_size=None)
        trainer.fit(_module(task), loader, loader)  # the second is not used, but Lightning wants one
    return {"peak_bytes": peak_resident(), "parameters": parameters, **clock.found()}


def make_gpt(task: MemoryTask) -> ByteGPT:
    """Return the GPT, on the device of an enclosing ``with torch.device(...)``."""
    heads = max(1, task.width // _HEAD)
    return ByteGPT(task.width, task.layers, heads, task.context, lr=_RATE)


def _module(task: MemoryTask) -> ByteGPT:
    with torch.device("meta" if task.arm == "packed" else "cpu"):  # packed, it is never there as a whole
        return make_gpt(task)


class _Same(torch.utils.data.IterableDataset[Any]):
    """One batch, so many times."""

    def __init__(self, batch: tuple[tuple[Tensor, Tensor], int]) -> None:
        self.batch, self.count = batch

    def __iter__(self) -> Any:
        return iter([self.batch] * self.count)


class _Clock(Callback):
    """Times steps and what the masks take of them; put it first among the callbacks."""

    def __init__(self, dgm: DGMCallback | None, tells: bool) -> None:
        self._dgm, self._tells = dgm, tells
        self._marks: list[tuple[float, float]] = []
        self._plain: list[bool] = []
        self._losses: list[float] = []
        self._held: dict[str, int] = {}
        self._mask_s = 0.0
        if dgm is not None:
            for name in ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end"):
                setattr(dgm, name, self._timed(getattr(dgm, name)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time the hooks on the optimizer's step, which are the masks'."""
        for optimizer in trainer.optimizers:
            for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks):
                hooks.update({key: self._timed_around_closure(hook) for key, hook in hooks.items()})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note when a step begins, and of what kind it is."""
        self._marks.append((time.perf_counter(), self._mask_s))
        controller = None if self._dgm is None else self._dgm.controller
        self._plain.append(controller is None or not controller.observing)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss, and what is held: gradients of this step are still there."""
        self._losses.append(float(outputs["loss"]))
        held = held_bytes(pl_module.parameters(), trainer.optimizers)
        self._held = {kind: max(count, self._held.get(kind, 0)) for kind, count in held.items()}
        if self._tells:
            seconds = time.perf_counter() - self._marks[-1][0]
            memory = peak_resident() / 2**30
            print(
                f"step {batch_idx + 1}: loss {self._losses[-1]:.4f}, {seconds:.1f} s, {memory:.2f} GiB",
                file=sys.__stdout__,
                flush=True,
            )

    def found(self) -> dict[str, Any]:
        """Return what has been noted of all steps but the first and the last, whose ends are not known."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))[1:]
        return {
            "held": self._held,
            "losses": self._losses,
            "seconds": [after[0] - before[0] for before, after in pairs],
            "mask_seconds": [after[1] - before[1] for before, after in pairs],
            "plain": self._plain[1:-1],
        }

    def _timed_around_closure(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Time a hook on a step, and what it does around the step's closure once that has run."""
        hook = self._timed(hook)

        def timed(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
            closure = closure_of(args, kwargs)
            if closure is None:
                return hook(optimizer, args, kwargs)
            inside = 0.0

            def given() -> Any:
                nonlocal inside
                start = time.perf_counter()
                try:
                    return closure()
                finally:
                    inside += time.perf_counter() - start

            changed = hook(optimizer, *with_closure(args, kwargs, given))
            if changed is None:
                return None
            arguments, named = changed
            outer = closure_of(arguments, named)

            def around() -> Any:
                nonlocal inside
                inside, start = 0.0, time.perf_counter()
                try:
                    return outer()
                finally:
                    self._mask_s += time.perf_counter() - start - inside

            return with_closure(arguments, named, around)

        return timed

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._mask_s += time.perf_counter() - start

        return timed


def held_bytes(parameters: Iterable[Tensor], optimizers: Iterable[Optimizer]) -> dict[str, int]:
    """Return the bytes of parameters, of their gradients, and of the tensors of the optimizers' states."""
    parameters = list(parameters)
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return {
        "weights": sum(parameter.nbytes for parameter in parameters),
        "gradients": sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None),
        "optimizer state": sum(
            entry.nbytes for state in states for entry in state.values() if isinstance(entry, Tensor)
        ),
    }


if __name__ == "__main__":
    print(json.dumps(train(MemoryTask(**json.loads(sys.argv[1])))))
