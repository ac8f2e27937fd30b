"""Runs grouped into arms, and pairs of equal seeds."""

import pytest

from helpers.run_files import DGM, falling, pair, read_runs, write_arms, write_run
from lightning_estdgm.tools._stats import spread
from lightning_estdgm.tools.report import compare, read_run


def test_equal_seeds_are_compared_in_pairs(tmp_path):
    folders = write_arms(tmp_path)
    (contrast,) = compare(read_runs([folders[i] for i in (4, 1, 0, 5, 3, 2)])).contrasts  # in whatever order
    expected = [1 - 0.8 * 15 * (40 + seed) / (20 * (50 + seed)) for seed in range(3)]
    assert contrast.at_target.paired
    assert contrast.at_target.share["values"] == pytest.approx(expected)
    assert contrast.at_target.share["std"] == pytest.approx(spread(expected)["std"])


def test_unknown_seeds_give_one_ratio_of_the_means(tmp_path):
    (contrast,) = compare(read_runs(write_arms(tmp_path, run={"seed": None}))).contrasts
    assert not contrast.at_target.paired
    assert contrast.at_target.share["mean"] == pytest.approx(1 - 0.8 * 15 * 41 / (20 * 51))
    assert contrast.at_target.share["std"] is None


def test_arms_come_from_labels_or_else_from_method_and_configuration(tmp_path):
    folders = write_arms(tmp_path, seeds=2)
    assert [(a.name, len(a.runs)) for a in compare(read_runs(folders)).arms] == [("dense", 2), ("EST-DGM", 2)]
    labels = ["a", "b", "a", "b"]
    labelled = [read_run(folder, label) for folder, label in zip(folders, labels, strict=True)]
    assert [arm.name for arm in compare(labelled).arms] == ["a", "b"]


def test_the_arm_without_a_method_is_the_baseline_wherever_it_stands(tmp_path):
    folders = write_arms(tmp_path, seeds=1)
    comparison = compare(read_runs(reversed(folders)))
    assert comparison.baseline == "dense"
    assert [arm.name for arm in comparison.arms] == ["dense", "EST-DGM"]


def test_runs_of_one_method_with_different_settings_are_two_arms(tmp_path):
    runs = pair(tmp_path)
    wide = read_run(write_run(tmp_path / "wide", falling(1.0), method=DGM, run={"batch_size": 64}))
    comparison = compare([*runs, wide])
    assert [arm.name for arm in comparison.arms] == ["dense", "EST-DGM, batch size 16", "EST-DGM, batch size 64"]
    assert len(comparison.contrasts) == 2


def test_one_run_is_reported_without_a_comparison(tmp_path):
    comparison = compare(read_runs([write_run(tmp_path / "run", falling(2.0))]))
    assert comparison.contrasts == ()
    assert comparison.arms[0].runs[0].joules == 1000.0
    assert comparison.warnings == ()
