"""Runs that used one counter at the same time: not comparable, and the report says why."""

import json

import pytest
from typer.testing import CliRunner

from helpers.run_files import DGM, at, deep, falling, pair, read_runs, summary, write_run
from lightning_estdgm.cli import app
from lightning_estdgm.tools.report import compare, read_run
from lightning_estdgm.tools.report._overlap import overlaps_of
from lightning_estdgm.tools.report._render import markdown


def device(uid="package-0", host="node", kind="cpu", estimated=False, **changes):
    """The part of an energy.json that tells which device was read."""
    (source,) = summary(estimated=estimated)["energy"]["sources"]
    found = source["devices"][0] | {"host": host, "uid": uid, "kind": kind} | changes
    return {"energy": {"sources": [source | {"devices": [found]}]}}


def test_runs_at_one_time_on_one_counter_are_not_comparable(tmp_path):
    comparison = compare(pair(tmp_path, at(1, (8, 10)), at(1, (9.5, 12))))
    sentence = (
        "dense and dgm ran at the same time for 1.8e+03 s and both read cpu package-0 on node: "
        "the joules of each include the other's"
    )
    (contrast,) = comparison.contrasts
    assert (contrast.reasons, contrast.at_target, contrast.at_budget) == ((sentence,), None, None)
    assert comparison.warnings[0] == sentence
    text = markdown(comparison)
    assert "Not comparable: EST-DGM and dense." in text
    assert "ran at the same time" in text


@pytest.mark.parametrize(
    ("dense", "dgm"),
    [
        (at(1, (8, 10)), at(1, (10, 12))),  # one after the other
        (at(1, (8, 10)), at(2, (8, 10))),
        (at(1, (8, 9), (11, 12)), at(1, (9, 11))),  # in a pause between two fits
        (at(1, (8, 10), (12, 14), ids="ab"), at(1, (8, 10), (10, 12), ids="ac")),  # both go on from one fit
        (deep(at(1, (8, 10)), device()), deep(at(1, (8, 10.5)), device(host="other"))),
        (deep(at(1, (8, 10)), device("GPU-a", kind="gpu")), deep(at(1, (8, 10.5)), device("GPU-b", kind="gpu"))),
        (deep(at(1, (8, 10)), device()), deep(at(1, (8, 10.5)), device("process-7"))),
        (at(1, (8, 10)), {}),  # of an older version, which states no times
        ({"run": {"fits": "?"}}, at(1, (8, 10))),
    ],
)
def test_who_had_the_counter_alone_is_comparable(tmp_path, dense, dgm):
    comparison = compare(pair(tmp_path, dense, dgm))
    assert overlaps_of([run for runs in comparison.members.values() for run in runs]) == ()
    (contrast,) = comparison.contrasts
    assert contrast.reasons == ()
    assert contrast.at_target is not None


def test_all_fits_of_a_run_count(tmp_path):
    first, second = pair(tmp_path, at(1, (8, 9), (12, 14)), at(1, (8.5, 13)))
    (overlap,) = overlaps_of([first, second])
    assert overlap.seconds == 0.5 * 3600 + 3600


def test_a_device_that_was_never_read_is_not_shared(tmp_path):
    silent = deep(at(1, (8, 10)), device("package-0", joules=None))
    assert overlaps_of(pair(tmp_path, silent, at(1, (8.5, 11)))) == ()


@pytest.mark.parametrize("estimated", [True, False])
def test_estimates_of_two_processes_with_one_number_are_not_shared(tmp_path, estimated):
    process = device("process-7", estimated=estimated) | {"estimated": estimated}
    runs = pair(tmp_path, deep(at(1, (8, 10)), process), deep(at(1, (8.5, 11)), process))
    assert len(overlaps_of(runs)) == (0 if estimated else 1)
    assert (compare(runs).contrasts[0].at_target is not None) == estimated


def test_a_third_run_beside_them_spoils_the_comparison_too(tmp_path):
    folders = [
        write_run(tmp_path / "dense", falling(2.0), **at(1, (8, 10))),
        write_run(tmp_path / "dgm", falling(1.0), method=DGM, watts=40.0, **at(1, (10, 12))),
        write_run(tmp_path / "rigl", falling(1.0), method=DGM | {"name": "RigL"}, **at(1, (11, 13))),
    ]
    dgm, rigl = compare(read_runs(folders)).contrasts
    assert "dgm and rigl ran at the same time" in dgm.reasons[0]
    assert dgm.reasons == rigl.reasons


