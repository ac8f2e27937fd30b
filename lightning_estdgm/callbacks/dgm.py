"""`DGMCallback`: the method in a Lightning Trainer. Hooks and delegation; the method is `controller.py`."""

from __future__ import annotations

import io
import math
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer

from lightning_estdgm.callbacks.clock import RunClock
from lightning_estdgm.controller import DGMConfig, DGMController, LayerDecision
from lightning_estdgm.schedules import Schedule

__all__ = ["DGMCallback", "decision_table"]


class DGMCallback(pl.Callback):
    """Train on a small, changing share of the weights (EST-DGM), and skip the arithmetic of the rest.

    Nothing else changes: state-dict keys, parameter groups, schedulers and the loop stay as they are. What was decided
    for each layer is printed once, after the first step, and is available from `decisions`.

    Logged to every logger: ``dgm/density``, ``dgm/phase`` (index of the phase in the schedule), ``dgm/churn`` (share of
    the active weights that the last update brought in), ``dgm/explored`` (share of weights ever active),
    ``dgm/flops_ratio`` and ``dgm/flops_executed_ratio`` (training FLOPs so far over dense: what the masks ask for, and
    what was computed), and ``dgm/density/<layer>``.

    Args:
        config: the method's settings; see `DGMConfig`.
        total_steps: optimizer steps of the run; ``None`` takes them from the Trainer. Needed for endless or length-less
            loaders without ``max_steps`` or ``max_time``.

    Raises:
        ValueError: at the start of the fit, if the run's length cannot be told, there is nothing to mask, or a
            checkpoint does not belong to this model and schedule.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[DGMCallback()], logger=False, accelerator="cpu")

    """

    def __init__(self, config: DGMConfig | None = None, *, total_steps: int | None = None) -> None:
        if config is not None and not isinstance(config, DGMConfig):
            raise TypeError(f"config must be a DGMConfig, got {config!r}")
        if total_steps is not None and (isinstance(total_steps, bool) or not isinstance(total_steps, int)):
            raise TypeError(f"total_steps must be an int or None, got {total_steps!r}")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps!r}")
        self.config = config or DGMConfig()
        self.total_steps = total_steps
        self.controller: DGMController | None = None
        self._restored: dict[str, Any] | None = None
        self._resumed = False
        self._clock: RunClock | None = None
        self._progress_bar: Any = None
        self._printed = False

    # ------------------------------------------------------------------ what it knows

    @property
    def phase(self) -> str:
        """Name of the phase of the step under way; empty before the fit."""
        return self.controller.phase if self.controller else ""

    @property
    def density(self) -> float:
        """Active share of the masked weights; 1 before the fit."""
        return self.controller.density if self.controller else 1.0

    @property
    def flops_ratio(self) -> float:
        """Training FLOPs so far that the masks ask for, over dense ones; of linear and convolution layers."""
        return self.controller.flops_ratio if self.controller else 1.0

    @property
    def schedule(self) -> Schedule:
        """The schedule of the run; there from the start of the fit."""
        return self._bound().schedule

    def decisions(self) -> tuple[LayerDecision, ...]:
        """Return what was decided for every linear and convolution layer; backends are settled after the first step."""
        return self._bound().decisions()

    def masks(self) -> dict[str, Tensor]:
        """Return a copy of each masked layer's mask over units."""
        return self._bound().masks()

    def _bound(self) -> DGMController:
        if self.controller is None:
            raise RuntimeError("DGMCallback knows its model only from the start of trainer.fit on")
        return self.controller

    # ------------------------------------------------------------------ life of a fit

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a second callback of this kind."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        count = sum(isinstance(callback, DGMCallback) for callback in callbacks)
        if count > 1:
            raise ValueError(f"expected one DGMCallback in the Trainer, got {count}: two would mask against each other")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bind the model and its optimizers."""
        state, self._restored = self._restored, None
        self._resumed = state is not None
        self._clock = RunClock(trainer, pl_module, self.total_steps, self._resumed)
        self.controller = DGMController(
            pl_module, trainer.optimizers, self.config, total_steps=self._clock.total_steps, state=state
        )
        self._printed = False
        self._show_in_progress_bar(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up state that a strategy restores this late; refuse to start anew in the middle of a run."""
        state, self._restored = self._restored, None
        if state is not None:
            self._resumed = True
            self._bound().load_state_dict(state)
        if self._resumed:
            self._advance()  # a checkpoint taken before our on_train_batch_end holds a step that is not counted yet
        elif trainer.ckpt_path is not None and trainer.global_step > 0:
            raise ValueError(
                f"checkpoint {trainer.ckpt_path!r} is at step {trainer.global_step} but holds no state of DGMCallback; "
                "expected one saved with it. To start from its weights, load them into the model and fit without "
                "ckpt_path"
            )

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

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the schedule, update masks when due, print once, log."""
        controller = self._bound()
        before = controller.steps
        updated = self._advance()
        if controller.steps == before:
            return
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
        """Leave no hook behind; masks and counters stay readable."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._release()

    def _release(self) -> None:
        if self.controller is not None:
            self.controller.close()
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
        return self.controller.state_dict() if self.controller else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the model is bound: strategies restore before or after `on_fit_start`."""
        self._restored = state_dict or None

    # ------------------------------------------------------------------ telling

    def _metrics(self) -> dict[str, float]:
        controller = self._bound()
        segments = [segment.phase for segment in controller.schedule.segments]
        return {
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


def _grad_scale(trainer: pl.Trainer) -> float:
    """Return the factor of an fp16 GradScaler; 1 without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler.get_scale() if scaler is not None else 1.0
