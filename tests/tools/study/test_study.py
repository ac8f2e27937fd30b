"""The study: a table that goes on where it stopped, what it says of its rows, and two real runs through the command."""

import itertools
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer
from rich.console import Console
from typer.testing import CliRunner

from lightning_estdgm.cli import app
from lightning_estdgm.tools.study._datasets import citation_graph, cluttered_digits
from lightning_estdgm.tools.study._figures import draw_study
from lightning_estdgm.tools.study._plans import PLANS, plan_named
from lightning_estdgm.tools.study._results_table import COLUMNS, ResultsTable, read_rows
from lightning_estdgm.tools.study._runner import run_study
from lightning_estdgm.tools.study._settings import LOW_DENSITY, SCALED, SCHEDULES
from lightning_estdgm.tools.study._study_arm import arms, baseline, distance
from lightning_estdgm.tools.study._study_run import StudyRun
from lightning_estdgm.tools.study._summary import markdown
from lightning_estdgm.tools.study._tasks import TASKS, task_named
from lightning_estdgm.tools.study._training import train
from lightning_estdgm.tools.study._variants import GroupHidden, LowRankCompanion, SeedSecondMoment, StudyGPT

RESULT = {
    "status": "ok",
    "val_loss": 1.5,
    "val_accuracy": 0.9,
    "flops_ratio": 0.3,
    "final_density": 0.1,
    "seconds": 10.0,
    "joules": 50.0,
    "energy_method": "estimated",
}


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_names_runs_that_can_be_made(plan):
    runs = plan_named(plan)
    assert runs
    for run in runs:
        callback = run.callback()
        assert (callback is None) == (run.method == "dense")
        if callback is not None and "block_size" in run.settings:
            size = run.settings["block_size"]
            assert callback.config.units.size == (tuple(size) if isinstance(size, list) else size)


def test_the_headline_compares_at_equal_steps_on_every_task():
    runs = plan_named("headline")
    for task in [task for task in TASKS if task.name not in ("wide", "medium")]:
        for method in ("dense", "est-dgm", "rigl", "set", "static"):
            seeds = {r.seed for r in runs if (r.task, r.method, r.length) == (task.name, method, 1.0)}
            assert len(seeds) >= 3, (task.name, method)


def test_settings_of_a_schedule_reach_it():
    settings = {"schedule.cycles": 2, "schedule.refinement": [0.2, 0.1, 0.5], "gamma": 0.5}
    config = StudyRun("gpt", "est-dgm", 1e-3, 3, 0.1, settings=settings).callback().config
    assert (config.schedule.cycles, config.schedule.refinement.start) == (2, 0.2)
    assert (config.update_rule.gamma, config.seed) == (0.5, 3)
    config = StudyRun("gpt", "est-dgm", 1e-3, 3, 0.1, settings={"include": ["head"]}).callback().config
    assert config.selection.include == ["head"]
    with pytest.raises(ValueError, match=r"settings: got \['selection.include'\], expected names without a dot"):
        StudyRun("gpt", "est-dgm", 1e-3, 3, 0.1, settings={"selection.include": ["head"]})


def test_a_table_knows_its_runs_again_and_leaves_out_a_line_that_was_cut_off(tmp_path):
    done = StudyRun("gpt", "rigl", 4e-3, 1, 0.1, 2.5, {"gamma": 0.0, "block_size": 1})
    table = ResultsTable(tmp_path / "new" / "t.csv")
    assert table.lacks([done, done]) == [done]
    table.add(done, RESULT)
    other = replace(done, seed=2)
    table.add(other, RESULT)
    text = table.path.read_text()
    table.path.write_text(text[: text.index("\n", text.index(",2,")) - 30])
    assert ResultsTable(table.path).lacks([done, other]) == [other]
    (row,) = read_rows(table.path)
    assert (row["lr"], row["length"], row["val_loss"], row["steps"]) == (4e-3, 2.5, 1.5, done.steps)
    table.path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected a table with columns"):
        ResultsTable(table.path)


def test_a_run_that_fails_ends_the_study_with_its_error(tmp_path):
    bad = StudyRun("tabular", "n:m", 1e-3, 0, 0.1, 0.02, {"block_size": 1, "m": 8})  # not n of 8
    later = [StudyRun("tabular", "dense", 1e-3, seed, length=0.02) for seed in range(8)]
    table = ResultsTable(tmp_path / "t.csv")
    with pytest.raises(ValueError, match="whole number of 8ths"):
        run_study([bad, *later], table, 1, Console(quiet=True))
    assert 0 < len(table.lacks(later)) < len(later)  # what was under way is written, what waited is not trained