def test_of_many_pairs_a_few_are_named_and_the_rest_is_counted(tmp_path):
    folders = [
        write_run(tmp_path / f"{name}{seed}", falling(1.0), seed=seed, method=method, **at(1, (8, 10 + 0.1 * seed)))
        for seed, (name, method) in enumerate([("dense", None), ("dgm", DGM)] * 2)
    ]
    for i, folder in enumerate(folders):  # all at once, each with an id of its own
        content = json.loads((folder / "energy.json").read_text())
        content["run"]["fits"][0]["id"] = str(i)
        (folder / "energy.json").write_text(json.dumps(content))
    comparison = compare(read_runs(folders))
    said = [warning for warning in comparison.warnings if "same time" in warning]
    assert len(said) == 4
    assert said[-1] == "3 more pairs of runs used one counter at the same time"
    (contrast,) = comparison.contrasts
    assert contrast.reasons == tuple(said)


def test_seeds_of_one_arm_that_ran_at_one_time_are_said_to(tmp_path):
    folders = [
        write_run(tmp_path / f"dense{seed}", falling(2.0), seed=seed, **at(1, (8 + seed, 10 + seed)))
        for seed in range(2)
    ]
    assert any("dense0 and dense1 ran at the same time" in warning for warning in compare(read_runs(folders)).warnings)


def test_a_copy_of_a_run_is_that_run(tmp_path):
    runs = pair(tmp_path, at(1, (8, 10), ids="a"), at(1, (8, 10), ids="a"))
    with pytest.raises(ValueError, match="named twice"):
        compare(runs)


# Runs of one EnergyMonitor --------------------------------------------------------------------------------------------


def steps(own, counted):
    """The part of an energy.json that tells how far the run came, and the steps that its monitor counted."""
    return {"run": {"global_step": own}, "energy": {"steps": counted}}


def test_runs_of_one_monitor_are_not_comparable(tmp_path):
    second = deep(at(1, (8, 10), (10, 12), ids="ab"), steps(100, 200))
    comparison = compare(pair(tmp_path, at(1, (8, 10), ids="a"), second))
    sentence = (
        "the joules of dgm include a fit of dense: one EnergyMonitor adds up over all its fits. "
        "Give each run a new EnergyMonitor"
    )
    (contrast,) = comparison.contrasts
    assert (contrast.reasons, contrast.at_target, contrast.at_budget) == ((sentence,), None, None)
    assert comparison.warnings[0] == sentence
    assert "Not comparable: EST-DGM and dense." in markdown(comparison)


def test_a_third_run_that_holds_no_other_is_comparable_with_the_first(tmp_path):
    folders = [
        write_run(tmp_path / "dense", falling(2.0), **at(1, (8, 10), ids="a")),
        write_run(tmp_path / "dgm", falling(1.0), method=DGM, **at(1, (12, 14), ids="c")),
        write_run(
            tmp_path / "rigl",
            falling(1.0),
            **deep(at(1, (8, 10), (10, 12), ids="ab"), steps(100, 200) | {"method": DGM | {"name": "RigL"}}),
        ),
    ]
    dgm, rigl = compare(read_runs(folders)).contrasts
    assert dgm.at_target is not None
    assert (len(rigl.reasons), rigl.at_target) == (1, None)


@pytest.mark.parametrize(
    ("dense", "dgm"),
    [
        (at(1, (8, 10), ids="a"), deep(at(1, (8, 10), (10, 12), ids="ab"), steps(100, 100))),  # resumed
        (at(1, (8, 10), ids="a"), deep(at(1, (8, 10), (10, 12), ids="ab"), steps(100, 97))),  # with steps skipped
        (at(1, (8, 10), ids="a"), deep(at(1, (10, 12), (12, 14), ids="bc"), steps(100, 200))),  # fits of its own
        (at(1, (8, 10), ids="a"), deep(at(1, (8, 10), (10, 12), ids="ab"), steps(100, None))),
    ],
)
def test_runs_whose_fits_are_their_own_are_comparable(tmp_path, dense, dgm):
    (contrast,) = compare(pair(tmp_path, dense, dgm)).contrasts
    assert contrast.reasons == ()
    assert contrast.at_target is not None


# Runs that have not ended -------------------------------------------------------------------------------------------


def test_a_killed_run_is_reported_as_unfinished(tmp_path):
    folder = write_run(tmp_path / "run", falling(2.0), status="running")
    comparison = compare([read_run(folder)])
    assert any(
        warning.startswith("run: not finished: it was killed or is still running") for warning in comparison.warnings
    )
    assert "| unfinished |" in markdown(comparison)
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    assert "not finished" in result.output


def test_a_device_that_failed_until_the_end_is_said_to(tmp_path):
    failing = [{"host": "node", "kind": "gpu", "uid": "GPU-b", "name": "H100"}]
    folder = write_run(tmp_path / "run", falling(2.0), energy={"failing": failing})
    assert (
        "run: gpu GPU-b on node could not be read at the end: joules are missing"
        in compare([read_run(folder)]).warnings
    )
