"""A run's row in TensorBoard's table of hyperparameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.plugins.hparams import api_pb2, summary

_FIRST = {"differs": True} if "differs" in api_pb2.HParamInfo.DESCRIPTOR.fields_by_name else {}
"""How a hyperparameter gets one of the columns that TensorBoard shows before the user asks for more."""


def write_hparams(
    trainer: Trainer, logger: TensorBoardLogger, method: Mapping[str, Any] | None, metrics: Iterable[str]
) -> None:
    """Write the row: method, unit, density and rate beside the logged hyperparameters, with columns for metrics.

    TensorBoard keeps the first row of a run. Where the module saves its hyperparameters, that is Lightning's own, unless
    the logger has ``default_hp_metric=False``.

    Args:
        trainer: Trainer at the end of a fit.
        logger: logger of the run.
        method: `run_summary` of the callback with the method; None for a dense run.
        metrics: tags of further columns beside the metrics that the module has logged.

    """
    own = [name for name in trainer.callback_metrics if name in trainer.logged_metrics]
    saved = {name: _plain(value) for name, value in logger.hparams.items()}
    ours = hyperparameters(trainer, method)
    infos = [api_pb2.HParamInfo(name=name, type=_type(value), **_FIRST) for name, value in ours.items()]
    infos += [api_pb2.HParamInfo(name=name, type=_type(value)) for name, value in saved.items() if name not in ours]
    # The values of these columns are the last ones of the curves.
    columns = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in dict.fromkeys([*own, *metrics])]
    writer = logger.experiment._get_file_writer()
    writer.add_summary(summary.experiment_pb(infos, columns))
    writer.add_summary(summary.session_start_pb(saved | ours))
    writer.add_summary(summary.session_end_pb(api_pb2.STATUS_SUCCESS))


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


def _type(value: Any) -> Any:
    if isinstance(value, bool):
        return api_pb2.DATA_TYPE_BOOL
    return api_pb2.DATA_TYPE_FLOAT64 if isinstance(value, (int, float)) else api_pb2.DATA_TYPE_STRING


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