def _rows(tmp_path, *entries):
    table = ResultsTable(tmp_path / "t.csv")
    for run, loss, accuracy in entries:
        cost = {"seconds": 10.0 * run.length, "joules": 40.0 * run.length}
        table.add(run, {**RESULT, **cost, "val_loss": loss, "val_accuracy": accuracy})
    return read_rows(table.path)


def test_distances_are_to_the_best_dense_rate(tmp_path):
    low_peak = {"block_size": 1, "gamma": 2.0, **SCHEDULES["low-peak"]}
    rows = _rows(
        tmp_path,
        (StudyRun("gpt", "dense", 1e-3, 0), math.log(4.0), math.nan),
        (StudyRun("gpt", "dense", 2e-3, 0), math.log(3.0), math.nan),
        (StudyRun("gpt", "dense", 2e-3, 0, length=0.3), math.log(2.0), math.nan),
        (StudyRun("gpt", "est-dgm", 2e-3, 0, 0.1, 2.0), math.log(3.3), math.nan),
        (StudyRun("gpt", "est-dgm", 2e-3, 1, 0.1, 2.0), math.log(3.6), math.nan),
        (StudyRun("digits", "dense", 2e-3, 0), 1.0, 0.98),
        (StudyRun("digits", "set", 2e-3, 0, 0.1, settings=SCALED), 1.0, 0.95),
        (StudyRun("digits", "est-dgm", 2e-3, 0, 0.1, 0.8, low_peak), 1.0, 0.95),
        (StudyRun("digits", "est-dgm", 2e-3, 0, 0.1, settings={"block_size": 64, **LOW_DENSITY}), 1.0, 0.95),
    )
    found = arms(rows)
    dense = baseline(found, "gpt")
    assert (dense.lr, dense.length) == (2e-3, 1.0)
    sparse = next(arm for arm in found if arm.method == "est-dgm")
    assert distance(sparse, dense) == pytest.approx(15.0, abs=0.01)
    assert sparse.flops == pytest.approx(0.6)
    digits = next(arm for arm in found if arm.method == "set")
    assert distance(digits, baseline(found, "digits")) == pytest.approx(3.0, abs=1e-6)
    text = markdown(rows)
    assert "| est-dgm 2x steps | 0.1 | 0.002 | 2 | 3.4500 ± 0.2121 | +15.00 | 0.60 | 2.00 | 2.00 |" in text
    assert "Joules are estimated." in text
    assert "| set with scaled steps |" in text
    assert "| est-dgm low-peak gamma=2.0 0.8x steps |" in text
    assert "| est-dgm block_size=64 low-density |" in text
    draw_study(rows, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 10_000


def test_generated_data_is_the_same_each_time_and_as_described():
    first, second = cluttered_digits(50, 20), cluttered_digits(50, 20)
    assert torch.equal(first[0][0], second[0][0])
    assert first[0][0].shape == (50, 1, 16, 16)
    adjacency, features, label = citation_graph(nodes=300)
    assert torch.allclose(adjacency.to_dense(), adjacency.to_dense().t())
    off = adjacency.coalesce().indices()
    off = off[:, off[0] != off[1]]
    same = (label[off[0]] == label[off[1]]).float().mean()
    assert 0.7 < same < 0.95
    assert (features.sum(1) <= 18).all()


@pytest.mark.parametrize("name", [task.name for task in TASKS])
def test_each_task_trains_dense_and_sparse(name):
    length = 8 / task_named(name).steps
    dense = train(StudyRun(name, "dense", 1e-3, 0, length=length))
    settings = {"block_size": 1, "schedule.update_every": 2}
    sparse = train(StudyRun(name, "est-dgm", 1e-3, 0, 0.1, length, settings))
    assert math.isfinite(dense["val_loss"])
    assert dense["flops_ratio"] == 1.0
    assert sparse["status"] == "ok"
    assert sparse["final_density"] == pytest.approx(0.1, abs=0.01)
    assert 0.2 < sparse["flops_ratio"] < 0.8
    assert math.isnan(dense["val_accuracy"]) == (task_named(name).metric == "loss")


GPT = {"task": "gpt", "method": "est-dgm", "lr": 1e-3, "seed": 0, "density": 0.1, "length": 16 / 1500}
EVERY_TWO = {"block_size": 1, "schedule.update_every": 2}


def test_a_companion_starts_as_nothing_and_counts_its_flops():
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 4, bias=False)
    both, x = LowRankCompanion(linear, 2), torch.randn(3, 6)
    assert torch.equal(both(x), linear(x))
    torch.nn.init.ones_(both.up.weight)
    assert torch.allclose(both(x), linear(x) + both.down(x).sum(1, keepdim=True))
    plain = train(StudyRun(**GPT, settings=EVERY_TWO))
    more = train(StudyRun(**GPT, settings={**EVERY_TWO, "model.companion_rank": 8, "exclude": ["*.down", "*.up"]}))
    # 8 (in + out) weights beside in * out of each layer: 4 of 96 x 96 and 2 of 384 x 96 in each block, and the head
    added = 4 * (4 * 8 * 192 + 2 * 8 * 480) / (12 * 4 * 96**2 + 96 * 256)
    assert more["flops_ratio"] == pytest.approx(plain["flops_ratio"] + added, rel=1e-3)


