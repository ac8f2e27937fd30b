"""`DGMCallback`: the method in a Lightning Trainer. Hooks and delegation; the method is `controller.py`."""

from __future__ import annotations

import io
import math
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_estdgm.callbacks._internal.gradient_compression import GradientCompression
from lightning_estdgm.callbacks._internal.schedule_clock import RunClock
from lightning_estdgm.callbacks._internal.spawned_result import Handover, Outcome
from lightning_estdgm.config import DGMConfig
from lightning_estdgm.distributed.adapters.protocol import adapter_for
from lightning_estdgm.engine.controller import DGMController
from lightning_estdgm.engine.decisions import LayerDecision
from lightning_estdgm.method.schedules import EstDgm, Schedule
from lightning_estdgm.presets import preset

__all__ = ["DGMCallback", "decision_table"]


class DGMCallback(pl.Callback):
    """Train on a small, changing share of the weights (EST-DGM), and skip the arithmetic of the rest.

    Nothing else changes: state-dict keys, parameter groups, schedulers and the loop stay as they are. What was decided
    for each layer is printed once, after the first step, and is available from `decisions`.

    Logged to every logger: ``dgm/density``, ``dgm/phase`` (index of the phase in the schedule), ``dgm/churn`` (share of
    the active weights that the last update brought in), ``dgm/explored`` (share of weights ever active),
    ``dgm/flops_ratio`` and ``dgm/flops_executed_ratio`` (training FLOPs so far over dense: what the masks ask for, and
    what was computed), ``dgm/density/<layer>``, and with `compress_gradients` ``dgm/allreduce_bytes`` (what a rank
    handed to all-reduce in the last step).

    Args:
        config: the method's settings; see `DGMConfig`.
        total_steps: optimizer steps of the run; ``None`` takes them from the Trainer. Needed for endless or length-less
            loaders without ``max_steps`` or ``max_time``.
        compress_gradients: under DDP, all-reduce the gradients of active units only (everything in observation
            windows). The averages are the same; for more than two ranks up to rounding. It takes DDP's one
            communication hook.

    Raises:
        ValueError: at the start of the fit, if the run's length cannot be told, there is nothing to mask, the strategy
            cannot be served, or a checkpoint does not belong to this model and schedule. One without state of this
            callback is taken, with a warning: masks are recovered from its weights.
        MasksDifferError: during the fit, on every rank, if the ranks' masks come out different.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[DGMCallback()], logger=False, accelerator="cpu")

    """

    def __init__(
        self, config: DGMConfig | None = None, *, total_steps: int | None = None, compress_gradients: bool = False
    ) -> None:
        if config is not None and not isinstance(config, DGMConfig):
            raise TypeError(f"config must be a DGMConfig, got {config!r}")
        if total_steps is not None and (isinstance(total_steps, bool) or not isinstance(total_steps, int)):
            raise TypeError(f"total_steps must be an int or None, got {total_steps!r}")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps!r}")
        if not isinstance(compress_gradients, bool):
            raise TypeError(f"compress_gradients must be a bool, got {compress_gradients!r}")
        if compress_gradients and config is not None and config.trains_inactive_weights:
            raise ValueError(
                "compress_gradients sends the gradients of active units only, and a BackwardSet needs others: "
                "leave one out"
            )
        self.config = config or DGMConfig()
        self.total_steps = total_steps
        self.compress_gradients = compress_gradients
        self.controller: DGMController | None = None
        self._handover = Handover()
        self._compression: GradientCompression | None = None
        self._eagerly: Any = None  # what takes torch.compile back in after the first step
        self._restored: dict[str, Any] | None = None
        self._checkpoint_step = 0  # of the checkpoint that the fit goes on from
        self._max_epochs: int | None = None
        self._resumed = False
        self._clock: RunClock | None = None
        self._progress_bar: Any = None
        self._printed = False
        self._sent: dict[str, float] = {}

    @classmethod
    def from_preset(
        cls,
        name: str,
        density: float = 0.1,
        *,
        total_steps: int | None = None,
        compress_gradients: bool = False,
        **overrides: Any,
    ) -> DGMCallback:
        """Return the callback of a published method, such as ``"rigl"``; see `presets.preset` and docs/methods.md.

        Args:
            name: of the method; an unknown one raises a ValueError that lists them.
            density: active share of the masked weights at the end of the run, in (0, 1].
            total_steps: as of the class.
            compress_gradients: as of the class.
            overrides: settings of the method, and fields of `DGMConfig`.

        Example:
            >>> DGMCallback.from_preset("rigl", density=0.1, update_every=100).config.method
            'RigL'

        """
        config = preset(name, density, **overrides)
        return cls(config, total_steps=total_steps, compress_gradients=compress_gradients)

    # ------------------------------------------------------------------ what it knows

    @property
    def phase(self) -> str:
        """Name of the phase of the step under way; empty before the fit."""
        return known.phase if (known := self._known()) else ""

    @property
    def density(self) -> float:
        """Active share of the masked weights; 1 before the fit."""
        return known.density if (known := self._known()) else 1.0

    @property
    def flops_ratio(self) -> float:
        """Training FLOPs so far that the masks ask for, over dense ones; of linear and convolution layers."""
        return known.flops_ratio if (known := self._known()) else 1.0

    @property
    def schedule(self) -> Schedule:
        """The schedule of the run; there from the start of the fit."""
        return self._known_for_certain().schedule

    def decisions(self) -> tuple[LayerDecision, ...]:
        """Return what was decided for every linear and convolution layer; backends are settled after the first step."""
        return self._known_for_certain().decisions()

    def masks(self) -> dict[str, Tensor]:
        """Return a copy of each masked layer's mask over units."""
        return self._known_for_certain().masks()

    def run_summary(self) -> dict[str, Any]:
        """Return what this run did, in plain types, for `EnergyMonitor`'s file; None where it is not known yet."""
        config = self.config.schedule
        summary: dict[str, Any] = {
            "name": self.config.method or ("EST-DGM" if isinstance(config, EstDgm) else type(config).__name__),
            "schedule": config.to_dict(),
        }
        if self.controller is None:
            unknown = ("final_density", "density", "flops_ratio", "flops_executed_ratio", "phases", "block_sizes")
            return summary | dict.fromkeys((*unknown, "backends", "sparse_operators_ran"))
        flops, masked = self.controller.flops, [d for d in self.decisions() if d.masked]
        sizes = [math.prod(d.shape) for d in masked]
        return summary | {
            "final_density": sum(n * d.final_density for n, d in zip(sizes, masked, strict=True)) / sum(sizes),
            "density": self.density,
            "flops_ratio": self.flops_ratio,
            "flops_executed_ratio": self.controller.flops_executed_ratio,
            "phases": list(dict.fromkeys(segment.phase for segment in self.schedule.segments)),
            "block_sizes": dict(Counter(str(d.block_size) for d in masked)),
            "backends": dict(Counter(d.backend for d in masked)),
            "sparse_operators_ran": flops["executed"] < flops["dense"],
        }

    def _bound(self) -> DGMController:
        if self.controller is None:
            raise RuntimeError("DGMCallback knows its model only from the start of trainer.fit on")
        return self.controller

    def _known(self) -> DGMController | Outcome | None:
        """Return the controller, or what a fit in other processes (``ddp_spawn``, ``ddp_fork``) has left, if any."""
        return self.controller or self._handover.outcome(self.config)

    def _known_for_certain(self) -> DGMController | Outcome:
        return self._known() or self._bound()

    # ------------------------------------------------------------------ life of a fit

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a second callback of this kind, and strategies that cannot be served."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        count = sum(isinstance(callback, DGMCallback) for callback in callbacks)
        if count > 1:
            raise ValueError(f"expected one DGMCallback in the Trainer, got {count}: two would mask against each other")
        _check_checkpoint_io(trainer)
        if stage == "fit":
            # What an earlier fit, or the checkpoint of a validation, has left is not this fit's.
            self.controller, self._restored, self._checkpoint_step = None, None, 0
            self._max_epochs = trainer.max_epochs
            adapter_for(trainer.strategy).check(trainer.strategy)
            _check_ddp(trainer)
            self._compression = GradientCompression(trainer) if self.compress_gradients else None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bind the model and its optimizers."""
        state, self._restored = self._restored, None
        self._resumed = state is not None
        goes_on = self._resumed or self._checkpoint_step > 0
        self._clock = RunClock(trainer, pl_module, self.total_steps, self._max_epochs, goes_on)
        self.controller = DGMController(
            adapter_for(trainer.strategy).model(trainer.strategy),
            trainer.optimizers,
            self.config,
            total_steps=self._clock.total_steps,
            state=state,
            draw_masks=not goes_on,
            group=torch.distributed.group.WORLD if trainer.world_size > 1 else None,
        )
        if self._compression is not None:
            self._compression.register(self.controller)
        self._printed = False
        self._show_in_progress_bar(trainer)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up state that a strategy restores this late: it belongs to the weights that are checked."""
        self._restore_late()

    def _restore_late(self) -> None:
        state, self._restored = self._restored, None
        if state is not None:
            self._resumed = True
            self._bound().load_state_dict(state)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up state that a strategy restores this late; without any, recover masks from a checkpoint's weights."""
        self._restore_late()
        controller = self._bound()
        if self._resumed:
            self._advance()  # a checkpoint taken before our on_train_batch_end holds a step that is not counted yet
        elif self._checkpoint_step > 0:
            assert self._clock is not None
            together = 1 if pl_module.automatic_optimization else max(1, len(trainer.optimizers))
            steps = self._checkpoint_step // together
            controller.recover(steps, self._clock.position(steps))
            rank_zero_warn(
                f"the checkpoint is at step {steps} but holds no state of DGMCallback (it was saved without it), so "
                f"masks were recovered from its weights, for density {controller.density:.3f}: {controller.recovered}. "
                "Observation window, explored share and FLOPs start anew"
            )
        elif controller.recovered:
            rank_zero_info(f"A new run starts from weights with zeros: {controller.recovered}")
        self._mask_averages(trainer)

    def _mask_averages(self, trainer: pl.Trainer) -> None:
        """Keep inactive weights zero in the averages of Lightning's callbacks; they offer no hook to do it by."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
                average = callback._average_model
                if average is not None:
                    self._bound().mask_copy_(average.module if isinstance(average, AveragedModel) else average)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mask gradients; not in an observation window, where they are left whole until the step."""
        controller = self._bound()
        if not controller.observing:
            controller.mask_gradients()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """In an observation window: record the whole gradients, then mask them, before Lightning clips.

        In manual optimization outside one, too: a plain ``loss.backward()`` calls no `on_after_backward`.
        """
        controller = self._bound()
        if controller.observing or not pl_module.automatic_optimization:
            fused = getattr(optimizer, "_step_supports_amp_scaling", False)
            controller.mask_gradients(optimizer, grad_scale=_grad_scale(trainer) if fused else 1.0)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Run the first step without torch.compile: it shows the shapes that backends are measured at."""
        if self._eagerly is None and self._bound().probing:
            self._eagerly = torch.compiler.set_stance("force_eager")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the schedule, update masks when due, print once, log."""
        controller = self._bound()
        before = controller.steps
        updated = self._advance()
        if not controller.probing:
            self._compile_again()
        if controller.steps == before:
            return
        if updated:
            self._mask_averages(trainer)
        if self._compression is not None and self._compression.is_active:
            self._sent = {"dgm/allreduce_bytes": float(self._compression.bytes_since_last())}
        if not self._printed:
            self._printed = True
            self._print_decisions(trainer)
        if updated or controller.steps == 1:
            self._log(trainer, self._metrics() | self._update_metrics())
        elif controller.steps % max(1, trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            self._log(trainer, self._metrics())

    def _advance(self) -> bool:
        controller, clock = self._bound(), self._clock
        assert clock is not None
        return controller.advance(max(controller.position, clock.position(controller.steps + 1)))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave no hook behind; masks and counters stay readable, also where another process made this callback."""
        self._handover.leave(self._bound(), trainer)
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._release()

    def _compile_again(self) -> None:
        if self._eagerly is not None:
            self._eagerly.__exit__(None, None, None)
            self._eagerly = None

    def _release(self) -> None:
        self._compile_again()
        if self.controller is not None:
            self.controller.close()
        if self._compression is not None:
            self._compression.close()
            self._compression = None
        self._clock = None
        if self._progress_bar is not None:
            vars(self._progress_bar).pop("get_metrics", None)
            self._progress_bar = None

    # ------------------------------------------------------------------ state

    @property
    def state_key(self) -> str:
        """Key in a checkpoint, free of settings, so that it is found whatever they are."""
        return "DGMCallback"

    def state_dict(self) -> dict[str, Any]:
        """Return masks, windows and counters in plain types."""
        return known.state_dict() if (known := self._known()) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the model is bound: strategies restore before or after `on_fit_start`."""
        self._restored = state_dict or None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note how far a checkpoint has come, should it hold no state of ours."""
        self._checkpoint_step = max(self._checkpoint_step, checkpoint["global_step"])

    # ------------------------------------------------------------------ telling

    def _metrics(self) -> dict[str, float]:
        controller = self._bound()
        segments = [segment.phase for segment in controller.schedule.segments]
        return self._sent | {
            "dgm/density": controller.density,
            "dgm/phase": float(list(dict.fromkeys(segments)).index(controller.phase)),
            "dgm/flops_ratio": controller.flops_ratio,
            "dgm/flops_executed_ratio": controller.flops_executed_ratio,
        }

    def _update_metrics(self) -> dict[str, float]:
        controller = self._bound()
        layers = {f"dgm/density/{name}": density for name, density in controller.layer_densities().items()}
        return {"dgm/churn": controller.churn, "dgm/explored": controller.explored} | layers

    @staticmethod
    def _log(trainer: pl.Trainer, metrics: dict[str, float]) -> None:
        # The step of Lightning's own curves, as in its DeviceStatsMonitor; global_step differs in manual optimization.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def _show_in_progress_bar(self, trainer: pl.Trainer) -> None:
        """Add phase and density to what the progress bar shows.

        Logged metrics are numbers, and a phase is a name: so the bar's documented `get_metrics` is extended, on this
        one instance, until the fit ends.
        """
        bar = trainer.progress_bar_callback
        if bar is None:
            return
        plain = bar.get_metrics

        def get_metrics(*args: Any) -> dict[str, Any]:
            return {**plain(*args), "phase": self.phase, "density": f"{self.density:.3f}"}

        bar.get_metrics = get_metrics  # type: ignore[method-assign, assignment]
        self._progress_bar = bar

    def _print_decisions(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        console = Console(file=io.StringIO(), width=max(100, Console().width))
        console.print(decision_table(self.decisions()))
        text = console.file.getvalue().rstrip()  # type: ignore[attr-defined]
        if trainer.progress_bar_callback is not None:
            trainer.progress_bar_callback.print(text)
        else:
            print(text)


def decision_table(decisions: tuple[LayerDecision, ...]) -> Table:
    """Lay out what was decided for each layer, for printing with rich."""
    masked = sum(math.prod(d.shape) for d in decisions if d.masked)
    total = sum(math.prod(d.shape) for d in decisions)
    table = Table(title=f"DGMCallback: {masked:,} of {total:,} weights in linear and convolution layers are masked")
    for column in ("layer", "shape", "unit", "density", "backend", "why"):
        table.add_column(column, overflow="fold", justify="right" if column == "density" else "left")
    for d in decisions:
        unit = "-" if not d.masked else "weight" if d.block_size == 1 else f"{d.block_size} x {d.block_size}"
        density = f"{d.density:.2f} → {d.final_density:.2f}" if d.masked else "dense"
        backend = d.backend if d.backend == d.final_backend else f"{d.backend} → {d.final_backend}"
        table.add_row(d.name, " x ".join(map(str, d.shape)), unit, density, backend, d.why)
    return table


def _check_checkpoint_io(trainer: pl.Trainer) -> None:
    """Let a CheckpointIO refuse the strategy, as `SparseCheckpointIO` does; Lightning tells it of none."""
    plugin = trainer.strategy.checkpoint_io
    for part in (plugin, getattr(plugin, "checkpoint_io", None)):  # an AsyncCheckpointIO wraps another
        if (check := getattr(part, "check_strategy", None)) is not None:
            check(trainer.strategy)


def _grad_scale(trainer: pl.Trainer) -> float:
    """Return the factor of an fp16 GradScaler; 1 without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler.get_scale() if scaler is not None else 1.0


def _check_ddp(trainer: pl.Trainer) -> None:
    """Refuse settings of DDP under which ranks would come to different masks, or torch fails without saying why."""
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy):
        return
    if isinstance(strategy._ddp_comm_state, PostLocalSGDState):
        raise ValueError(
            "expected a DDP hook that averages gradients over all ranks in every step, got post-local SGD: its ranks "
            "train apart between averagings, so each would choose other masks"
        )
    together = trainer.accumulate_grad_batches
    if strategy._ddp_kwargs.get("static_graph") and together > 1 and trainer.world_size > 1:
        raise ValueError(
            f"static_graph=True does not work with accumulate_grad_batches={together}: torch's DDP stops with an "
            "internal error in the first micro-batch. Leave one of the two out"
        )
