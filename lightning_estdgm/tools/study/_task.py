"""A task of the study."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning import LightningDataModule, LightningModule


@dataclass(frozen=True)
class Task:
    """One task of the study.

    Attributes:
        name: Name of the task.
        what: Description in one sentence.
        metric: Deciding metric: ``"loss"`` (validation, nats) or ``"accuracy"`` (validation, a share).
        steps: Optimizer steps of a whole run.
        rates: Peak learning rates that are swept.
        model: Maker of a model with weights from the global random state, from a learning rate and, for the GPTs,
            arguments of `_variants.StudyGPT`.
        data: Maker of the data, from a seed that decides the order of batches (and nothing about the split); raises
            FileNotFoundError, with where to get them, for files that are not there.
        is_tested: Whether there is a part for testing, which decides in the place of validation.
        step_s: Seconds of a dense step on one core of a Zen 4, by which plans guess their wall time before a run.

    """

    name: str
    what: str
    metric: str
    steps: int
    rates: tuple[float, ...]
    model: Callable[..., LightningModule]
    data: Callable[[int], LightningDataModule]
    is_tested: bool = False
    step_s: float = 0.1

    @property
    def missing(self) -> str:
        """What keeps the task's data from being read, and what helps; empty where nothing does."""
        try:
            self.data(0)
        except (FileNotFoundError, ModuleNotFoundError) as error:
            return str(error)
        return ""
