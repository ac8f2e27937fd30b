"""Loggers that are run beside `DGMCallback` and `EnergyMonitor`, and readers of the files that they leave.

Libraries are imported when a logger of theirs is made or read.
"""

from __future__ import annotations

import csv
import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import loggers

Curves = dict[str, list[float]]
"""Values by metric, in the order in which they were logged."""


@dataclass(frozen=True)
class LoggerCase:
    """One row of the table of loggers.

    Attributes:
        name: title of the row.
        package: package that has to be installed, as it is imported.
        make: makes the logger, which keeps its files under a folder.
        read: returns what a finished logger's files hold.
        files: where those files are.

    """

    name: str
    package: str
    make: Callable[[Path], loggers.Logger]
    read: Callable[[Any, Path], Curves]
    files: str


def _curves(points: Iterator[tuple[str, float]]) -> Curves:
    curves: Curves = {}
    for name, value in points:
        curves.setdefault(name, []).append(float(value))
    return curves


def _read_csv(logger: Any, folder: Path) -> Curves:
    with Path(logger.log_dir, "metrics.csv").open() as file:
        return _curves((name, value) for row in csv.DictReader(file) for name, value in row.items() if value)


def _read_tensorboard(logger: Any, folder: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(logger.log_dir, size_guidance={SCALARS: 0})
    events.Reload()
    return _curves((name, point.value) for name in events.Tags()[SCALARS] for point in events.Scalars(name))


def _log_records(path: Path, block: int = 32768, header: int = 7) -> Iterator[bytes]:
    """Yield the records of a file in LevelDB's log format, which W&B and SwanLab write behind 7 bytes of their own."""
    content, at, parts = path.read_bytes(), 7, []
    while at + header <= len(content):
        if (left := block - at % block) < header:
            at += left  # no header fits into the rest of a block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts.append(content[at + header : at + header + length])
        at += header + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def _read_wandb(logger: Any, folder: Path) -> Curves:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    logger.experiment.finish()
    wandb.teardown()  # its service writes what is left
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    records = map(Record.FromString, _log_records(path))
    items = (item for record in records if record.HasField("history") for item in record.history.item)
    pairs = ((item.key or "/".join(item.nested_key), json.loads(item.value_json)) for item in items)
    return _curves((name, value) for name, value in pairs if isinstance(value, int | float))


def _make_mlflow(folder: Path) -> loggers.Logger:
    uri = f"sqlite:///{folder}/mlflow.db"  # mlflow 3.17 refuses folders, which are Lightning's default
    return loggers.MLFlowLogger("experiment", tracking_uri=uri)


def _read_mlflow(logger: Any, folder: Path) -> Curves:
    client = logger.experiment
    names = client.get_run(logger.run_id).data.metrics
    return {name: [point.value for point in client.get_metric_history(logger.run_id, name)] for name in names}


def _make_comet(folder: Path) -> loggers.Logger:
    import comet_ml

    place = {"offline_directory": str(folder), "api_key": "none"}
    logger = loggers.CometLogger(online=False, project="project", **place)
    # lightning 2.6.6 switches its own off where it is offline, so that it would keep nothing
    logger._experiment = comet_ml.OfflineExperiment(experiment_key=logger.version, project_name="project", **place)
    return logger


def _read_comet(logger: Any, folder: Path) -> Curves:
    logger.experiment.end()
    (path,) = folder.glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        messages = [json.loads(line) for line in archive.read("messages.json").splitlines()]
    metrics = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    return _curves((metric["metricName"], metric["metricValue"]) for metric in metrics)


def _make_aim(folder: Path) -> loggers.Logger:
    from aim.pytorch_lightning import AimLogger

    return AimLogger(repo=str(folder), experiment="experiment", log_system_params=False, system_tracking_interval=None)


def _read_aim(logger: Any, folder: Path) -> Curves:
    prefixes = {"train": "train_", "val": "val_", "test": "test_"}  # which its logger cuts off and keeps as context
    curves = {}
    for metric in logger.experiment.metrics():  # the finished run, opened again
        prefix = prefixes.get(metric.context.to_dict().get("subset"), "")
        curves[prefix + metric.name] = metric.dataframe().sort_values("step")["value"].astype(float).tolist()
    return curves


def _make_swanlab(folder: Path) -> loggers.Logger:
    from swanlab.integration.pytorch_lightning import SwanLabLogger

    return SwanLabLogger("project", mode="offline", log_dir=str(folder / "swanlog"), save_dir=folder)


def _read_swanlab(logger: Any, folder: Path) -> Curves:
    import swanlab
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    swanlab.finish()
    (path,) = folder.glob("swanlog/run-*/run-*.swanlab")
    records = map(Record.FromString, _log_records(path))
    return _curves((r.scalar.key, r.scalar.value.number) for r in records if r.HasField("scalar"))


LOGGERS = (
    LoggerCase(
        "CSVLogger",
        "lightning",
        lambda folder: loggers.CSVLogger(folder, "name"),
        _read_csv,
        "`metrics.csv`",
    ),
    LoggerCase(
        "TensorBoardLogger",
        "tensorboard",
        lambda folder: loggers.TensorBoardLogger(folder, "name"),
        _read_tensorboard,
        "`events.out.tfevents.*`",
    ),
    LoggerCase(
        "WandbLogger, offline",
        "wandb",
        lambda folder: loggers.WandbLogger(project="project", save_dir=folder, offline=True),
        _read_wandb,
        "`wandb/offline-run-*/run-*.wandb`",
    ),
    LoggerCase("MLFlowLogger, SQLite", "mlflow", _make_mlflow, _read_mlflow, "the database"),
    LoggerCase("CometLogger, offline", "comet_ml", _make_comet, _read_comet, "`<offline_directory>/*.zip`"),
    LoggerCase("AimLogger", "aim", _make_aim, _read_aim, "`.aim`"),
    LoggerCase("SwanLabLogger, offline", "swanlab", _make_swanlab, _read_swanlab, "`swanlog/run-*/run-*.swanlab`"),
)
