"""Output of `DGMCallback`: metrics to the Trainer's loggers, progress bar, table of decisions."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from lightning_estdgm._words import first_names
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.engine._decisions import LayerDecision
from lightning_estdgm.method._masks import unit_words

_MOSTLY = 5  # times as many frozen weights as masked ones
_NAMED = 5  # weights named, the rest counted


class DGMLog:
    """Metrics, progress bar and table of decisions of one fit.

    Args:
        trainer: Trainer of the fit.
        controller: controller of the fit.
        unlisted: number of trainable weights outside linear and convolution layers, by name.

    Attributes:
        allreduce_bytes: number of bytes that a rank handed to all-reduce in the last step; ``None`` if gradients are
            not packed.

    """

    def __init__(
        self, trainer: pl.Trainer, controller: DGMController, unlisted: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        self.allreduce_bytes: float | None = None
        self._trainer = trainer
        self._controller = controller
        self._unlisted = unlisted
        self._printed = False
        self._reports = 0  # of timings, that were printed
        self._bar = trainer.progress_bar_callback
        self._extend_bar()

    def step(self, *, updated: bool) -> None:
        """Log a step, as often as the Trainer does and after each mask update; print the decisions once."""
        controller, trainer = self._controller, self._trainer
        # For ModelCheckpoint and EarlyStopping, in every step; self.log would keep them to one loop's results.
        watched = {name: torch.tensor(value, device="cpu") for name, value in self._watched().items()}
        trainer.callback_metrics.update(watched)
        if not self._printed:
            self._printed = True
            self._print(controller.decisions())
            self._warn_frozen(controller)
        for report in self._new_reports():  # a redistribution has moved layers to densities that were not timed yet
            say_on(trainer, report)
        new = controller.masked_weights if updated else ()
        if late := [weight.name for weight in new if weight.since == controller.steps]:
            rank_zero_info(
                f"DGMCallback: {len(late)} layers ({first_names(late)}) have begun to train, and are masked from step "
                f"{controller.steps} on"
            )
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every == 0:  # never, as for Lightning
            return
        if updated or controller.steps == 1:
            self._log(self._metrics() | self._update_metrics())
        elif controller.steps % every == 0:
            self._log(self._metrics())

    def close(self) -> None:
        """Restore the progress bar's own metrics."""
        if self._bar is not None:
            vars(self._bar).pop("get_metrics", None)
            self._bar = None

    def _watched(self) -> dict[str, float]:
        """Return the metrics that are in `trainer.callback_metrics` as well."""
        controller = self._controller
        phases = list(dict.fromkeys(segment.phase for segment in controller.schedule.segments))
        return {"dgm/density": controller.density, "dgm/phase": float(phases.index(controller.phase))}

    def _metrics(self) -> dict[str, float]:
        controller = self._controller
        sent = {} if self.allreduce_bytes is None else {"dgm/allreduce_bytes": self.allreduce_bytes}
        return sent | {
            **self._watched(),
            "dgm/flops_ratio": controller.flops_ratio,
            "dgm/flops_executed_ratio": controller.flops_executed_ratio,
        }

    def _update_metrics(self) -> dict[str, float]:
        controller = self._controller
        layers = {f"dgm/density/{name}": density for name, density in controller.layer_densities().items()}
        return {"dgm/churn": controller.churn, "dgm/explored": controller.explored} | layers

    def _log(self, metrics: dict[str, float]) -> None:
        # The step of Lightning's own curves, as in its DeviceStatsMonitor; global_step differs in manual optimization.
        step = self._trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in self._trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def _extend_bar(self) -> None:
        """Add phase and density to the progress bar.

        Logged metrics are numbers, and a phase is a name; so the bar's documented `get_metrics` is extended on this
        instance until the fit ends.
        """
        bar, controller = self._bar, self._controller
        if bar is None:
            return
        plain = bar.get_metrics

        def get_metrics(*args: Any) -> dict[str, Any]:
            return {**plain(*args), "phase": controller.phase, "density": f"{controller.density:.3f}"}

        bar.get_metrics = get_metrics  # type: ignore[method-assign, assignment]

    def _warn_frozen(self, controller: DGMController) -> None:
        """Warn if most of the layers' weights are frozen, as where adapters are trained on a frozen base."""
        masked = sum(math.prod(d.shape) for d in controller.decisions() if d.masked)
        # The weight of an old-style spectral_norm or weight_norm is no parameter, and trains by others.
        weights = [(c.weight, math.prod(c.shape)) for c in controller.candidates if isinstance(c.weight, nn.Parameter)]
        frozen = [size for weight, size in weights if not weight.requires_grad]
        if sum(frozen) > _MOSTLY * masked > 0:
            rank_zero_warn(
                f"DGMCallback masks {masked:,} weights, and {len(frozen)} layers with {sum(frozen):,} weights are "
                "frozen: these are computed dense, so hardly any arithmetic is skipped. To train a sparse network, "
                "train the layers themselves; to make small updates of a trained one cheap, unfreeze them and use "
                'DGMConfig(inactive="frozen")'
            )

    def _new_reports(self) -> tuple[str, ...]:
        new = self._controller.timed[self._reports :]
        self._reports += len(new)
        return new

    def _print(self, decisions: tuple[LayerDecision, ...]) -> None:
        trainer = self._trainer
        if not trainer.is_global_zero:
            return
        console = Console(file=io.StringIO(), width=max(100, Console().width))
        console.print(decision_table(decisions))
        for report in self._new_reports():
            console.print(escape(report), soft_wrap=True)
        if self._unlisted:
            console.print(_unlisted_in_words(self._unlisted, self._trainer.lightning_module), soft_wrap=True)
        _print_above_bar(trainer, console.file.getvalue().rstrip())  # type: ignore[attr-defined]


def say_on(trainer: pl.Trainer, text: str) -> None:
    """Print a sentence of the callback on the first rank."""
    if trainer.is_global_zero:
        _print_above_bar(trainer, f"DGMCallback: {text}")


def _print_above_bar(trainer: pl.Trainer, text: str) -> None:
    if trainer.progress_bar_callback is not None:
        trainer.progress_bar_callback.print(text)
    else:
        print(text, flush=True)  # in the order of what other streams say, also in a log file


def decision_table(decisions: tuple[LayerDecision, ...]) -> Table:
    """Return the decisions for all layers as a table for printing with rich."""
    masked = sum(math.prod(d.shape) for d in decisions if d.masked)
    total = sum(math.prod(d.shape) for d in decisions)
    table = Table(title=f"DGMCallback: {masked:,} of {total:,} weights in linear and convolution layers are masked")
    for column in ("layer", "shape", "unit", "density", "backend", "why"):
        table.add_column(column, overflow="fold", justify="right" if column == "density" else "left")
    for d in decisions:
        unit = unit_words(d.block_size) if d.masked else "-"
        density = f"{d.density:.2f} → {d.final_density:.2f}" if d.masked else "dense"
        backend = d.backend if d.backend == d.final_backend else f"{d.backend} → {d.final_backend}"
        table.add_row(d.name, " x ".join(map(str, d.shape)), unit, density, backend, d.why)
    return table


def _unlisted_in_words(unlisted: Mapping[str, int], module: pl.LightningModule) -> str:
    """Return a sentence on the trainable weights outside linear and convolution layers, which stay dense."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    names = ", ".join(list(unlisted)[:_NAMED]) + f" and {len(unlisted) - _NAMED} more" * (len(unlisted) > _NAMED)
    return (
        f"{sum(unlisted.values()):,} of {trainable:,} trainable weights are in no linear or convolution layer, and "
        f"stay dense: {names}"
    )
