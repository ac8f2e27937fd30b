"""The demo end to end at toy size, its command and its configuration."""

import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from lightning_estdgm import DGMCallback, DGMConfig, EstDgm, Phase
from lightning_estdgm.cli import app
from lightning_estdgm.config import Units
from lightning_estdgm.tools.demo._arms import count_masked
from lightning_estdgm.tools.demo._demo_config import DemoConfig
from lightning_estdgm.tools.demo._records import RunRecord, StepLog
from lightning_estdgm.tools.demo._rival import rival_of
from lightning_estdgm.tools.demo._step_profile import profile_steps
from lightning_estdgm.tools.demo._sweep import run_sweep

STEPS, SEEDS = 100, 2
TINY = {"width": 64, "layers": 1, "heads": 2, "context": 32, "batch_size": 4, "val_windows": 8}


def tiny_config(tmp_path, **settings):
    return DemoConfig(**{**TINY, "steps": 20, "out": tmp_path, "dgm": DGMConfig(units=Units(size=16)), **settings})


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One small demo through the command line: what it printed, wrote, and where."""
    out = tmp_path_factory.mktemp("demo")
    knobs = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    command = ["demo", f"--steps={STEPS}", f"--seeds={SEEDS}", f"--out={out}", f"--json={out / 'sub' / 'numbers.json'}"]
    masks = [
        "--block-size=16",
        "--backend=cpu",
        "--profile-steps=2",
        "--lr-dense=0.004",
        "--lr-dgm=0.003",
        "--lr-small=0.005",
    ]
    before = torch.random.get_rng_state()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PL_GLOBAL_SEED", "77")  # something else's: the runs have seeds of their own
        result = CliRunner().invoke(app, [*command, *knobs, *masks], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert torch.equal(before, torch.random.get_rng_state())
    return out, result.output, json.loads((out / "sub" / "numbers.json").read_text())


def records_of(content):
    return [RunRecord.from_dict(run) for run in content["runs"]]


def test_the_runs_alternate_and_are_complete(demo):
    _, _, content = demo
    runs = records_of(content)
    assert [(run.mode, run.seed, run.lr) for run in runs] == [
        (mode, seed, lr) for seed in range(SEEDS) for mode, lr in (("dense", 0.004), ("dgm", 0.003), ("small", 0.005))
    ]
    for run in runs:
        columns, steps = vars(run.steps), len(run.steps)
        assert {name: len(column) for name, column in columns.items()} == dict.fromkeys(columns, steps)
        assert run.mode == "small" or steps == STEPS
        assert min(run.steps.wall_s) > 0
        assert run.steps.clock_s == sorted(run.steps.clock_s)
        assert run.steps.clock_s[-1] >= 0.99 * math.fsum(run.steps.wall_s)
        assert run.validation[-1].step == steps
        assert len(run.validation) >= 3
        assert run.validation[-1].loss < run.validation[0].loss < math.log(256)


def test_dense_and_dgm_saw_the_same_batches_and_began_with_the_same_weights(demo):
    _, _, content = demo
    dense, dgm, other = (
        run for run in records_of(content) if (run.mode, run.seed) != ("dgm", 1) and run.mode != "small"
    )
    assert dense.batches == dgm.batches != other.batches
    assert dense.initial == dgm.initial != other.initial
    digest = hashlib.blake2b(digest_size=16)
    data = DemoConfig(**TINY, steps=STEPS).data(seed=0)
    data.setup()
    for _, batch in zip(range(STEPS), data.train_dataloader(), strict=False):
        for part in batch:
            digest.update(part.to(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == dense.batches
    assert all(pair["same_batches"] and pair["same_initial_weights"] for pair in content["summary"]["pairs"])


def test_densities_and_phases_are_those_of_the_schedule(demo):
    _, _, content = demo
    schedule = EstDgm().resolve(STEPS)
    for run in records_of(content):
        if run.mode != "dgm":
            assert set(run.steps.density) == {1.0}
            assert set(run.steps.phase) == {"train"}
            assert not any(run.steps.observed)
            continue
        plans = [schedule(step) for step in range(STEPS)]
        assert run.steps.phase == [plan.phase for plan in plans]
        assert run.steps.density == pytest.approx([1.0] + [plan.density for plan in plans[1:]], abs=0.01)
        assert run.steps.observed == [plan.observe for plan in plans]
        assert run.steps.updated == [plan.update for plan in plans[1:]] + [False]
        assert [moment.phase for moment in run.masks] == ["exploration", "consolidation", "refinement"]
        assert [moment.density for moment in run.masks] == sorted((m.density for m in run.masks), reverse=True)


def test_nothing_is_left_outside_the_masks(demo):
    _, _, content = demo
    for run in (run for run in records_of(content) if run.mode == "dgm"):
        assert run.masked_weights == 12 * 64 * 64
        assert run.active_weights / run.masked_weights == pytest.approx(0.10, abs=0.005)
        assert run.nonzero_outside == 0
        assert {layer["backend"] for layer in run.layers if layer["masked"]} == {"cpu"}


def test_the_smaller_network_has_the_weights_and_the_joules_of_the_sparse_one(demo):
    _, output, content = demo
    runs = records_of(content)
    for sparse, small in zip(runs[1::3], runs[2::3], strict=True):
        assert sparse.served_weights == sparse.parameters - sparse.masked_weights + sparse.active_weights
        assert small.served_weights == small.parameters <= sparse.served_weights
        wider = DemoConfig(**{**TINY, "width": small.width + TINY["heads"]}, steps=STEPS)
        assert sum(p.numel() for p in wider.model(1e-3).parameters()) > sparse.served_weights
        assert len(small.steps) % 6 == 0
        assert all(0 < run.token_s < 1 for run in (sparse, small))
    numbers = content["summary"]["modes"]["small"]
    assert numbers["steps"]["values"] == [len(run.steps) for run in runs[2::3]]
    assert "Smaller dense" in output


@pytest.mark.parametrize(("spent", "steps"), [(60.0, 300), (1.0, 20), (None, 90)])
def test_the_smaller_network_gets_the_steps_that_joules_buy_or_seconds(tmp_path, monkeypatch, spent, steps):
    monkeypatch.setattr("lightning_estdgm.tools.demo._rival._cost_of_a_step", lambda config: (0.2, 0.1))
    config = tiny_config(tmp_path)
    log = StepLog(wall_s=[4.0, 4.0])
    run = RunRecord("dgm", 0, 1e-3, 64, 40_000, 1.0, log, [], "", "", {"train_joules": spent}, [], [], 10_000, 1000)
    its = rival_of(config, run)
    assert its.steps == steps
    assert its.width == 32  # 29,888 weights; the next, 34, has 32,436


def test_count_masked_finds_a_weight_outside(tmp_path):
    config = tiny_config(tmp_path)
    model, dgm = config.model(lr=1e-3), DGMCallback(config.dgm)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(max_steps=20, accelerator="cpu", callbacks=[dgm], limit_val_batches=0, **quiet).fit(model, config.data(0))
    total, active, outside = count_masked(model, dgm)
    assert (total, outside) == (12 * 64 * 64, 0)
    assert active == sum(int(mask.sum()) for mask in dgm.masks().values()) * 16 * 16
    row, column = (~dgm.masks()["blocks.0.fc"]).nonzero()[0].tolist()
    with torch.no_grad():
        model.blocks[0].fc.weight[16 * row + 3, 16 * column] = 1e-30
    assert count_masked(model, dgm) == (total, active, 1)


def test_the_json_says_how_it_was_made(demo):
    _, _, content = demo
    assert content["config"]["steps"] == STEPS
    assert content["config"]["dgm"]["units"]["size"] == 16
    assert content["config"]["dgm"]["schedule"]["refinement"]["end"] == 0.10
    environment = content["environment"]
    assert environment["torch"] in (torch.__version__, torch.__version__.partition("+")[0])  # of metadata, or its own
    assert environment["threads"] == torch.get_num_threads()
    assert environment["cpu"]
    assert content["data"]["source"] == "standard library"
    assert content["command"]


def test_the_summary_agrees_with_the_records(demo):
    _, output, content = demo
    runs, summary = records_of(content), content["summary"]
    for run, numbers in zip(runs, summary["runs"], strict=True):
        assert numbers["perplexity"] == pytest.approx(math.exp(run.validation[-1].loss), rel=1e-5)
        assert numbers["train_s"] == pytest.approx(math.fsum(run.steps.wall_s), rel=1e-5)
        assert numbers["mean_density"] == pytest.approx(np.mean(run.steps.density), rel=1e-5)
        assert numbers["train_j"] == pytest.approx(run.energy["train_joules"], rel=1e-5)
        assert numbers["train_s"] + numbers["setup_s"] == pytest.approx(numbers["run_s"], rel=1e-5)
    losses = [run.validation[-1].loss for run in runs if run.mode == "dgm"]
    loss = summary["modes"]["dgm"]["val_loss"]
    assert loss["mean"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert loss["std"] == pytest.approx(np.std(losses, ddof=1), rel=1e-3)
    assert f"{loss['mean']:.4f} ± {loss['std']:.4f}" in output  # of dense and EST-DGM
    assert f"{loss['mean']:.3f} ± {loss['std']:.3f}" in output  # of all three
    for phase in ("exploration", "consolidation", "refinement"):
        assert f"step in {phase}, ms" in output


def test_energy_names_its_source_and_an_estimate_says_so(demo):
    _, output, content = demo
    energy = content["runs"][0]["energy"]
    if energy["method"] == "none":
        pytest.skip("no energy source here")
    assert all(source["name"] in " ".join(output.split()) for source in energy["sources"])
    assert ("ESTIMATED" in output) == (energy["method"] in ("estimated", "mixed"))


def test_the_profile_accounts_for_the_whole_step(demo):
    _, _, content = demo
    for part in content["profile"].values():
        assert math.fsum(part["share"].values()) == pytest.approx(1.0)
        assert math.fsum(part["ms"].values()) == pytest.approx(part["wall_ms"])
        assert min(part["ms"].values()) >= 0
        assert all(part["ms"][name] > 0 for name in ("linear products", "attention", "optimizer", "other"))
    assert content["profile"]["dense"]["ms"]["masks"] == 0
    assert content["profile"]["dgm"]["ms"]["masks"] > 0


def test_the_png_is_a_picture(demo):
    out, _, content = demo
    pixels = imread(out / "demo.png")
    assert Path(content["files"]["png"]) == out / "demo.png"
    assert pixels.shape[0] > 800
    assert pixels.shape[1] > 1200
    quarters = [half for row in np.array_split(pixels, 2) for half in np.array_split(row, 2, axis=1)]
    assert all(len(np.unique(quarter[..., :3].reshape(-1, 3), axis=0)) > 50 for quarter in quarters)


def test_tensorboard_has_the_masks_and_the_joules(demo):
    _, _, content = demo
    for folder in Path(content["files"]["tensorboard"]).iterdir():
        events = EventAccumulator(str(folder)).Reload()
        tags = set(events.Tags()["scalars"])
        assert {"train/loss", "val/loss"} <= tags
        assert any(tag.startswith("energy/") for tag in tags)
        assert ("dgm/density" in tags) == folder.name.startswith("dgm-")
        if folder.name.startswith("dgm-"):
            assert events.Scalars("dgm/density")[-1].value == pytest.approx(0.10, abs=0.005)
    assert len(list(Path(content["files"]["tensorboard"]).iterdir())) == 3 * SEEDS


def test_the_report_is_made_from_the_same_runs(demo):
    out, output, content = demo
    assert content["files"]["report"] == str(out / "report.html")
    assert str(out / "report.html") in output.replace("\n", "")
    page = (out / "report.html").read_text()
    assert "val/loss" in page
    assert page.count("<svg ") == 2  # no watts: estimated ones are no curve
    for run in (run for run in content["runs"] if run["mode"] != "small"):  # it has other steps
        assert f"{run['mode']}-seed{run['seed']}-lr{run['lr']:g}" in page
    assert "not independent" not in page  # the seeds are known, and differ


def test_a_sweep_names_the_best_rate_of_each_mode(tmp_path):
    rates = [1e-4, 3e-3, 1e-3]
    knobs = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    command = ["demo", "--sweep", "--steps=20", f"--out={tmp_path}", "--block-size=16", "--backend=dense", *knobs]
    result = CliRunner().invoke(app, [*command, *(f"--lr={rate}" for rate in rates)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "sweep.json").read_text())
    for mode in ("dense", "dgm", "small"):
        losses = {run["lr"]: run["val_loss"] for run in content["sweep"] if run["mode"] == mode}
        assert sorted(losses) == sorted(rates)
        assert content["best"][mode]["lr"] == min(losses, key=losses.get)
        assert content["best_is_at_an_end"][mode] == (content["best"][mode]["lr"] != 1e-3)
        assert f"{content['best'][mode]['val_loss']:.4f}" in result.output


def test_a_run_of_the_demo_repeats_itself(tmp_path):
    config = tiny_config(tmp_path, dgm=DGMConfig(units=Units(size=16), backend="dense"))
    rates = {mode: [1e-3, 2e-3, 3e-3] for mode in ("dense", "dgm")}
    once, again = (run_sweep(config, rates)["sweep"] for _ in range(2))
    assert [run["val_loss"] for run in once] == [run["val_loss"] for run in again]
    assert len({run["val_loss"] for run in once}) == 6


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=19"], "steps: got 19, expected at least 20"),
        (["--seeds=0"], "seeds: got 0, expected at least 1"),
        (["--width=100"], "width: got 100, expected a multiple of heads=8"),
        (["--lr-dgm=0"], "lr: got 0.0, expected a positive number"),
        (["--text=no/such/file"], "path: got 'no/such/file', expected an existing text file"),
        (["--text=tests/conftest_that_is_not_there.py"], "expected an existing text file"),
        (["--block-size=17"], "units.size must be"),
        (["--block-size=big"], "units.size must be"),
        (["--backend=magic"], "magic"),
        (["--distribution=none"], "distribution must be one of"),
        (["--json=."], "expected a file name"),
        (["--lr=0.001"], "expected together with --sweep"),
        (["--sweep", "--lr=0.001", "--lr=0.002", "--lr=0.002"], "expected at least three different learning rates"),
        (["--sweep", "--lr=0.001", "--lr=0.002", "--lr=-1"], "lr: got -1.0, expected a positive number"),
        (["--steps=many"], "valid integer"),
    ],
)
def test_bad_input_exits_with_2_and_says_what_was_expected(arguments, message):
    result = CliRunner().invoke(app, ["demo", *arguments], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_an_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="which is a file; expected a folder or a free name"):
        tiny_config(tmp_path, out=tmp_path / "file")


def test_a_sweep_needs_three_rates_a_mode(tmp_path):
    with pytest.raises(ValueError, match=r"learning rates of dgm: got \[0.001\], expected at least three"):
        run_sweep(tiny_config(tmp_path), {"dense": [1e-3, 2e-3, 3e-3], "dgm": [1e-3]})


def test_the_help_names_the_true_defaults():
    masks = DemoConfig().dgm
    defaults = vars(DemoConfig()) | {
        "block_size": masks.units.size,
        "distribution": masks.units.distribution,
        "backend": masks.backend,
    }
    named = {}
    for parameter in typer.main.get_command(app).commands["demo"].params:
        if found := re.search(r"\(default: ([\w./-]+)\)", parameter.help or ""):
            named[parameter.name] = found[1]
    assert len(named) == 16
    assert named == {name: str(defaults[name]) for name in named}


def test_version_is_printed():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip()


def test_an_error_in_training_is_not_taken_for_bad_input(tmp_path, monkeypatch):
    class Failing(Callback):
        def on_train_start(self, trainer, pl_module):
            raise ValueError("from the training")

    monkeypatch.setattr("lightning_estdgm.tools.demo._arms.Recorder", lambda *_: Failing())
    knobs = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    with pytest.raises(ValueError, match="from the training"):
        CliRunner().invoke(app, ["demo", "--steps=20", f"--out={tmp_path}", *knobs], catch_exceptions=False)


# Configuration and profile --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "interval"), [(600, 100), (601, 601), (20, 4), (1000, 200), (700, 100)])
def test_the_last_step_is_always_validated(tmp_path, steps, interval):
    assert tiny_config(tmp_path, steps=steps).val_interval() == interval
    assert steps % interval == 0


def test_the_profile_can_be_of_any_schedule_of_phases(tmp_path):
    schedule = EstDgm(exploration=Phase(1.0, 0.9, 5), consolidation=Phase(0.5, 0.5, 5), refinement=Phase(0.3, 0.2, 10))
    config = tiny_config(
        tmp_path, dgm=DGMConfig(schedule=schedule, units=Units(size=16), backend="cpu"), profile_steps=1
    )
    assert profile_steps(config, "dgm")["steps"] == 1
    assert replace(config, profile_steps=0).profile_steps == 0
