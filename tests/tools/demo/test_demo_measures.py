"""Numbers of the demo from the records of its runs, and their figure."""

import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from lightning_estdgm.tools._stats import spread
from lightning_estdgm.tools.demo._figures import _draw_loss, draw_demo
from lightning_estdgm.tools.demo._measures import compare_pair, mask_work, measure, phase_times, summarize, watts
from lightning_estdgm.tools.demo._records import RunRecord, StepLog, Validation, records
from lightning_estdgm.tools.demo._tables import steps_table
from lightning_estdgm.tools.report._finished_run import energy_label
from lightning_estdgm.tools.report._json_format import write_json


def log(**columns):
    count = len(columns["wall_s"])
    plain = {
        "clock_s": list(np.cumsum(columns["wall_s"])),
        "loss": [1.0] * count,
        "train_j": [None] * count,
        "total_j": [None] * count,
        "density": [0.5] * count,
        "phase": ["a"] * count,
        "observed": [False] * count,
        "updated": [False] * count,
    }
    return StepLog(**{**plain, **columns})


def record(mode, steps, loss=1.0, **more):
    validation = [Validation(step=len(steps), clock_s=steps.clock_s[-1], train_j=steps.train_j[-1], loss=loss)]
    plain = {
        "seed": 0,
        "lr": 1e-3,
        "width": 8,
        "parameters": 1,
        "setup_s": 0.5,
        "initial": "i",
        "batches": "b",
        "energy": {},
    }
    return RunRecord(**{**plain, "energy": {}, "mode": mode, "steps": steps, "validation": validation, **more})


def test_phase_times_are_medians_of_plain_steps():
    steps = log(
        wall_s=[1.0, 9.0, 2.0, 3.0, 0.5, 0.7],
        phase=["a", "a", "a", "a", "b", "b"],
        observed=[False, True, False, False, True, True],
        updated=[False, True, False, False, False, False],
    )
    times = phase_times(steps)
    assert (times["a"]["steps"], times["a"]["plain_steps"], times["a"]["median_s"]) == (4, 3, 2.0)
    assert times["a"]["mean_s"] == 3.75
    assert times["b"]["median_s"] is None
    assert times["b"]["mean_s"] == pytest.approx(0.6)


def test_mask_work_is_what_marked_steps_take_more():
    steps = log(
        wall_s=[1.0, 1.5, 1.75, 1.0, 1.0],
        observed=[False, True, True, False, False],
        updated=[False, False, True, False, False],
    )
    work = mask_work(steps)
    assert work["observe_extra_s"] == 0.5
    assert work["update_extra_s"] == 0.25
    assert work["both_extra_s"] == 0.75
    assert work["total_s"] == 1.25
    assert work["share"] == pytest.approx(1.25 / 6.25)


def test_mask_work_is_told_as_a_whole_where_each_step_that_observes_updates():
    marks = [False, True, False, True, False]
    runs = []
    for mode in ("dense", "dgm"):
        seen = marks if mode == "dgm" else [False] * 5
        steps = log(wall_s=[1.0, 1.25, 1.0, 1.75, 1.0], observed=seen, updated=seen)
        runs.append(record(mode, steps, 1.0, energy={"train_joules": 1.0}))
    work = mask_work(steps)
    assert (work["observe_extra_s"], work["update_extra_s"], work["both_extra_s"]) == (None, None, 0.5)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(steps_table(summarize(runs), runs, None))
    text = console.export_text()
    assert re.search(r"a mask update and its observing step, ms\W+500\W", text)
    assert "an observing step takes more" not in text


def test_mask_work_is_unknown_without_plain_steps():
    work = mask_work(log(wall_s=[1.0, 1.0], observed=[True, True], updated=[True, True]))
    assert (work["observe_extra_s"], work["update_extra_s"], work["total_s"], work["share"]) == (None,) * 4


def test_compare_divides_the_right_way_round():
    dense = measure(record("dense", log(wall_s=[2.0, 2.0], phase=["train"] * 2), 1.0, energy={"train_joules": 40.0}))
    dgm = measure(record("dgm", log(wall_s=[1.5, 0.5]), 1.1, energy={"train_joules": 10.0}, batches="other"))
    against = compare_pair(dense, dgm)
    assert against["train_speedup"] == 2.0
    assert against["run_speedup"] == 4.5 / 2.5
    assert against["step_speedup"] == {"a": 2.0}
    assert against["joules_ratio"] == 0.25
    assert against["val_loss_difference"] == pytest.approx(0.1)
    assert against["perplexity_ratio"] == pytest.approx(math.exp(0.1))
    assert (against["same_batches"], against["same_initial_weights"]) == (False, True)


def test_joules_that_nobody_read_stay_unknown(tmp_path):
    runs = [record("dense", log(wall_s=[1.0] * 4)), record("dgm", log(wall_s=[1.0] * 4))]
    numbers = [measure(run) for run in runs]
    assert compare_pair(*numbers)["joules_ratio"] is None
    assert spread([1.0, None]) == {"mean": None, "std": None, "values": [1.0, None]}
    assert energy_label({}) == "no energy source on this machine"
    draw_demo(runs, tmp_path / "bare.png")
    assert imread(tmp_path / "bare.png").shape[0] > 800


def test_watts_add_up_to_the_joules():
    clock = [0.5 * i for i in range(1, 41)]
    joules = [10.0 * t if t < 10 else 100.0 + 30.0 * (t - 10) for t in clock]
    times, power = watts(clock, joules)
    width = times[1] - times[0]
    assert math.fsum(p * width for p in power) == pytest.approx(joules[-1] - joules[0])
    assert power[0] == pytest.approx(10.0)
    assert power[-1] == pytest.approx(30.0)
    assert watts(clock, [None] * 40) == ([], [])


def test_watts_do_not_take_a_total_read_earlier_for_idle_time():
    clock = [0.5 * i for i in range(1, 61)]
    _, power = watts(clock, [10.0 * (t // 3) * 3 + 5.0 for t in clock])
    assert power[2:] == pytest.approx([10.0] * len(power[2:]))


def test_json_is_strict_and_a_record_survives_it(tmp_path):
    run = record("dgm", log(wall_s=[1.0, 0.25]), masks=[])
    brackets = "a [1,  2] b"
    path = tmp_path / "deep" / "x.json"
    write_json({"runs": records([run]), "nan": math.nan, "path": Path("x"), "text": brackets}, path)
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["nan"] is None
    assert content["path"] == "x"
    assert content["text"] == brackets
    assert RunRecord.from_dict(content["runs"][0]) == run


def test_each_kind_of_run_stands_once_in_the_legends_however_many_seeds():
    runs = [
        record(mode, log(wall_s=[1.0] * 4, train_j=[1.0, 2.0, 3.0, 4.0]), seed=seed)
        for seed in (0, 1, 2)
        for mode in ("dense", "dgm")
    ]
    axes = Figure().add_subplot()
    _draw_loss(axes, runs, True, "J")
    labels = axes.get_legend_handles_labels()[1]
    assert sorted(labels) == ["Dense", "EST-DGM", "training, smoothed", "validation"]
