"""Savings that may be stated of runs, and those that may not."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.run_files import DGM, falling, pair, read_runs, summary, write_arms, write_run
from lightning_estdgm.tools.report import compare, read_run
from lightning_estdgm.tools.report._curve import Curve
from lightning_estdgm.tools.report._finished_run import FinishedRun

# To the same target -------------------------------------------------------------------------------------------------


def test_energy_to_the_target_is_that_at_the_first_value_that_meets_it(tmp_path):
    comparison = compare(pair(tmp_path))
    assert (comparison.target.metric, comparison.target.value, comparison.target.mode) == ("val_loss", 2.0, "min")
    dense, dgm = (arm.runs[0] for arm in comparison.arms)
    assert (dense.reached.step, dense.reached.joules, dense.reached.seconds) == (99, 1000.0, 20.0)
    assert (dgm.reached.step, dgm.missed_before) == (79, 69)  # 5 - 4 * 7 / 9 is the first below 2
    assert dgm.reached.joules == pytest.approx(0.8 * 600)
    assert dgm.reached.seconds == pytest.approx(0.8 * 15)
    (contrast,) = comparison.contrasts
    assert contrast.reasons == ()
    assert contrast.at_target.share["mean"] == pytest.approx(1 - 480 / 1000)
    assert contrast.at_target.speedup["mean"] == pytest.approx(20 / 12)
    assert contrast.at_target.joules_kind == "measured"


def test_joules_between_two_log_entries_are_interpolated_and_never_beyond(tmp_path):
    runs = read_runs([write_run(tmp_path / "run", falling(2.0), every=20)])
    assert compare(runs, "val_loss", 4.0).arms[0].runs[0].reached.joules == pytest.approx(400.0)  # step 39, logged
    assert compare(runs, "val_loss", 4.5).arms[0].runs[0].reached.joules == pytest.approx(300.0)  # step 29, between
    before = compare(runs, "val_loss", 5.0).arms[0].runs[0].reached  # step 9, before the first entry at 19
    assert (before.step, before.joules, before.seconds) == (9, None, None)


def test_a_run_that_met_the_target_before_its_first_joules_gives_no_saving(tmp_path):
    first = write_run(tmp_path / "dense", falling(2.0), every=20)
    second = write_run(tmp_path / "dgm", falling(1.0), every=20, method=DGM)
    (contrast,) = compare(read_runs([first, second]), target=5.0, metric="val_loss").contrasts
    assert (contrast.at_target, contrast.at_budget) == (None, None)
    assert "no joules were logged around step 9" in contrast.reasons[0]


@pytest.mark.parametrize("losses", [(2.0, 2.1), (2.1, 2.0)])
def test_who_misses_the_target_is_not_comparable_whichever_arm_it_is(tmp_path, losses):
    comparison = compare(pair(tmp_path, losses=losses), "val_loss", 2.05)
    (contrast,) = comparison.contrasts
    assert (contrast.at_target, contrast.at_budget) == (None, None)
    missing = ("EST-DGM", "dgm") if losses[1] > losses[0] else ("dense", "dense")
    assert contrast.reasons[0].startswith(f"{missing[0]} missed val_loss ≤ 2.05 (its one run; best value of ")
    assert f"{missing[1]}: 2.1)" in contrast.reasons[0]


def test_one_seed_that_misses_spoils_the_arm(tmp_path):
    folders = write_arms(tmp_path)
    write_run(tmp_path / "late", falling(2.5), method=DGM, seed=3)
    (contrast,) = compare(read_runs([*folders, tmp_path / "late"])).contrasts
    assert contrast.at_target is None
    assert "missed" in contrast.reasons[0]
    assert "1 of 4 runs" in contrast.reasons[0]
    assert compare(read_runs(folders)).contrasts[0].at_target is not None  # the control


def test_the_default_target_is_one_that_each_baseline_run_reached(tmp_path):
    folders = [write_run(tmp_path / f"d{i}", falling(end), seed=i) for i, end in enumerate((2.0, 2.2, 1.9))]
    comparison = compare(read_runs(folders))
    assert comparison.target.value == 2.2
    assert all(run.reached for run in comparison.arms[0].runs)


def test_a_diverged_run_reaches_nothing(tmp_path):
    losses = falling(1.0) | dict.fromkeys(range(19, 100, 10), math.nan)
    runs = read_runs([write_run(tmp_path / "dense", falling(2.0)), write_run(tmp_path / "dgm", losses, method=DGM)])
    comparison = compare(runs)
    assert comparison.arms[1].runs[0].reached is None
    assert comparison.contrasts[0].at_target is None


def test_of_an_accuracy_the_higher_value_is_better(tmp_path):
    rising = {step: 1 - loss / 10 for step, loss in falling(2.0).items()}
    higher = {step: 1 - loss / 10 for step, loss in falling(1.0).items()}
    runs = read_runs(
        [
            write_run(tmp_path / "dense", rising, metric="val/acc"),
            write_run(tmp_path / "dgm", higher, metric="val/acc", method=DGM),
        ]
    )
    comparison = compare(runs, "val/acc")
    assert (comparison.target.mode, comparison.target.value) == ("max", pytest.approx(0.8))
    assert comparison.arms[1].runs[0].reached.step == 79
    assert compare(runs, "val/acc", mode="min").target.value == pytest.approx(0.5)


# At the same budget -------------------------------------------------------------------------------------------------


def test_the_budget_is_what_all_runs_came_to(tmp_path):
    short = write_run(tmp_path / "dense", {9: 4.0, 39: 2.0}, steps=50)
    long = write_run(tmp_path / "dgm", {9: 4.0, 39: 2.0, 99: 1.0}, method=DGM, watts=30.0)
    comparison = compare(read_runs([short, long]))
    assert comparison.budget_steps == 50
    dense, dgm = (arm.runs[0] for arm in comparison.arms)
    assert dense.budget.joules == 1000.0
    assert dgm.budget.joules == pytest.approx(0.5 * 600 + 0.1 * 60)  # step 50 lies a tenth of the way from 49 to 59
    assert dgm.budget_best == 2.0
    assert comparison.contrasts[0].at_budget.share["mean"] == pytest.approx(1 - 306 / 1000)


def test_no_saving_at_a_budget_within_which_the_target_was_not_reached(tmp_path):
    short = write_run(tmp_path / "dense", {9: 4.0, 39: 2.0}, steps=50)
    long = write_run(tmp_path / "dgm", {9: 4.0, 99: 1.0}, method=DGM)
    (contrast,) = compare(read_runs([short, long])).contrasts
    assert contrast.at_target is not None
    assert contrast.at_budget is None


# Joules of one kind -------------------------------------------------------------------------------------------------


def test_an_estimate_is_not_compared_with_a_measurement(tmp_path):
    (contrast,) = compare(pair(tmp_path, dgm={"estimated": True})).contrasts
    assert (contrast.at_target, contrast.at_budget) == (None, None)
    assert "the joules of dense are measured, those of EST-DGM estimated" in contrast.reasons[0]


def test_two_estimates_are_compared_and_say_so(tmp_path):
    comparison = compare(pair(tmp_path, {"estimated": True}, {"estimated": True}))
    assert comparison.contrasts[0].at_target.joules_kind == "estimated"
    assert {arm.kind for arm in comparison.arms} == {"estimated"}


def test_joules_of_different_parts_of_the_machine_are_not_compared(tmp_path):
    gpu = {"host": "node", "kind": "gpu", "uid": "GPU-1", "name": "a GPU", "joules": 5.0, "watts": 1.0}
    sources = summary(watts=40.0, seconds=15.0)["energy"]["sources"]
    more = [*sources, {"name": "nvml", "method": "counter", "driver": "1", "devices": [gpu]}]
    (contrast,) = compare(pair(tmp_path, dgm={"energy": {"sources": more}})).contrasts
    assert contrast.at_target is None
    assert "dense: cpu measured; EST-DGM: cpu measured + gpu measured" in contrast.reasons[0]


def test_unknown_joules_are_not_compared(tmp_path):
    nothing = {"total_joules": None, "measured_joules": None, "sources": [], "coverage_ratio": 0.0}
    comparison = compare(pair(tmp_path, dgm={"energy": nothing}))
    (contrast,) = comparison.contrasts
    assert contrast.at_target is None
    assert "had no energy source" in contrast.reasons[0]
    assert comparison.budget_steps is None


# Bad input ----------------------------------------------------------------------------------------------------------


def test_runs_of_two_models_are_refused_by_name(tmp_path):
    runs = pair(tmp_path, dgm={"run": {"model": {"fingerprint": "cd" * 32, "parameters": 99}}})
    with pytest.raises(ValueError, match="expected runs of one model, got two") as raised:
        compare(runs)
    for part in ("dense is ByteGPT with 1234", "dgm is ByteGPT with 99", "abababababab", "cdcdcdcdcdcd"):
        assert part in str(raised.value)
    with pytest.raises(ValueError, match="ViT"):
        compare(pair(tmp_path / "class", dgm={"run": {"model": {"class": "ViT"}}}))


def test_a_model_whose_shapes_were_not_known_is_taken_at_its_name(tmp_path):
    runs = pair(tmp_path, dgm={"run": {"model": {"fingerprint": None, "parameters": None}}})
    assert compare(runs).contrasts[0].at_target is not None


def test_a_run_named_twice_is_refused(tmp_path):
    runs = pair(tmp_path)
    with pytest.raises(ValueError, match="named twice"):
        compare([*runs, read_run(tmp_path / "dense" / ".." / "dense")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("accuracy",), r"dense has no metric 'accuracy'; it has val_loss"),
        ((None, 2.0), r"a target or a mode needs the metric .* one of \['val_loss'\]"),
        ((None, None, "min"), "a target or a mode needs the metric"),
        (("val_loss", math.nan), "target: got nan, expected a number"),
    ],
)
def test_a_bad_target_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        compare(pair(tmp_path), *arguments)


def test_a_metric_whose_name_does_not_tell_needs_the_mode(tmp_path):
    runs = read_runs([write_run(tmp_path / "run", falling(2.0), metric="val_quality")])
    with pytest.raises(ValueError, match=r"mode of 'val_quality': .* expected min or max"):
        compare(runs, "val_quality")
    assert compare(runs, "val_quality", mode="max").target.value == 5.0
    plain = compare(runs)
    assert plain.target is None
    assert "all runs have: val_quality" in plain.no_target


def test_without_a_target_there_is_no_saving(tmp_path):
    folders = [write_run(tmp_path / "dense", {}), write_run(tmp_path / "dgm", {}, method=DGM, watts=1.0)]
    (contrast,) = compare(read_runs(folders)).contrasts
    assert (contrast.at_target, contrast.at_budget) == (None, None)
    assert contrast.reasons[0].startswith("no target: ")


def test_no_run_is_refused():
    with pytest.raises(ValueError, match="got no run"):
        compare([])


# Properties ---------------------------------------------------------------------------------------------------------

KINDS = st.sampled_from(["measured", "estimated"])
ENDS = st.lists(st.floats(1.0, 3.0), min_size=1, max_size=3)


def in_memory(place, method, seed, end, kind):
    steps = range(9, 100, 10)
    curves = {
        "val_loss": Curve.of(falling(end).items()),
        "energy/total_joules": Curve.of((step, 10.0 * (step + 1)) for step in steps),
        "energy/seconds": Curve.of((step, 0.2 * (step + 1)) for step in steps),
    }
    return FinishedRun(
        Path(f"/runs/{place}{seed}"), summary(method=method, seed=seed, estimated=kind == "estimated"), curves
    )


@given(ENDS, ENDS, KINDS, KINDS, st.floats(1.0, 3.0))
def test_a_saving_stands_if_and_only_if_all_reached_the_target_and_the_joules_are_of_one_kind(
    dense, dgm, dense_kind, dgm_kind, target
):
    runs = [in_memory("dense", None, i, end, dense_kind) for i, end in enumerate(dense)]
    runs += [in_memory("dgm", DGM, i, end, dgm_kind) for i, end in enumerate(dgm)]
    (contrast,) = compare(runs, "val_loss", target).contrasts
    last = [falling(end)[99] for end in (*dense, *dgm)]
    allowed = max(last) <= target and dense_kind == dgm_kind
    assert (contrast.at_target is not None) == (contrast.at_budget is not None) == allowed
    assert bool(contrast.reasons) == (not allowed)
