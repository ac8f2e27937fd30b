"""Warnings of what makes a comparison unfair or weak."""

import pytest

from helpers.run_files import DGM, falling, pair, read_runs, summary, write_arms, write_run
from lightning_estdgm.tools.report import compare, read_run


def test_a_fair_comparison_has_no_warnings(tmp_path):
    assert compare(read_runs(write_arms(tmp_path))).warnings == ()


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"run": {"batch_size": 64}}, "batch size differs (dense: 16; sparse: 64)"),
        ({"run": {"precision": "bf16-mixed"}}, "precision differs (dense: 32-true; sparse: bf16-mixed)"),
        ({"run": {"devices": ["H100", "H100"]}}, "devices differ (dense: cpu; sparse: 2 × H100)"),
        ({"run": {"global_step": 90}}, "steps differ (dense: 100; sparse: 90)"),
        ({"run": {"compiled": True}}, "compiled differs (dense: no; sparse: yes)"),
        ({"run": {"host": "other"}}, "host differs"),
        ({"run": {"world_size": 2}}, "processes differ"),
        ({"run": {"versions": {"torch": "2.6.0"}}}, "torch version differs (dense: 2.13.0; sparse: 2.6.0)"),
        ({"energy": {"coverage_ratio": 0.9}}, "readings cover only 90.0 % of the time"),
        ({"energy": {"gaps": 3}}, "3 gap(s) in the readings"),
        ({"status": "exception"}, "ended with an exception"),
        ({"method": DGM | {"sparse_operators_ran": False}}, "sparse: no sparse operator ran"),
        ({"run": {"seed": 7}}, "sparse: runs of one seed (3 × 7) are not independent"),
    ],
)
def test_what_makes_it_unfair_is_said(tmp_path, changes, warning):
    folders = write_arms(tmp_path / "fair")
    dense = [read_run(folder, "dense") for folder in folders[::2]]
    sparse = [
        read_run(
            write_run(
                tmp_path / f"changed{seed}", falling(1.0), **{
                    "method": DGM, "seed": seed, "started": f"2026-11-23T{9 + 2 * seed:02d}:00:00+00:00", **changes
                }
            ),
            "sparse",
        )
        for seed in range(3)
    ]  # fmt: skip
    found = compare([*dense, *sparse]).warnings
    assert any(warning in each for each in found), found


def test_a_driver_that_differs_and_other_users_work_are_said(tmp_path):
    (source,) = summary(watts=40.0, seconds=15.0)["energy"]["sources"]
    device = source["devices"][0] | {"shared": True}
    other = source | {"driver": "intel-rapl 5.4", "devices": [device]}
    found = " ".join(compare(pair(tmp_path, dgm={"energy": {"sources": [other]}})).warnings)
    assert "energy drivers differ (dense: rapl intel-rapl 6.1; EST-DGM: rapl intel-rapl 5.4)" in found
    assert "other users' work is in the joules of a CPU" in found


def test_a_metric_that_was_logged_rarely_is_said_to_tell_little(tmp_path):
    losses = {19: 4.0, 59: 3.0, 99: 1.0}
    folders = [write_run(tmp_path / "dense", losses), write_run(tmp_path / "dgm", losses, method=DGM)]
    found = [warning for warning in compare(read_runs(folders)).warnings if "rarely" in warning]
    assert found == [
        f"{arm}: val_loss was logged so rarely that the target may have been reached up to 40 % of the steps earlier"
        for arm in ("dense", "EST-DGM")
    ]


def test_few_runs_are_said_to_be_few(tmp_path):
    found = compare(pair(tmp_path)).warnings
    assert [w for w in found if "a single run" in w] == [
        f"{arm}: a single run, so its spread is not known" for arm in ("dense", "EST-DGM")
    ]
    two = compare(read_runs(write_arms(tmp_path / "two", seeds=2))).warnings
    assert "dense: only 2 runs; at least 3 seeds tell a difference from chance" in two


def test_arms_that_ran_one_after_the_other_are_said_to(tmp_path):
    folders = write_arms(tmp_path / "turns")
    late = [
        write_run(tmp_path / f"late{seed}", falling(1.0), method=DGM, seed=seed, started=f"2026-11-24T0{seed}:00:00Z")
        for seed in range(3)
    ]
    assert any("one after the other" in each for each in compare(read_runs([*folders[::2], *late])).warnings)
