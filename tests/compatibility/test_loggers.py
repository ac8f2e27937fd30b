"""Loggers that people use: every curve arrives in their files, and energy.json lies with the run's checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import Logger

from helpers.compatibility_loggers import LOGGERS, LoggerCase
from helpers.models import NO_VALIDATION_LOADER, ResumableLoader, TinyMLP, make_trainer
from helpers.runs import EPOCH_STEPS, SCHEDULE, STEPS
from lightning_estdgm import DGMCallback, DGMConfig, EnergyMonitor

OURS = ("dgm/", "energy/", "power/")
LOGGED = {
    "dgm/density",
    "dgm/phase",
    "dgm/churn",
    "dgm/explored",
    "dgm/flops_ratio",
    "dgm/flops_executed_ratio",
    "dgm/density/net.0",
    "dgm/density/net.2",
    "energy/total_joules_estimated",
    "energy/cpu_joules_estimated",
    "energy/phase/refinement_joules_estimated",
    "energy/joules_per_step_estimated",
    "energy/seconds",
    "energy/coverage_ratio",
    "energy/gaps",
    "power/cpu_watts_estimated",
}


class Kept(Logger):
    """Keeps the values that the Trainer's loggers are given, by metric."""

    name, version = "kept", "0"

    def __init__(self) -> None:
        super().__init__()
        self.curves: dict[str, list[float]] = {}

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.curves.setdefault(name, []).append(float(value))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.filterwarnings(NO_VALIDATION_LOADER)
@pytest.mark.filterwarnings("default")  # of libraries; what is ours to warn of has tests elsewhere
@pytest.mark.parametrize("case", LOGGERS, ids=lambda case: case.name)
def test_every_curve_arrives_and_the_file_of_joules_lies_with_the_checkpoints(
    case: LoggerCase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record: Callable[[str, str, Sequence[str]], None],
) -> None:
    pytest.importorskip(case.package)
    monkeypatch.chdir(tmp_path)
    seed_everything(0, verbose=False)
    logger, kept, monitor = case.make(tmp_path), Kept(), EnergyMonitor(["cpu-estimate"])
    trainer = make_trainer(
        DGMCallback(DGMConfig(schedule=SCHEDULE)),
        monitor,
        logger=[logger, kept],
        enable_checkpointing=True,
        max_epochs=STEPS // EPOCH_STEPS,
        log_every_n_steps=3,
        default_root_dir=tmp_path,
    )
    trainer.fit(TinyMLP(), ResumableLoader(TinyMLP.batches(EPOCH_STEPS)))

    ours = {name: values for name, values in kept.curves.items() if name.startswith(OURS)}
    assert ours.keys() >= LOGGED
    arrived = case.read(logger, tmp_path)
    assert arrived.keys() >= ours.keys() | {"train_loss"}
    for name, values in ours.items():
        assert arrived[name] == pytest.approx(values, rel=1e-6), name

    (file,) = tmp_path.rglob("energy*.json")
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert file == checkpoint.parents[1] / "energy.json"
    content = json.loads(file.read_text())
    assert (content["status"], content["energy"]["total_joules"]) == ("finished", monitor.total_joules)
    record("loggers", case.name, _cells(case, logger, file.parent.relative_to(tmp_path), len(ours)))


def _cells(case: LoggerCase, logger: Any, folder: Path, metrics: int) -> tuple[str, ...]:
    known = {str(logger.name): "<name>", str(logger.version): "<version>", f"version_{logger.version}": "version_<n>"}
    place = "/".join(known.get(part, part) for part in folder.parts)
    return (
        f"{case.package} {version(case.package)}",
        f"all {metrics}, every value",
        case.files,
        f"`{place}/energy.json`",
    )
