"""A run's row in TensorBoard's table of hyperparameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams


def write_hparams(
    trainer: Trainer, logger: TensorBoardLogger, method: Mapping[str, Any] | None, metrics: Iterable[str]
) -> None:
    """Write the row: method, unit, density and rate beside the logged hyperparameters, with columns for metrics.

    Those of the module that have one of these names keep it: then ours begins with ``estdgm/``.

    TensorBoard keeps the first row of a run. Where the module saves its hyperparameters, that is Lightning's own,
    unless the logger has ``default_hp_metric=False``.

    Args:
        trainer: Trainer at the end of a fit.
        logger: logger of the run.
        method: `run_summary` of the callback with the method; None for a dense run.
        metrics: tags of further columns beside the metrics that the module has logged.

    """
    own = [name for name in trainer.callback_metrics if name in trainer.logged_metrics]
    saved = {name: _plain(value) for name, value in logger.hparams.items()}
    ours = {f"estdgm/{k}" if k in saved else k: value for k, value in hyperparameters(trainer, method).items()}
    # The values of these columns are the last ones of the curves: here only their names count.
    experiment, start, end = hparams(saved | ours, dict.fromkeys([*own, *metrics], 0.0))
    _show_first(experiment, ours)
    writer = logger.experiment._get_file_writer()
    for summary in (experiment, start, end):
        writer.add_summary(summary)


def _show_first(experiment: Any, names: Iterable[str]) -> None:
    """Give hyperparameters the columns that TensorBoard shows before one asks for more: those marked as differing."""
    metadata = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(metadata.content)
    for info in data.experiment.hparam_infos:
        if info.name in names and "differs" in info.DESCRIPTOR.fields_by_name:  # from TensorBoard 2.16 on
            info.differs = True
    metadata.content = data.SerializeToString()


def hyperparameters(trainer: Trainer, method: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return method, unit, final density, and the learning rate before any schedule of the first parameter group."""
    sizes = (method or {}).get("block_sizes") or {}
    row = {
        "method": "dense" if method is None else method["name"],
        "unit": ", ".join("weight" if size == "1" else size for size in sizes) or "none",
        "density": 1.0 if method is None else method.get("final_density") or 1.0,
    }
    if trainer.optimizers:
        group = trainer.optimizers[0].param_groups[0]
        row["rate"] = float(group.get("max_lr", group.get("initial_lr", group["lr"])))
    return row


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
