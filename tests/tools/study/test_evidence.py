"""The preset ``evidence``: real runs on tiny files in the published layouts, and what is said of missing ones."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from helpers.recipe_data import idx_images, planetoid, wikitext
from lightning_estdgm import DGMCallback
from lightning_estdgm.cli import app
from lightning_estdgm.tools.study import (
    _contender,
    _costing,
    _evidence_plan,
    _evidence_report,
    _session,
    _standing,
    _tasks,
)
from lightning_estdgm.tools.study._evidence_plan import EVIDENCE, contenders
from lightning_estdgm.tools.study._plans import plan_named, runs_named
from lightning_estdgm.tools.study._ramp import RampGrown
from lightning_estdgm.tools.study._results_table import read_rows
from lightning_estdgm.tools.study._study_run import StudyRun
from lightning_estdgm.tools.study._tasks import task_named
from lightning_estdgm.tools.study._training import step_flops, train

pytest.importorskip("torch_geometric")


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "data"
    for name in ("cora", "citeseer"):
        planetoid(folder / "planetoid", name) if name == "cora" else _also(folder / "planetoid", name, tmp_path)
    idx_images(folder / "fashion-mnist", train=5100)
    source = wikitext(tmp_path / "text")
    (folder / "wikitext-2").mkdir()
    for part in ("valid", "test"):
        text = (source / f"wiki.{part}.tokens").read_bytes()
        (folder / "wikitext-2" / f"wiki.{part}.tokens").write_bytes(text * 10)
    monkeypatch.setenv("ESTDGM_DATA", str(folder))
    return folder


def _also(folder: Path, name: str, scratch: Path) -> None:
    other = planetoid(scratch / "other", name)
    for file in (other / "raw").iterdir():
        shutil.copy(file, folder / "raw" / file.name)


def few_images(seed: int) -> LightningDataModule:
    from lightning_estdgm.recipes import IdxImages
    from lightning_estdgm.tools.study._data_folders import data_folder

    return IdxImages(data_folder("fashion-mnist"), batch_size=8, seed=seed, train_images=64)


@pytest.mark.parametrize("task", ["cora-gcn", "citeseer-gat", "fashion", "wikitext"])
def test_every_contender_trains_on_published_data(task, data, monkeypatch):
    own = task_named(task)
    if task == "fashion":
        small = replace(own, data=few_images)
        monkeypatch.setattr(_tasks, "ALL_TASKS", tuple(small if t is own else t for t in _tasks.ALL_TASKS))
    found = {}
    everyone = {each.name: each for each in contenders(task)}
    names = everyone if task == "cora-gcn" else ["dense", list(everyone)[1], "EST-DGM 4x1, rising", "SMET"]
    names = [*names, "EST-DGM 4x4, cycle"] if task == "fashion" else names
    for contender in (everyone[name] for name in names):
        result = found[contender.name] = train(contender.run(1e-3, 0, 10 / own.steps))
        assert result["status"] == "ok", contender.name
        assert math.isnan(result["test_accuracy"]) == (not own.is_tested)
    dense = found["dense"]
    assert dense["flops_ratio"] == 1.0
    for name, result in found.items():
        if name != "dense":
            assert result["served_weights"] < dense["served_weights"], name
            assert result["flops"] == pytest.approx(result["flops_ratio"] * dense["flops"])
        if name.startswith("small"):
            assert result["final_density"] == 1.0
            assert result["flops_ratio"] < 0.45


def test_flops_of_a_dense_step_are_those_that_the_masks_count(data):
    run = StudyRun("cora-gat", "static", 1e-3, 0, 1.0, 2 / 400, {"block_size": 1})
    task, callback, seen = task_named(run.task), run.callback(), {}

    class Look(Callback):
        def on_train_end(self, trainer, module):
            seen.update(callback.controller.flops)

    source = task.data(0)
    Trainer(
        max_steps=2, callbacks=[callback, Look()], logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    ).fit(run.model(), source)  # fmt: skip
    assert seen["dense"] == 2 * step_flops(run.model(), source.graph)


def invoke(*arguments: str):
    result = CliRunner().invoke(app, ["study", "--preset", "evidence", "--jobs", "1", *arguments])
    return result, " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def few(monkeypatch):
    """The plan cut down to dense on two tasks, with one seed each."""
    plan = [each for each in EVIDENCE if each.name == "dense" and each.task in ("cora-gcn", "wikitext")]
    short = tuple(replace(each, choice_seeds=(100,), choice_length=0.02, lengths=(0.02,)) for each in plan)
    monkeypatch.setattr(_evidence_plan, "EVIDENCE", short)
    monkeypatch.setattr(_contender, "SEEDS", (0,))
    return short


def test_the_command_goes_on_round_by_round_and_leaves_out_what_has_no_data(data, few, tmp_path):
    shutil.rmtree(data / "wikitext-2")
    out = tmp_path / "out"
    first, told = invoke("--out", str(out), "--data", str(data), "--minutes", "0")
    assert first.exit_code == 0, first.output
    assert "wikitext: left out. data: got" in told
    assert "Salesforce/wikitext" in told, "where to get it"
    assert "3 runs, about 0 min with 1 at a time (cora-gcn 0 min)" in told
    table = out / "evidence.csv"
    assert 0 < len(read_rows(table)) <= 3, "no run begins after the time"
    second, _ = invoke("--out", str(out), "--data", str(data))
    assert second.exit_code == 0, second.output
    reported = [row for row in read_rows(table) if row["seed"] == 0]
    assert len(reported) == 2, "its length, and that of a quarter of the FLOPs"
    before = table.read_bytes()
    command = reported[0]["command"].split()
    assert command[:4] == ["estdgm", "study", "--preset", "evidence"]
    again, _ = invoke("--out", str(out), "--data", str(data), *command[4:])
    assert again.exit_code == 0, again.output
    (row,) = read_rows(out / "evidence-again.csv")
    assert (row["key"], row["val_loss"]) == (reported[0]["key"], reported[0]["val_loss"])
    assert table.read_bytes() == before


def test_a_quiet_machine_tells_what_each_contender_costs_to_train_and_to_serve(data, few, tmp_path, monkeypatch):
    monkeypatch.setattr(_costing, "SERVING_S", 0.1)
    plan = [replace(few[0], lengths=(1.0,)), next(each for each in EVIDENCE if each.name == "SET")]
    short = tuple(replace(each, choice_seeds=(100,), choice_length=0.02, budget=1.0) for each in plan)
    monkeypatch.setattr(_evidence_plan, "EVIDENCE", short)
    monkeypatch.setattr(_evidence_report, "EVIDENCE", short)
    monkeypatch.setattr(_standing, "SEEDS", (0,))
    out = tmp_path / "out"
    done, told = invoke("--out", str(out), "--data", str(data))
    assert done.exit_code == 0, done.output
    assert "joules are not run" in told
    done, told = invoke("--out", str(out), "--data", str(data), "--quiet")
    assert done.exit_code == 0, done.output
    dense, sparse = read_rows(out / "evidence-costs.csv")
    assert (dense["method"], sparse["method"]) == ("dense", "set")
    for row in (dense, sparse):
        assert (row["seed"], row["steps"]) == (0, 4)
        assert row["joules"] > 0
        assert row["served_joules"] > 0
    assert "joules are estimated" in told
    assert "| 100.0 % | 1.00 |" in told, "weights and joules served of dense, over its own"
    again, _ = invoke("--out", str(out), "--data", str(data), "--quiet")
    assert len(read_rows(out / "evidence-costs.csv")) == 2, again.output
    wrong = CliRunner().invoke(app, ["study", "--preset", "quick", "--out", str(tmp_path), "--quiet"])
    assert wrong.exit_code == 2
    assert "quiet: got the preset quick, expected evidence" in " ".join(wrong.output.replace("│", " ").split())


def test_without_any_data_nothing_is_trained(few, tmp_path):
    result, told = invoke("--out", str(tmp_path), "--data", str(tmp_path / "none"))
    assert result.exit_code == 2
    assert "no task has its data: give their folder by --data" in told
    assert "https://github.com/kimiyoung/planetoid" in told
    result, told = invoke("--out", str(tmp_path), "--run", "nothing")
    assert result.exit_code == 2
    assert "run: got 'nothing', expected the name of a run or arm" in told
    result = CliRunner().invoke(app, ["study", "--preset", "quick", "--out", str(tmp_path), "--run", "x"])
    assert "expected the name of a run or arm in the plan quick" in " ".join(result.output.replace("│", " ").split())


def test_the_report_of_an_empty_table_names_all_that_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(_session, "COMMITTED", tmp_path / "none")
    result, told = invoke("--out", str(tmp_path), "--report-only")
    assert result.exit_code == 0, result.output
    assert told.count("Not run yet.") == 3
    assert "`wikitext`: all" in told


def test_an_arm_is_asked_for_by_the_name_of_its_reported_seeds():
    dense = EVIDENCE[0]
    ids = {run.id: run for run in dense.choosing(())}
    name = next(iter(ids))
    assert runs_named("evidence", [name]) == [ids[name]]
    reference = plan_named("references")[1]
    assert runs_named("references", [reference.id]) == [reference]
    assert [run.seed for run in runs_named("references", [reference.arm_id])] == list(range(10))
    assert dense.run(0.01, 0, 1.0).arm_id == dense.run(0.01, 2, 1.0).arm_id != dense.run(0.02, 0, 1.0).arm_id
    assert dense.run(0.01, 2, 1.0).id == f"{dense.run(0.01, 0, 1.0).arm_id}-2"


class OneWeight(LightningModule):
    """A matrix whose every step by SGD at rate 1 is -1."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8, bias=False)
        self.head = torch.nn.Linear(8, 1, bias=False)

    def training_step(self, batch, batch_idx):
        return self.layer.weight.sum() + 0.0 * self.head(self.layer(batch)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def train_dataloader(self):
        return DataLoader(torch.ones(14, 8), batch_size=1)


def test_grown_weights_take_rising_parts_of_their_first_steps():
    seen = []
    dgm = DGMCallback.from_preset("set", density=0.5, update_every=6, units={"size": 1})

    class Look(Callback):
        def on_train_batch_start(self, trainer, module, *_):
            seen.append((dgm.controller.masks()["layer"].clone(), module.layer.weight.detach().clone()))

    Trainer(
        max_steps=14, callbacks=[RampGrown(4), dgm, Look()], logger=False, enable_checkpointing=False,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
    ).fit(OneWeight())  # fmt: skip
    masks = [mask for mask, _ in seen]
    first = next(i for i in range(1, len(masks)) if (masks[i] & ~masks[i - 1]).any())
    grown = masks[first] & ~masks[first - 1]
    steps = [(b[1] - a[1])[grown] for a, b in zip(seen[first:], seen[first + 1 :], strict=False)][:4]
    for step, part in zip(steps, (0.25, 0.5, 0.75, 1.0), strict=True):
        torch.testing.assert_close(step, torch.full_like(step, -part))
    old = masks[first] & masks[first - 1]
    torch.testing.assert_close((seen[first + 1][1] - seen[first][1])[old], -torch.ones(int(old.sum())))