def test_a_teacher_is_the_network_at_the_end_of_exploration_and_counts_its_forward(monkeypatch):
    seen = []
    plain_loss = StudyGPT.loss

    def loss(self, batch):
        seen.append((self.training, self.taught_steps, self.teacher_density, len(self.teacher)))
        return plain_loss(self, batch)

    monkeypatch.setattr(StudyGPT, "loss", loss)
    taught = train(StudyRun(**GPT, settings={**EVERY_TWO, "with.distill": {"share": 0.3}}))
    steps = [entry[1:] for entry in seen if entry[0]]
    assert len(steps) == 16
    assert [entry[2] for entry in steps] == [0, 0] + 14 * [1]  # exploration is 0.15 of 16 steps
    assert steps[-1][1] == pytest.approx(0.6, abs=0.11)  # the density of exploration, not of what comes next
    plain = train(StudyRun(**GPT, settings=EVERY_TWO))
    assert taught["flops_ratio"] == pytest.approx(plain["flops_ratio"] + 14 / 16 * steps[-1][1] / 3, rel=1e-3)
    assert taught["val_loss"] != plain["val_loss"]


def test_grouping_hidden_units_changes_no_output(monkeypatch):
    seen = {}
    act = GroupHidden.act

    def compared(self, trainer, module):
        x = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
        before, rows = module(x), module.blocks[0].fc.weight.norm(dim=1).clone()
        act(self, trainer, module)
        seen["same"] = torch.allclose(module(x), before, atol=1e-5)
        seen["moved"] = not torch.equal(module.blocks[0].fc.weight.norm(dim=1), rows)
        fc, out = module.blocks[0].fc.weight, module.blocks[0].out.weight
        seen["sorted"] = (fc.norm(dim=1) * out.norm(dim=0)).diff().max() <= 1e-6

    monkeypatch.setattr(GroupHidden, "act", compared)
    train(StudyRun(**GPT, settings={**EVERY_TWO, "schedule.warmup": 0.25, "with.group_hidden": {}}))
    assert seen == {"same": True, "moved": True, "sorted": True}


def test_grown_weights_get_their_layers_second_moment():
    seeds = SeedSecondMoment()
    model, dgm = StudyRun(**GPT, settings=EVERY_TWO).model(), StudyRun(**GPT, settings=EVERY_TWO).callback()
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            mask = dgm.controller.masks()["blocks.0.fc"]
            moment = trainer.optimizers[0].state[module.blocks[0].fc.weight]["exp_avg_sq"]
            seen.append((mask, (moment[mask.view_as(moment)] > 0).all().item()))

    trainer = Trainer(
        max_steps=8,
        callbacks=[dgm, seeds, Look()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(model, datamodule=task_named("gpt").data(0))
    assert any((later[0] & ~earlier[0]).any() for earlier, later in itertools.pairwise(seen))
    assert all(full for _, full in seen)


def test_the_command_trains_what_the_table_lacks(tmp_path):
    arguments = ["study", "--preset", "quick", "--out", str(tmp_path), "--jobs", "1"]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    rows = read_rows(tmp_path / "quick.csv")
    assert [row["method"] for row in rows] == ["dense", "est-dgm"]
    assert all(tuple(row)[: len(COLUMNS)] == COLUMNS for row in rows)
    before = (tmp_path / "quick.csv").read_bytes()
    again = CliRunner().invoke(app, arguments)
    assert "2 of 2 runs are in" in again.output
    assert (tmp_path / "quick.csv").read_bytes() == before
    assert "est-dgm" in (tmp_path / "quick.md").read_text()


KILLED = """
import os, signal, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from lightning_estdgm.tools.study._runner import _prepare

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_prepare, initargs=(1,))
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_study_that_is_killed(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as study:
        worker = int(study.stdout.readline())
        assert _runs(worker)
        study.wait()
    deadline = time.monotonic() + 30
    while _runs(worker):
        assert time.monotonic() < deadline, f"worker {worker} outlived its study"
        time.sleep(0.1)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_bad_names_are_refused(tmp_path):
    for arguments, told in (
        (["--preset", "no"], "unknown preset 'no', expected one of: headline"),
        (["--task", "no"], "unknown task 'no', expected one of: gpt"),
    ):
        result = CliRunner().invoke(app, ["study", "--out", str(tmp_path), *arguments])
        assert result.exit_code == 2
        assert told in " ".join(result.output.replace("│", " ").split())
