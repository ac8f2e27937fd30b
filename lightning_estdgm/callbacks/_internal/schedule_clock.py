"""`ScheduleClock`: the length of a Trainer's run in steps of the schedule, and the position in it."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer

_TIME_TICKS = 10_000  # a run limited by time alone is scheduled in this many parts of max_time
_NOMINAL_STEPS = 100  # for fast_dev_run, or a fit with nothing left to do: enough for any schedule given in shares


class ScheduleClock:
    """Length of one fit, and the schedule's position in it.

    The position is the number of optimizer steps done, with three exceptions. Under ``max_time`` it is the share of the
    time that has passed, where that is further. In manual optimization only the user's code knows which batches step
    which optimizers, so the position is a number that the Trainer counts: under ``max_steps`` the steps of all
    optimizers over the number of optimizers, under ``max_epochs`` the batches. Ranks agree on the position: the length
    is that of the shortest loader, and the time is rank 0's.

    Args:
        trainer: Trainer at the start of a fit, with its optimizers.
        pl_module: its model.
        total_steps: length that the user gave, if any.
        max_epochs: Trainer's `max_epochs` before `StochasticWeightAveraging` raises it for an epoch without steps.
        resumed: whether the fit goes on with a checkpoint's state; otherwise steps of the Trainer's earlier fits do not
            count.

    Attributes:
        total_steps: length of the fit.

    Raises:
        ValueError: if the length is unknown.

    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        total_steps: int | None,
        max_epochs: int | None,
        resumed: bool,
    ) -> None:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._fit_loop = trainer.fit_loop
        self._timer = next((c for c in callbacks if isinstance(c, Timer) and c.time_remaining() is not None), None)
        by_steps = by_epochs = None
        if total_steps is None:
            by_steps = _left_by_steps(trainer, pl_module, resumed)
            by_epochs = _left_by_epochs(trainer, callbacks, max_epochs, resumed)
        known = [n for n in (total_steps, by_steps, by_epochs) if n is not None]
        if not known and self._timer is None:
            raise ValueError(
                "the length of the run cannot be told: the loader has no length (or max_epochs=-1), and neither "
                "max_steps nor max_time is set. Pass DGMCallback(total_steps=...) or Trainer(max_steps=...)"
            )
        self._only_time = not known
        self.total_steps = min(known, default=_TIME_TICKS)
        is_dev_run = bool(trainer.fast_dev_run) and total_steps is None  # type: ignore[attr-defined]
        if is_dev_run or self.total_steps < 1:
            self.total_steps = max(self.total_steps, _NOMINAL_STEPS)
        if trainer.world_size > 1:
            length = torch.tensor(self.total_steps, device=trainer.strategy.root_device)
            self.total_steps = int(trainer.strategy.reduce(length, reduce_op="min"))
        self._strategy = trainer.strategy
        self._trainer = trainer
        manual = not pl_module.automatic_optimization
        self._by_batches = manual and by_epochs is not None and by_steps is None
        self._first_batch = 0 if resumed else self._batches_done()
        self._by_global_step = manual and by_steps is not None
        self._first_step = 0 if resumed else trainer.global_step
        self._together = _steps_together(trainer, pl_module)

    def position(self, steps: int) -> int:
        """Return the position in the schedule after `steps` optimizer steps."""
        if self._only_time:
            position = 0
        elif self._by_batches:
            position = self._batches_done() - self._first_batch
        elif self._by_global_step:
            position = (self._trainer.global_step - self._first_step) // self._together
        else:
            position = steps
        if self._timer is None:
            return position
        elapsed, remaining = self._timer.time_elapsed(), self._timer.time_remaining()
        assert remaining is not None
        share = self._strategy.broadcast(elapsed / (elapsed + remaining))
        return max(position, int(share * self.total_steps))

    def _batches_done(self) -> int:
        return self._fit_loop.total_batch_idx + 1


def _left_by_steps(trainer: pl.Trainer, pl_module: pl.LightningModule, resumed: bool) -> int | None:
    """Return the number of steps to ``max_steps``; a batch in which several manual optimizers step counts once."""
    if trainer.max_steps == -1:
        return None
    return (trainer.max_steps - (0 if resumed else trainer.global_step)) // _steps_together(trainer, pl_module)


def _steps_together(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
    """Return the number by which ``global_step`` grows if all optimizers step once."""
    return 1 if pl_module.automatic_optimization else max(1, len(trainer.optimizers))


def _left_by_epochs(
    trainer: pl.Trainer, callbacks: list[pl.Callback], max_epochs: int | None, resumed: bool
) -> int | None:
    """Return the number of optimizer steps, or of batches in manual optimization, to ``max_epochs``.

    Unlike `Trainer.estimated_stepping_batches` it follows a `GradientAccumulationScheduler`.
    """
    if max_epochs in (None, -1):
        return None
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    if trainer.ckpt_path is not None:
        # The loops are restored after this, and a loader made before that would never see its saved position.
        trainer.fit_loop._combined_loader = None
    if not math.isfinite(batches):
        return None
    scheduler = next((c for c in callbacks if isinstance(c, GradientAccumulationScheduler)), None)
    steps = 0
    for epoch in range(0 if resumed else trainer.current_epoch, max_epochs):
        together = scheduler.get_accumulate_grad_batches(epoch) if scheduler else trainer.accumulate_grad_batches
        steps += math.ceil(batches / together)
    return steps
