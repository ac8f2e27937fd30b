"""`DGMCallback`: the method in a Lightning Trainer.

It has a method for each hook of Lightning and properties for users, so more than other classes, and only delegates.
The method itself is in `engine._controller`, helpers are in `_internal`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from lightning_estdgm._checks import check_int
from lightning_estdgm._flat_settings import FlatSettings
from lightning_estdgm.callbacks._internal.averages import mask_averages_
from lightning_estdgm.callbacks._internal.dgm_log import DGMLog, say_on
from lightning_estdgm.callbacks._internal.extended_hook import extend_hook
from lightning_estdgm.callbacks._internal.fit_result import FitResult, FitResultFile
from lightning_estdgm.callbacks._internal.gradient_compression import GradientCompression
from lightning_estdgm.callbacks._internal.graph_limit import GraphLimit
from lightning_estdgm.callbacks._internal.loaded_weights import LoadedWeights, say_foreign
from lightning_estdgm.callbacks._internal.manual_clipping import ManualClipping
from lightning_estdgm.callbacks._internal.packed_weights import PackedWeights
from lightning_estdgm.callbacks._internal.run_outcome import RunOutcome
from lightning_estdgm.callbacks._internal.schedule_clock import (
    ScheduleClock,
    clock_entries,
    epochs_with_steps,
    nothing_left,
)
from lightning_estdgm.callbacks._internal.trainer_checks import (
    check_checkpoint_io,
    check_ddp,
    check_other_maskers,
    check_trainer,
    grad_scale,
)
from lightning_estdgm.config import DGMConfig
from lightning_estdgm.distributed.adapters._protocol import adapter_for
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.engine._decisions import LayerDecision
from lightning_estdgm.engine._pace import Pace, saved_pace
from lightning_estdgm.method._masks import size_entry
from lightning_estdgm.method._schedules import EstDgm, Schedule
from lightning_estdgm.modules._candidates import unlisted_weights
from lightning_estdgm.presets import preset

_BOUND_TO_A_FIT = (
    "controller",
    "_earlier",
    "_compression",
    "_restored",
    "_clock",
    "_log",
    "_outcome",
    "_packed",
    "_loaded",
)


class DGMCallback(pl.Callback):
    """Train on a small, changing share of the weights (EST-DGM), and skip the arithmetic of the rest.

    Nothing else changes: state-dict keys, parameter groups, schedulers and the loop stay as they are. The decision for
    each layer is printed once, after the first step, and is available from `decisions`.

    Logged to every logger: ``dgm/density``, ``dgm/phase`` (index of the phase in the schedule), ``dgm/churn`` (share of
    the active weights that the last update brought in), ``dgm/explored`` (share of weights ever active),
    ``dgm/flops_ratio`` and ``dgm/flops_executed_ratio`` (ratio of the training FLOPs so far to dense ones: as needed by
    the masks, and as computed), ``dgm/density/<layer>``, and with `compress_gradients` ``dgm/allreduce_bytes`` (bytes
    that a rank handed to all-reduce in the last step).

    Args:
        config: settings of the method; ``None`` takes the defaults.
        total_steps: number of optimizer steps of the run; ``None`` takes it from the Trainer. Needed for endless or
            length-less loaders without ``max_steps`` or ``max_time``.
        compress_gradients: whether DDP all-reduces the gradients of active units only (all of them in observation
            windows). The averages are the same, for more than two ranks up to rounding. It takes DDP's one
            communication hook.

    Raises:
        ValueError: at the start of the fit, if the run's length is unknown, there is nothing to mask, the strategy
            is not supported, or a checkpoint does not belong to this model and schedule. A checkpoint without state of
            this callback is accepted with a warning, and masks are recovered from its weights.
        MasksDifferError: during the fit, on every rank, if the ranks' masks come out different.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[DGMCallback()], logger=False, accelerator="cpu")

    """

    def __init__(
        self,
        config: DGMConfig | FlatSettings | None = None,
        *,
        total_steps: int | None = None,
        compress_gradients: bool = False,
    ) -> None:
        if config is not None and not isinstance(config, DGMConfig):
            raise TypeError(f"config must be a DGMConfig, got {config!r}")
        if total_steps is not None:
            check_int("total_steps", total_steps, at_least=1, expected="an int or None")
        if not isinstance(compress_gradients, bool):
            raise TypeError(f"compress_gradients must be a bool, got {compress_gradients!r}")
        if compress_gradients and config is not None and config.trains_inactive_weights:
            raise ValueError(
                "compress_gradients sends the gradients of active units only, and a BackwardSet needs others: "
                "leave one out"
            )
        if compress_gradients and config is not None and config.storage == "packed":
            raise ValueError("storage='packed' sends active units only already: leave compress_gradients out")
        self.config = config or DGMConfig()
        self.total_steps = total_steps
        self.compress_gradients = compress_gradients
        self.controller: DGMController | None = None
        # Of the fit before, for one with nothing left to do.
        self._earlier: tuple[DGMController, RunOutcome | None] | None = None
        self._spawned = FitResultFile()
        self._copied: FitResult | None = None  # of the callback that this one is a copy of
        self._compression: GradientCompression | None = None
        self._packed: PackedWeights | None = None
        self._loaded: LoadedWeights | None = None
        self._restored: dict[str, Any] | None = None
        self._checkpoint_step = 0  # step of the checkpoint that the fit goes on from
        self._resumed = False
        self._counts: dict[str, Any] = {}  # the clock's, at the checkpoint that is resumed or at the fit's end
        self._clock: ScheduleClock | None = None
        self._optimizers: list[Optimizer] = []  # the Trainer's, when last seen
        self._log: DGMLog | None = None
        self._outcome: RunOutcome | None = None
        self._at_end = ExitStack()  # what ends with the fit, however it does

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
        """Return the callback of a published method, such as ``"rigl"``; see `presets.preset`.

        Args:
            name: name of the method, a key of `presets.PRESETS`.
            density: active share of the masked weights at the end of the run, in (0, 1].
            total_steps: see the class.
            compress_gradients: see the class.
            overrides: settings of the method, and fields of `DGMConfig`.

        Raises:
            ValueError: for an unknown method; the message lists the known ones.

        Example:
            >>> DGMCallback.from_preset("rigl", density=0.1, update_every=100).config.method
            'RigL'

        """
        config = preset(name, density, **overrides)
        return cls(config, total_steps=total_steps, compress_gradients=compress_gradients)

    # ------------------------------------------------------------------ properties

    @property
    def phase(self) -> str:
        """Name of the current step's phase; empty before the fit."""
        return known.phase if (known := self._known()) else ""

    @property
    def density(self) -> float:
        """Active share of the masked weights; 1 before the fit."""
        return known.density if (known := self._known()) else 1.0

    @property
    def flops_ratio(self) -> float:
        """Ratio of the training FLOPs so far that the masks need to dense ones, in linear and convolution layers."""
        return known.flops_ratio if (known := self._known()) else 1.0

    @property
    def schedule(self) -> Schedule:
        """The schedule of the run, from the start of the fit on."""
        return self._known_for_certain().schedule

    def decisions(self) -> tuple[LayerDecision, ...]:
        """Return the decision for every linear and convolution layer; backends are chosen after the first step."""
        return self._known_for_certain().decisions()

    def masks(self) -> dict[str, Tensor]:
        """Return a copy of each masked layer's mask over units."""
        return self._known_for_certain().masks()

    def run_summary(self) -> dict[str, Any]:
        """Return a summary of the run in plain types for `EnergyMonitor`'s file; unknown values are None."""
        config = self.config.schedule
        summary: dict[str, Any] = {
            "name": self.config.method or ("EST-DGM" if isinstance(config, EstDgm) else type(config).__name__),
            "schedule": config.to_dict(),
        }
        if (known := self._known()) is None:
            of_masks = ("final_density", "density", "flops_ratio", "flops_executed_ratio", "phases", "block_sizes")
            of_products = ("backends", "sparse_operators_ran")
            of_end = ("ended_as_asked", "thawed_and_dense", "replaced_and_dense", "best_checkpoints")
            return summary | dict.fromkeys((*of_masks, *of_products, *of_end))
        flops, masked = known.flops, [d for d in known.decisions() if d.masked]
        return summary | {
            "final_density": known.final_density,
            "density": known.density,
            "flops_ratio": known.flops_ratio,
            "flops_executed_ratio": known.flops_executed_ratio,
            "phases": list(dict.fromkeys(segment.phase for segment in known.schedule.segments)),
            "block_sizes": dict(Counter(str(size_entry(d.block_size)) for d in masked)),
            "backends": dict(Counter(d.backend for d in masked)),
            "sparse_operators_ran": flops["executed"] < flops["dense"],
            **(known.outcome if isinstance(known, FitResult) else self._outcome_so_far()),
        }

    def _bound(self) -> DGMController:
        if self.controller is None:
            raise RuntimeError("DGMCallback knows its model only from the start of trainer.fit on")
        return self.controller

    def _known(self) -> DGMController | FitResult | None:
        """Return the controller, or the result of a fit in other processes (``ddp_spawn``, ``ddp_fork``), if any."""
        return self.controller or self._spawned.result(self.config) or self._copied

    def _outcome_so_far(self) -> dict[str, Any]:
        return self._outcome.summary() if self._outcome else {}

    def _known_for_certain(self) -> DGMController | FitResult:
        return self._known() or self._bound()

    # ------------------------------------------------------------------ life of a fit

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a second callback of this kind, and strategies that are not supported."""
        check_trainer(trainer)
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        count = sum(isinstance(callback, DGMCallback) for callback in callbacks)
        if count > 1:
            raise ValueError(f"expected one DGMCallback in the Trainer, got {count}: two would mask against each other")
        check_checkpoint_io(trainer)
        check_other_maskers(trainer)
        if stage == "fit":
            # Nothing of an earlier fit, or of the checkpoint of a validation, belongs to this fit.
            self._earlier = None if self.controller is None else (self.controller, self._outcome)
            self.controller = self._copied = None
            self._restored, self._checkpoint_step, self._counts = None, 0, {}
            adapter_for(trainer.strategy).check(trainer.strategy)
            check_ddp(trainer)
            if self.config.storage == "packed":
                self._packed = PackedWeights(trainer, pl_module, self.config, self.total_steps)
            if self.compress_gradients:
                self._compression = GradientCompression(trainer)
                self._at_end.callback(self._compression.close)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the controller of the model and its optimizers; a fit with nothing left to do changes nothing.

        A module's own hook comes first: the length of the run may depend on the data or the limits that it makes.
        """
        if is_overridden("on_fit_start", pl_module) and self._packed is None:
            give_back = extend_hook(pl_module, "on_fit_start", partial(self._begin, trainer, pl_module))
            self._at_end.callback(give_back)
        else:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = adapter_for(trainer.strategy).model(trainer.strategy)
        # Not by on_load_checkpoint: a tuner calls it too, and Lightning does not without "callbacks" in the checkpoint.
        self._checkpoint_step = trainer._checkpoint_connector._loaded_checkpoint.get("global_step", 0)
        may_be_over = self._restored is None and self._checkpoint_step == 0 and nothing_left(trainer)
        if may_be_over and not trainer.strategy.restore_checkpoint_after_setup:
            self._keep_earlier(model)
            return
        self._earlier = self._earlier if may_be_over else None
        state, self._restored = self._restored, None
        self._resumed = state is not None
        self._counts = clock_entries(state or {})
        goes_on = self._resumed or self._checkpoint_step > 0
        self._clock = self._make_clock(trainer, pl_module, goes_on or may_be_over)
        self._optimizers = list(trainer.optimizers)
        self.controller = DGMController(
            model,
            self._optimizers,
            self.config,
            total_steps=self._clock.total_steps,
            state=state,
            draw_masks=not goes_on,
            group=torch.distributed.group.WORLD if trainer.world_size > 1 else None,
            say=partial(say_on, trainer),
            storage=None if self._packed is None else self._packed.begin(trainer),
        )
        self._at_end.callback(self.controller.close)
        self.controller.probe_uncompiled()
        if self._packed is not None:
            self._packed.began = True
            mask_averages_(trainer, self.controller)  # copies of the whole weights, exchanged from the sanity check on
        # How much is left is known once the Trainer's loops are restored.
        length = self._clock.total_steps, self._clock.epoch_steps
        self.controller.pace = Pace.even(*length) if state is None else saved_pace(state)
        if self._compression is not None:
            self._compression.register(self.controller)
        self._log = DGMLog(trainer, self.controller, unlisted_weights(pl_module, self.controller.candidates))
        self._at_end.callback(self._log.close)
        self._outcome = RunOutcome(trainer, self.controller, self._outcome)
        self._outcome.load_state_dict(state or {})
        layers = sum(c.masked for c in self.controller.candidates)
        self._at_end.callback(GraphLimit(layers, packed=self._packed is not None).restore)

    def _make_clock(self, trainer: pl.Trainer, pl_module: pl.LightningModule, goes_on: bool) -> ScheduleClock:
        return ScheduleClock(trainer, pl_module, self.total_steps, epochs_with_steps(trainer, self), goes_on)

    def _keep_earlier(self, model: torch.nn.Module) -> None:
        """Have the fit before speak for this one, which trains nothing, if it was of the same model."""
        earlier, self._earlier, self.controller = self._earlier, None, None
        if earlier is not None and {c.module for c in earlier[0].candidates} <= set(model.modules()):
            self.controller, self._outcome = earlier
        self._end_packing()
        rank_zero_info("DGMCallback: this fit has nothing left to train, so weights and masks stay as they are")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on where a checkpoint was saved; without state of this callback, recover masks from its weights."""
        controller = self._bound()
        late = trainer.strategy.restore_checkpoint_after_setup and trainer.ckpt_path is not None
        if late and not self._resumed and self._checkpoint_step == 0:  # as in on_fit_start
            self._checkpoint_step = trainer.global_step
            self._clock = self._make_clock(trainer, pl_module, goes_on=True)
        if self._resumed:
            assert self._clock is not None
            assert self._outcome is not None
            self._outcome.resumes = True
            self._clock.resume(controller, self._counts)
            self._advance()  # a checkpoint taken before our on_train_batch_end holds a step that is not counted yet
            if changed := self._clock.go_on(controller):
                rank_zero_info(f"DGMCallback: {changed}")
        elif self._checkpoint_step > 0:
            assert self._clock is not None
            together = 1 if pl_module.automatic_optimization else max(1, len(trainer.optimizers))
            steps = self._checkpoint_step // together
            controller.recover(steps, self._clock.position(steps, controller.pace))
            rank_zero_warn(
                f"the checkpoint is at step {steps} but holds no state of DGMCallback (it was saved without it), so "
                f"masks were recovered from its weights, for density {controller.density:.3f}: {controller.recovered}. "
                "Observation window, explored share and FLOPs start anew"
            )
        elif controller.recovered:
            rank_zero_info(f"A new run starts from weights with zeros: {controller.recovered}")
        if not pl_module.automatic_optimization:
            self._at_end.callback(ManualClipping(trainer, controller.mask_gradients).end)
        if self._resumed:
            say_foreign(controller)
        self._loaded = LoadedWeights(controller)
        self._at_end.callback(self._loaded.close)
        mask_averages_(trainer, controller)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Spread the rest of the schedule over the rest of the run, if epochs are not as long as expected."""
        if self._clock is not None and (changed := self._clock.begin_epoch(self._bound())):
            rank_zero_info(f"DGMCallback: {changed}")

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mask gradients, except in an observation window, where they stay whole until the step."""
        controller = self._bound()
        if not controller.observing:
            controller.mask_gradients()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Record whole gradients in an observation window, then mask them, before Lightning clips.

        In manual optimization they are masked outside a window too: a plain ``loss.backward()`` calls no
        `on_after_backward`.
        """
        controller = self._bound()
        if controller.observing or not pl_module.automatic_optimization:
            fused = getattr(optimizer, "_step_supports_amp_scaling", False)
            controller.mask_gradients(optimizer, grad_scale=grad_scale(trainer) if fused else 1.0)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take over new optimizers; zero inactive weights that the user's code has written to since the last step."""
        assert self._outcome is not None
        controller = self._bound()
        if not _are_same(self._optimizers, trainer.optimizers):
            self._optimizers = list(trainer.optimizers)
            controller.use_optimizers(self._optimizers)
            rank_zero_info("DGMCallback: the Trainer has other optimizers than before; the schedule goes on by them")
        if self._loaded is not None:
            self._loaded.say()
        controller.mask_weights(every=batch_idx == 0)
        self._outcome.watch()
        if batch_idx == 0:
            self._outcome.watch_thawed()
            self._outcome.watch_replaced()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the schedule, update masks when due, print once, log."""
        controller = self._bound()
        before = controller.steps
        updated = self._advance()
        if controller.steps == before:
            return
        if updated:
            mask_averages_(trainer, controller)
            assert self._outcome is not None
            self._outcome.watch_replaced()
        assert self._log is not None
        if self._compression is not None and self._compression.is_active:
            self._log.allreduce_bytes = float(self._compression.bytes_since_last())
        self._log.step(updated=updated)

    def _advance(self) -> bool:
        controller, clock = self._bound(), self._clock
        assert clock is not None
        return controller.advance(max(controller.position, clock.position(controller.steps + 1, controller.pace)))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Zero inactive weights that the user's code has written to since the last step."""
        if self._clock is not None:
            if self._loaded is not None:
                self._loaded.say()
            self._bound().mask_weights(every=True)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Do so again at the first batch: hooks that come after this callback's may put averages in at the start."""
        if self._clock is not None and batch_idx == 0 and dataloader_idx == 0:
            self._bound().mask_weights(every=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Zero inactive weights that the user's code has written to since the last step; name replaced layers.

        Weights that were loaded since are left as they are, as the best ones of the run: nothing trains them any more.
        Layers are torch's own again from here on: the module's ``on_train_end`` may script or export them.
        """
        if self._loaded is None or not self._loaded.exceeding(as_loaded=True):
            self._bound().mask_weights(every=True)
        assert self._outcome is not None
        self._outcome.watch_replaced()  # not later: what is done to the trained model is its owner's business
        self._bound().restore_layers()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove all hooks; masks and counters stay readable, also in the process that spawned this one."""
        if self._clock is not None:  # not in a fit with nothing left to do
            self._end_of_fit(trainer)
        self._release()

    def _end_of_fit(self, trainer: pl.Trainer) -> None:
        goes_on = self._resumed or self._checkpoint_step > 0
        if trainer.strategy.restore_checkpoint_after_setup and not goes_on and self._bound().steps == 0:
            self._keep_earlier(adapter_for(trainer.strategy).model(trainer.strategy))
            return
        assert self._outcome is not None
        self._outcome.watch_weights()
        self._outcome.say()
        self._spawned.leave(trainer, lambda: self._result(self._bound()))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove all hooks; weights that were to be packed for a run that did not begin are as they were."""
        self._end_packing(exception)
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove all hooks."""
        self._release()

    def _end_packing(self, exception: BaseException | None = None) -> None:
        if self._packed is not None:
            self._packed.end(exception)
            self._packed = None

    def _release(self) -> None:
        self._end_packing()
        self._at_end.close()
        self._counts = self._clock_state()
        self._clock = self._compression = self._loaded = self._log = self._earlier = None
        self._optimizers = []

    # ------------------------------------------------------------------ state

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle has the settings and the result so far: the controller, its hooks, the model and the
        # Trainer stay where they are. Without a result of sharded weights, which all ranks would have to ask for.
        known = self._known()
        if isinstance(known, DGMController):
            sharded = any(weight.placement.is_sharded for weight in known.masked_weights)
            known = None if sharded else self._result(known)
        unbound: dict[str, Any] = {**dict.fromkeys(_BOUND_TO_A_FIT), "_optimizers": [], "_at_end": ExitStack()}
        return {**self.__dict__, **unbound, "_copied": known}

    @property
    def state_key(self) -> str:
        """Key in a checkpoint; it holds no settings, so state is found whatever they are."""
        return "DGMCallback"

    def state_dict(self) -> dict[str, Any]:
        """Return masks, windows and counters in plain types."""
        if (known := self._known()) is None:
            return {}
        return known.state_dict() if isinstance(known, FitResult) else self._state(known)

    def _state(self, controller: DGMController) -> dict[str, Any]:
        return controller.state_dict() | self._clock_state()

    def _result(self, controller: DGMController) -> FitResult:
        return FitResult.of(controller, self._state(controller), self._outcome_so_far())

    def _clock_state(self) -> dict[str, Any]:
        return self._counts if self._clock is None else self._clock.state_dict()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the best checkpoints to the state, for a run that is resumed to know their density."""
        states = checkpoint.get("callbacks", {})
        if self._outcome is not None and self.state_key in states:
            states[self.state_key] = states[self.state_key] | self._outcome.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state, or keep it until there is a controller: strategies restore before or after `on_fit_start`.

        In mid-run a tuner, such as ``lr_find``, puts back what it has saved: the steps between were not the run's.
        """
        if self._clock is None:
            self._restored = state_dict or None
        elif state_dict:
            self._resumed = True
            self._counts = clock_entries(state_dict)
            controller = self._bound()
            controller.load_state_dict(state_dict)
            assert self._outcome is not None
            self._outcome.load_state_dict(state_dict)
            controller.pace = saved_pace(state_dict)  # until the loops are restored, and tell what is left

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note the step of a checkpoint that the strategy restores only now; of a tuner's in mid-run nothing is new."""
        begins = self._clock is not None and self._loaded is None
        if begins and trainer.strategy.restore_checkpoint_after_setup:
            self._checkpoint_step = checkpoint["global_step"]
            self._clock = self._make_clock(trainer, pl_module, goes_on=True)  # the Trainer's earlier fits do not count
            self._clock.forget_loader()


def _are_same(some: Sequence[Optimizer], others: Sequence[Optimizer]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
