"""From two real Trainer runs to a report: what EnergyMonitor and the loggers leave is what the report reads."""

import json

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from typer.testing import CliRunner

from lightning_estdgm import DGMCallback, DGMConfig, EnergyMonitor
from lightning_estdgm.cli import app
from lightning_estdgm.config import Units
from lightning_estdgm.recipes import ByteGPT, StdlibText
from lightning_estdgm.tools.report import compare, read_run
from lightning_estdgm.tools.report._document import document

STEPS, EVERY = 40, 8


def fit(folder, logger, *callbacks, seed=0):
    """Train a small GPT, dense or with the callback, and give the monitor back."""
    text = folder.parent / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 400)
    torch.manual_seed(seed)
    monitor = EnergyMonitor(["cpu-estimate"], interval_s=0.05)
    Trainer(
        accelerator="cpu", max_steps=STEPS, logger=logger(folder.parent, name=folder.name), log_every_n_steps=4,
        val_check_interval=EVERY, check_val_every_n_epoch=None, num_sanity_val_steps=0, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks, monitor],
    ).fit(ByteGPT(32, 1, 2, 16, lr=1e-2), datamodule=StdlibText(16, 4, seed, 8, path=text))  # fmt: skip
    return monitor.summary()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A dense run logged by TensorBoard and an EST-DGM run logged to CSV: folders, and what the monitors said."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as environment, torch.random.fork_rng():
        environment.setenv("PL_GLOBAL_SEED", "0")  # where Lightning's seed_everything leaves the seed
        said = {
            "dense": fit(root / "dense", TensorBoardLogger),
            "dgm": fit(root / "dgm", CSVLogger, DGMCallback(DGMConfig(units=Units(size=16), backend="cpu"))),
        }
    return root, said


def test_the_joules_of_the_report_are_those_of_the_monitor(runs):
    root, said = runs
    comparison = compare([read_run(root / name) for name in said])
    for arm, energy in zip(comparison.arms, said.values(), strict=True):
        (run,) = arm.runs
        assert arm.kind == "estimated"
        assert run.joules == energy["total_joules"] > 0
        assert run.seconds == energy["seconds"]
        assert run.seed == 0
        assert run.budget.joules == pytest.approx(energy["total_joules"], rel=1e-5)  # TensorBoard keeps float32
        assert run.budget.seconds == pytest.approx(energy["seconds"], rel=1e-5)
    assert comparison.budget_steps == STEPS


def test_metric_and_joules_are_joined_at_the_same_step(runs):
    root, _ = runs
    comparison = compare([read_run(root / "dense")], "val/loss", 100.0)
    reached = comparison.arms[0].runs[0].reached
    assert reached.step == EVERY - 1  # the first validation
    run = read_run(root / "dense")
    logged = dict(zip(run.joules.steps.tolist(), run.joules.values.tolist(), strict=True))
    assert reached.joules == pytest.approx(logged[EVERY - 1])
    assert 0 < reached.joules < run.energy["total_joules"]


def test_phases_and_provenance_come_through(runs):
    root, said = runs
    doc = document(compare([read_run(root / name) for name in said]))
    tables = {table.title: table for table in (*doc.answers, *doc.results, *doc.provenance)}
    phases = [(row.head, row.cells[0]) for row in tables["By phase"].rows]
    assert phases[0] == ("dense", "train")
    assert [phase for arm, phase in phases if arm == "EST-DGM"][-3:] == ["exploration", "consolidation", "refinement"]
    method = {row.head: row.cells[1] for row in tables["The method"].rows}
    assert method["sparse operators ran"] == "yes"
    assert method["layers by backend"].startswith("cpu: ")
    ran = {row.head: row for row in tables["What ran"].rows}
    assert not ran["fingerprint"].differs
    assert not ran["precision"].differs
    assert ran["batch size"].cells == ("4", "4")
    assert not any("differ" in warning for warning in doc.warnings)


def test_the_command_makes_the_whole_report(runs, tmp_path):
    root, said = runs
    files = [tmp_path / f"report{suffix}" for suffix in (".html", ".json")]
    arguments = ["report", str(root / "dense"), str(root / "dgm"), *(f"--out={file}" for file in files)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    page, content = files[0].read_text(), json.loads(files[1].read_text())
    assert page.count("<svg ") == 2
    assert "Watts over time" not in page  # its joules are estimated
    assert content["runs"][1]["energy"]["total_joules"] == pytest.approx(said["dgm"]["total_joules"], rel=1e-6)
    assert content["runs"][1]["method"]["phases"] == ["exploration", "consolidation", "refinement"]
