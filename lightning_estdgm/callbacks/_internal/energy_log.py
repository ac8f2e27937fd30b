"""Output of `EnergyMonitor`: metrics to the Trainer's loggers, a Prometheus file, warnings said once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]

from lightning_estdgm.energy._export import EnergyMeasurement, write_prometheus
from lightning_estdgm.energy._reading import DeviceId
from lightning_estdgm.energy._run_file import FILE_NAME

_log = logging.getLogger(__name__)

_LAYOUT = {
    "Energy": {
        "Joules by phase": ["Multiline", [r"energy/phase/.*_joules"]],
        "Joules": ["Multiline", [r"energy/total_joules", r"energy/net_joules"]],
        "Watts": ["Multiline", [r"power/total_watts", r"power/(gpu|cpu|dram)_watts"]],
        "Joules by domain": ["Multiline", [r"energy/(gpu|cpu|dram)_joules"]],
        "Joules of training and validation": ["Multiline", [r"energy/(train|val)_joules"]],
        "Joules per step, sample, ...": ["Multiline", [r"energy/joules_per_"]],
    }
}
"""TensorBoard's custom-scalars page: titles, and patterns that the beginning of a tag has to match."""

_OF_GPUS = {"Watts by GPU": ["Multiline", [r"power/gpu/"]]}
"""Charts for runs with GPUs only: elsewhere they would stay empty."""

_IN_TABLE = ("energy/total_joules", "energy/seconds")
"""Beginnings of the metrics that TensorBoard's table of hyperparameters has a column for."""


class EnergyLog:
    """Writes the figures of one fit to loggers and files; warns of each failure once.

    Args:
        trainer: Trainer of the fit, whose loggers are written to.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._said: set[Any] = set()
        self._logged: set[str] = set()

    def add_layout(self, *, with_gpus: bool) -> None:
        """Give TensorBoard a page with the energy curves."""
        layout = {title: {**charts, **(_OF_GPUS if with_gpus else {})} for title, charts in _LAYOUT.items()}
        for logger in self._trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                with self._never_ends_the_run("the page of energy curves"):
                    logger.experiment.add_custom_scalars(layout)

    def add_hparams(self, method: Callable[[], Mapping[str, Any] | None]) -> None:
        """Give TensorBoard's table of hyperparameters the row of this run, with what `method` returns."""
        for logger in self._trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                with self._never_ends_the_run("the row of hyperparameters"):
                    # Imported here: it loads a part of TensorBoard that writing curves does without.
                    from lightning_estdgm.callbacks._internal.tensorboard_hparams import write_hparams

                    write_hparams(self._trainer, logger, method(), sorted(self._logged))

    def log_metrics(self, values: Mapping[str, float]) -> None:
        """Log the metrics at the step of Lightning's own curves, with each logger's separator for "/"."""
        self._logged = {name for name in values if name.startswith(_IN_TABLE)}
        step = self._trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in self._trainer.loggers:
            with self._never_ends_the_run(f"energy metrics to {type(logger).__name__}"):
                separator = logger.group_separator
                logger.log_metrics({name.replace("/", separator): value for name, value in values.items()}, step=step)

    def write_prometheus(self, path: Path, values: Iterable[EnergyMeasurement]) -> None:
        """Rewrite the Prometheus file; one that cannot be written costs a warning."""
        with self._never_ends_the_run(f"the Prometheus file {path}"):
            write_prometheus(path, values)

    def warn_of_another_file(self, path: PurePath) -> None:
        """Warn once that the run's file has another name, because another run's is there."""
        if path.name != FILE_NAME and path not in self._said:
            self._said.add(path)
            rank_zero_warn(
                f"{path.parent} holds the {FILE_NAME} of another run: this run's is {path.name}. "
                "Give each run a folder of its own: curves in one folder cannot be told apart"
            )

    def warn_of_earlier_fits(self) -> None:
        """Say that the joules of other fits are in this one's figures."""
        if self._trainer.is_global_zero:
            _log.warning(
                "this EnergyMonitor holds the joules of an earlier fit, of another Trainer or model, and adds those of "
                "this fit: to measure it alone, give it a new EnergyMonitor"
            )

    def warn_of(self, failing: Iterable[DeviceId]) -> None:
        """Warn of each device whose last reading failed, the first time it does."""
        for device in failing:
            if device not in self._said:
                self._said.add(device)
                _log.warning(
                    "%s %s on %s cannot be read any more: its joules are missing from here on, "
                    "unless its counter comes back (energy/gaps, energy/coverage_ratio)",
                    device.kind,
                    device.uid,
                    device.host,
                )

    @contextlib.contextmanager
    def _never_ends_the_run(self, what: str) -> Iterator[None]:
        """Turn an error into a warning, the first time: a meter may fail, the training goes on."""
        try:
            yield
        except Exception as e:
            if what not in self._said:
                self._said.add(what)
                rank_zero_warn(f"{what} cannot be written: {type(e).__name__}: {e}")
