"""`RequeueBetweenSteps`: SLURM's requeue signal handled between steps, so that its checkpoint resumes exactly."""

from __future__ import annotations

import signal
import threading
from typing import Any

import lightning.pytorch as pl


class RequeueBetweenSteps(pl.Callback):
    """Have Lightning handle SLURM's requeue signal between optimizer steps, on all ranks after the same one.

    Lightning saves ``hpc_ckpt_*.ckpt`` inside the signal's handler, wherever training is at that moment. The batch
    under way is then skipped or repeated by the resumed run, weights can be half updated, and ranks save in different
    steps. With this callback the handler runs at the end of the optimizer step under way, or of the validation. Leave
    SLURM time for that: ``#SBATCH --signal=SIGUSR1@120``. Put it last among the callbacks. It does nothing where no
    handler for the signal is installed, such as outside SLURM.

    With several ranks it costs one reduction of a flag a step.

    Args:
        requeue_signal: Signal of Lightning's ``SLURMEnvironment``; ``None`` takes SIGUSR1, as that does.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RequeueBetweenSteps()], logger=False, accelerator="cpu")

    """

    def __init__(self, requeue_signal: signal.Signals | None = None) -> None:
        if not (requeue_signal is None or isinstance(requeue_signal, signal.Signals)):
            raise TypeError(f"requeue_signal must be one of signal.Signals or None, got {requeue_signal!r}")
        self.requeue_signal = requeue_signal or signal.SIGUSR1
        self._handler: Any = None
        self._asked = False
        self._steps_before = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace the signal's handler."""
        handler = signal.getsignal(self.requeue_signal)
        self._asked = False
        if callable(handler) and threading.current_thread() is threading.main_thread():
            self._handler = handler
            signal.signal(self.requeue_signal, self._ask)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the number of steps before the batch."""
        self._steps_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Run Lightning's handler if the signal came, but not while gradients accumulate: checkpoints lack them."""
        if trainer.global_step > self._steps_before:
            self._requeue_if_asked(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run Lightning's handler if the signal came."""
        self._requeue_if_asked(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore Lightning's handler."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore Lightning's handler."""
        self._release()

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True

    def _requeue_if_asked(self, trainer: pl.Trainer) -> None:
        if self._handler is not None and trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            self._asked = False
            self._handler(self.requeue_signal, None)

    def _release(self) -> None:
        if self._handler is not None:
            signal.signal(self.requeue_signal, self._handler)
            self._handler = None
