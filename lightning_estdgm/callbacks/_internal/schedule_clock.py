"""`ScheduleClock`: the length of a Trainer's run in steps of the schedule, and the position in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging, Timer

from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.engine._pace import Pace

_TIME_TICKS = 10_000  # a run limited by time alone is scheduled in this many parts of max_time
_SAME_SHARE = 0.01  # by which the share of the time and of the schedule may differ in an unchanged run
_SAME_STEPS = 1  # by which the steps left and those of the schedule may differ, as several optimizers are rounded
_NOMINAL_STEPS = 100  # for fast_dev_run, or a fit with nothing left to do: enough for any schedule given in shares


class ScheduleClock:
    """Length of one fit, and the schedule's position in it.

    The position is the number of optimizer steps that the Trainer counts: also those in which masked weights got no
    gradient, as where ``training_step`` returns None or a layer was dropped, so that the schedule ends with the run.
    Under ``max_time`` it is the share of the time that has passed, where that is further. In manual optimization only
    the user's code knows which batches step which optimizers, so the position is a number that the Trainer counts:
    under ``max_steps`` the steps of all optimizers over the number of optimizers, under ``max_epochs`` the batches. Of
    both limits the one counts that comes first if each batch has a step; if that is the epochs, batches or steps,
    whichever is further. Of optimizers taken by ``use_pl_optimizer=False`` the Trainer counts no step: the batches with
    one count instead.
    Ranks agree on the position: the length is that of the shortest loader, and the time is rank 0's.

    A fit that goes on with another length keeps its place in the schedule, and goes through the rest in the steps or in
    the time that is left; so does one whose epochs turn out to be longer or shorter than expected.

    Args:
        trainer: Trainer at the start of a fit, with its optimizers.
        pl_module: its model.
        total_steps: length that the user gave, if any.
        max_epochs: see `epochs_with_steps`.
        resumed: whether the fit goes on with a checkpoint's state; otherwise steps of the Trainer's earlier fits do not
            count.

    Attributes:
        total_steps: length of the fit.
        epoch_steps: number of steps, or of batches in manual optimization, of its first epoch; None if epochs do not
            limit it.

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
        self._trainer = trainer
        self._fit_loop = trainer.fit_loop
        self._timer = next((c for c in callbacks if isinstance(c, Timer) and c.time_remaining() is not None), None)
        self._asked = total_steps
        self._max_epochs = max_epochs
        self._accumulation = next((c for c in callbacks if isinstance(c, GradientAccumulationScheduler)), None)
        self._together_before = trainer.accumulate_grad_batches
        # Number of batches of an epoch: as expected now, and as the Trainer said of the epoch before.
        self._expected: float | None = None
        self._announced: float = math.inf
        self._saw_epoch = False
        by_steps = by_epochs = None
        if total_steps is None:
            by_steps = _left_by_steps(trainer, pl_module, resumed)
            by_epochs = self._left_by_epochs(trainer, 0 if resumed else trainer.current_epoch)
            if by_epochs is not None:  # a tuner may change the loader before the first epoch begins
                self._announced = self._expected = trainer.num_training_batches
        known = [n for n in (total_steps, by_steps, by_epochs) if n is not None]
        if not known and self._timer is None:
            raise ValueError(
                "the length of the run cannot be told: the loader has no length (or max_epochs=-1), and neither "
                "max_steps nor max_time is set. Pass DGMCallback(total_steps=...) or Trainer(max_steps=...)"
            )
        self._only_time = not known
        self._time_from: tuple[float, int] | None = None  # share of the time, and position, where a run goes on
        self.total_steps = min(known, default=_TIME_TICKS)
        limited = by_epochs is not None and self.total_steps == by_epochs
        self.epoch_steps = self._epoch_steps(trainer, 0) if limited else None
        is_dev_run = bool(trainer.fast_dev_run) and total_steps is None  # type: ignore[attr-defined]
        if is_dev_run or self.total_steps < 1:
            self.total_steps = max(self.total_steps, _NOMINAL_STEPS)
        self._strategy = trainer.strategy
        self.total_steps = self._agree(self.total_steps, "min")
        if trainer.world_size > 1:
            self.epoch_steps = trainer.strategy.broadcast(self.epoch_steps)
        manual = not pl_module.automatic_optimization
        self._by_batches = manual and by_epochs is not None and (by_steps is None or by_epochs <= by_steps)
        self._first_batch = 0 if resumed else self._batches_done()
        self._by_global_step = manual and by_steps is not None
        self._by_each_step = not manual and not self._only_time
        self._first_step = 0 if resumed else trainer.global_step
        self._together = _steps_together(trainer, pl_module)

    def position(self, steps: int, pace: Pace) -> int:
        """Return the position in the schedule after `steps` optimizer steps."""
        position = pace.position_at(self._progress(steps))
        if self._timer is None:
            return position
        share, ahead = self._time_share(), 0
        if self._time_from is not None:
            before, ahead = self._time_from
            share = (share - before) / (1.0 - before)
        return max(position, ahead + int(share * (pace.total_steps - ahead)))

    def state_dict(self) -> dict[str, Any]:
        """Return what `resume` needs, in plain types: steps of the Trainer, where the position depends on them, and
        the number of batches of an epoch as the Trainer said and as expected."""
        counted = {"counted": self._trainer.global_step - self._first_step} if self._by_each_step else {}
        return counted | {"epoch_batches": [self._announced, self._expected]}

    def resume(self, controller: DGMController, saved: Mapping[str, Any]) -> None:
        """Count on from where a resumed run was. Call it once the Trainer's loops are restored, before a step.

        Args:
            controller: controller of the resumed run.
            saved: `state_dict` of when the checkpoint was saved; that of earlier versions is empty.

        """
        counted = saved.get("counted", controller.steps + int(controller.stepped))
        self._first_step = self._trainer.global_step - counted if self._by_each_step else self._first_step
        self._announced, self._expected = saved.get("epoch_batches", (self._announced, self._expected))

    def go_on(self, controller: DGMController) -> str:
        """Let a resumed run go through the rest of its schedule in what is left of this fit, if lengths differ.

        So they do in a run of the same length that was stopped in mid-epoch: Lightning goes on with the next epoch.
        Call it once the Trainer's loops are restored.

        Returns:
            A sentence on what has changed; empty if nothing has.

        """
        pace, run = controller.pace, (self.total_steps, self.epoch_steps)
        share = min(1.0, controller.position / pace.total_steps)
        if controller.position >= pace.total_steps:
            rest = "the schedule has ended, so the masks stay as they are (begin a new fit to explore again)"
        elif self._only_time:
            passed = self._time_share()
            if abs(passed - share) <= _SAME_SHARE or passed >= 1.0:
                return ""
            self._time_from = (passed, controller.position)
            return f"{share:.0%} of the schedule are done, and the rest of it is spread over the time that is left"
        else:
            rest = "the rest of it is spread over the steps that are left"
        as_long = pace.run[0] == run[0] and (None in (pace.run[1], run[1]) or pace.run[1] == run[1])
        if as_long and controller.position >= pace.total_steps:
            return ""
        progress, left = self._progress(controller.steps), max(0, self._left(controller.steps))
        due = max(0, pace.last - progress)
        if as_long and abs(due - left) <= _SAME_STEPS:
            return ""
        if left == 0 and controller.position < pace.total_steps:  # by `total_steps`; the Trainer goes on
            rest = "the rest of it goes on a position a step, since so many steps are done already"
        controller.pace = pace.with_length(run, progress=progress, position=controller.position, left=left)
        if as_long:
            return (
                f"the Trainer has {left} steps left to do, and the schedule {due}, as where a run was stopped in "
                f"mid-epoch. It goes on where {share:.0%} of the schedule are done, and {rest}"
            )
        return (
            f"the checkpoint is of a run of {pace.run[0]} steps, and this one has {run[0]}. It goes on where "
            f"{share:.0%} of the schedule are done, and {rest}{f': {left} steps' if left else ''}. "
            f"DGMCallback(total_steps={pace.run[0]}) would leave the schedule as long as it was"
        )

    def begin_epoch(self, controller: DGMController) -> str:
        """Follow loaders whose length changes from epoch to epoch, or which end before ``limit_train_batches``.

        So is the Trainer's ``accumulate_grad_batches``, where code of the user's changes it. Call it at the start of
        each epoch, on all ranks.

        Returns:
            A sentence on what has changed; empty if nothing has.

        """
        trainer, expected = self._trainer, self._expected
        coming: float = trainer.num_training_batches
        # The rest of a resumed epoch does not tell how long it was.
        last = self._fit_loop.epoch_loop.batch_progress.current.ready if self._saw_epoch else expected
        if last is not None and 0 < last < self._announced:  # data that ends before the limit will do so again
            coming = min(coming, last)
        self._announced, self._expected, self._saw_epoch = trainer.num_training_batches, coming, True
        if self._only_time or self._asked is not None or self._max_epochs in (None, -1) or not math.isfinite(coming):
            return ""
        progress, pace = self._progress(controller.steps), controller.pace
        together, self._together_before = self._together_before, trainer.accumulate_grad_batches
        accumulates_anew = self._accumulation is None and together != self._together_before
        changed = self._agree(int((expected is not None and coming != expected) or accumulates_anew), "max")
        left = self._left(controller.steps) if changed else 0
        if not changed or controller.position >= pace.total_steps or pace.last == progress + left:
            return ""
        controller.pace = pace.with_length(pace.run, progress=progress, position=controller.position, left=left)
        if accumulates_anew:
            return (
                f"a step takes {self._together_before} batches now, and {together} before: the rest of the schedule is "
                f"spread over the {left} steps that are left"
            )
        before = "their number was not known" if expected == math.inf else f"{expected:.0f} were expected"
        return (
            f"an epoch has {coming:.0f} batches now, and {before}: the rest of the schedule is "
            f"spread over the {left} steps that are left"
        )

    def forget_loader(self) -> None:
        """Have the Trainer ask for its loader anew: one made before the loops are restored never sees its position."""
        self._fit_loop._combined_loader = None

    def _agree(self, value: int, reduce_op: str) -> int:
        if self._trainer.world_size == 1:
            return value
        tensor = torch.tensor(value, device=self._strategy.root_device)
        return int(self._strategy.reduce(tensor, reduce_op=reduce_op))

    def _left(self, steps: int) -> int:
        """Return the number of steps that the restored loops have left to do."""
        trainer = self._trainer
        if self._asked is not None:
            return self._asked - self._progress(steps)
        by_steps = None if trainer.max_steps == -1 else (trainer.max_steps - trainer.global_step) // self._together
        if by_steps is not None and self._by_global_step and trainer.global_step == self._first_step:
            by_steps -= steps  # which the Trainer has not counted
        epochs: Any = self._fit_loop.epoch_progress.current
        epoch = epochs.processed  # not current_epoch: saved at the end of an epoch, that may still be this one
        by_epochs = self._left_by_epochs(trainer, epoch)
        if by_epochs is not None and epochs.started > epoch:  # in mid-epoch
            batches: Any = self._fit_loop.epoch_loop.batch_progress.current
            done = batches.processed // self._together_in(epoch)
            by_epochs -= min(self._epoch_steps(trainer, epoch), done)
        return self._agree(min(n for n in (by_steps, by_epochs) if n is not None), "min")

    def _progress(self, steps: int) -> int:
        """Return what the pace of the run counts: steps, batches, or ``global_step`` over the number of optimizers."""
        if self._only_time:
            return 0
        counted = self._trainer.global_step - self._first_step
        if self._by_batches:
            batches = self._batches_done() - self._first_batch
            return max(batches, counted // self._together) if self._by_global_step else batches
        if self._by_global_step:
            return counted // self._together if counted else steps  # none of optimizers that are not Lightning's
        if self._by_each_step:
            return max(steps, counted)
        return steps

    def _time_share(self) -> float:
        assert self._timer is not None
        elapsed, remaining = self._timer.time_elapsed(), self._timer.time_remaining()
        assert remaining is not None
        return self._strategy.broadcast(elapsed / (elapsed + remaining))

    def _batches_done(self) -> int:
        return self._fit_loop.total_batch_idx + 1

    def _left_by_epochs(self, trainer: pl.Trainer, epoch: int) -> int | None:
        """Return the number of optimizer steps, or of batches in manual optimization, from `epoch` to ``max_epochs``.

        Unlike `Trainer.estimated_stepping_batches` it follows a `GradientAccumulationScheduler`.
        """
        if self._max_epochs in (None, -1):
            return None
        if trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()
            if trainer.ckpt_path is not None:
                self.forget_loader()
        if not math.isfinite(trainer.num_training_batches) and self._expected in (None, math.inf):
            return None  # without a length, the first epoch shows it
        epochs = range(epoch, self._max_epochs)
        if self._accumulation is None:  # all are alike
            return len(epochs) * self._epoch_steps(trainer, epoch)
        return sum(self._epoch_steps(trainer, e) for e in epochs)

    def _epoch_steps(self, trainer: pl.Trainer, epoch: int) -> int:
        announced, expected = trainer.num_training_batches, self._expected
        if expected is not None and expected < announced:
            if math.isfinite(announced):  # no batch is known to be the last, so it makes no step
                return int(expected // self._together_in(epoch))
            announced = expected  # without a length, Lightning fetches a batch ahead, and knows the last
        return math.ceil(announced / self._together_in(epoch))

    def _together_in(self, epoch: int) -> int:
        """Return the number of batches that make a step in `epoch`."""
        if self._accumulation is not None:
            return self._accumulation.get_accumulate_grad_batches(epoch)
        return self._trainer.accumulate_grad_batches


def clock_entries(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of `ScheduleClock.state_dict` in a state."""
    return {key: state[key] for key in ("counted", "epoch_batches") if key in state}


def epochs_with_steps(trainer: pl.Trainer, callback: pl.Callback) -> int | None:
    """Return the Trainer's `max_epochs`, without the epoch that `StochasticWeightAveraging` adds for statistics alone.

    Call it in `on_fit_start`: callbacks may set `max_epochs` in `setup`, in any order.

    Args:
        trainer: Trainer of the fit.
        callback: callback whose `on_fit_start` is being called.

    """
    epochs, callbacks = trainer.max_epochs, trainer.callbacks  # type: ignore[attr-defined]
    if epochs in (None, -1):
        return epochs
    before = callbacks[: callbacks.index(callback)]
    return min([epochs, *(c.swa_end + 1 for c in before if isinstance(c, StochasticWeightAveraging))])


def nothing_left(trainer: pl.Trainer) -> bool:
    """Return whether the Trainer, by the state that its loops have now, will train no batch."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    by_epochs = trainer.max_epochs not in (None, -1) and epochs.processed >= trainer.max_epochs
    by_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return by_epochs or by_steps or trainer.limit_train_batches == 0


def _left_by_steps(trainer: pl.Trainer, pl_module: pl.LightningModule, resumed: bool) -> int | None:
    """Return the number of steps to ``max_steps``; a batch in which several manual optimizers step counts once."""
    if trainer.max_steps == -1:
        return None
    return (trainer.max_steps - (0 if resumed else trainer.global_step)) // _steps_together(trainer, pl_module)


def _steps_together(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
    """Return the number by which ``global_step`` grows if all optimizers step once."""
    return 1 if pl_module.automatic_optimization else max(1, len(trainer.optimizers))
