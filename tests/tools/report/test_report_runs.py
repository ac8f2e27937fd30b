"""Reading a finished run: its summary, its curves, and every way in which they may be broken."""

import json
import shutil

import pytest
from torch.utils.tensorboard import SummaryWriter

from helpers.run_files import DGM, falling, summary, write_run
from lightning_estdgm.tools.report._curve import Curve
from lightning_estdgm.tools.report._finished_run import energy_label, kind_of
from lightning_estdgm.tools.report._run_folder import RunError, read_run


def test_a_run_is_found_anywhere_below_its_folder(tmp_path):
    write_run(tmp_path / "runs" / "deep" / "version_0", falling(2.0), method=DGM)
    run = read_run(tmp_path / "runs", "sparse")
    assert (run.path, run.label, run.method["name"]) == (tmp_path / "runs", "sparse", "EST-DGM")
    assert run.metrics.keys() == {"val_loss"}
    assert run.joules.at(49) == pytest.approx(500.0)
    assert run.joules.at(44) == pytest.approx(450.0)
    assert run.seconds.at(100) == 20.0
    assert run.watts.values.tolist() == pytest.approx([50.0] * 11)


def test_joules_outside_what_was_logged_are_unknown(tmp_path):
    run = read_run(write_run(tmp_path / "run", falling(2.0)))
    assert run.joules.at(8) is None
    assert run.joules.at(101) is None
    assert run.joules.at(9) is not None


def test_tensorboard_events_are_read_whole(tmp_path):
    folder = write_run(tmp_path / "run", {}, estimated=True)
    (folder / "metrics.csv").unlink()
    with SummaryWriter(folder) as writer:
        for step in range(12_000):  # more than TensorBoard's own reader keeps by default
            writer.add_scalar("energy/total_joules_estimated", step / 4, step)
        writer.add_scalar("val/loss", 1.5, 11_999)
    run = read_run(folder)
    assert len(run.joules.steps) == 12_000
    assert run.joules.at(4321.5) == pytest.approx(4321.5 / 4)
    assert run.metrics["val/loss"].at(11_999) == 1.5


def test_events_of_a_restart_come_after_those_before_it(tmp_path):
    folder = write_run(tmp_path / "run", {})
    (folder / "metrics.csv").unlink()
    for first, last, joules in ((0, 60, 1.0), (50, 90, 2.0)):  # crashed at 60, resumed from 50
        with SummaryWriter(folder, filename_suffix=f".{first}") as writer:
            for step in range(first, last):
                writer.add_scalar("energy/total_joules", joules * step, step)
    run = read_run(folder)
    assert run.joules.steps.tolist() == list(range(90))
    assert run.joules.at(49) == 49.0
    assert run.joules.at(50) == 100.0


def test_curves_that_are_no_text_are_named_with_their_file(tmp_path):
    folder = write_run(tmp_path / "run", falling(2.0))
    with (folder / "metrics.csv").open("ab") as file:
        file.write(b"0,1,\xff\xfe\n")
    with pytest.raises(RunError, match=r"run/metrics\.csv: not readable as CSV \('utf-8' codec can't decode"):
        read_run(folder)


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run", falling(2.0))
    with (folder / "metrics.csv").open("a") as file:
        file.write("100,,")
    assert read_run(folder).metrics["val_loss"].steps.tolist() == list(range(9, 100, 10))


def test_a_line_that_runs_on_from_one_that_was_cut_off_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run", falling(2.0))
    *before, last = (folder / "metrics.csv").read_text().splitlines()
    cut = before.pop()
    (folder / "metrics.csv").write_text("\n".join([*before, cut[:-2] + last, last.replace("99,", "101,")]) + "\n")
    losses = read_run(folder).metrics["val_loss"]
    assert losses.steps.tolist() == [*range(9, 80, 10), 101]
    assert losses.values.max() == 5.0


def test_a_number_that_was_cut_off_is_no_number(tmp_path):
    folder = write_run(tmp_path / "run", {})
    with (folder / "metrics.csv").open("a") as file:
        file.write("150,31.0,15")  # of 1550.0
    assert read_run(folder).joules.steps.tolist()[-1] == 100


def test_curves_without_steps_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run", falling(2.0))
    (folder / "metrics.csv").write_text("epoch,val_loss\n0,1.0\n")
    assert read_run(folder).metrics == {}
    (folder / "metrics.csv").write_text("step,val_loss\ninf,1.0\n7,2.0\n")
    assert read_run(folder).metrics["val_loss"].steps.tolist() == [7]


def test_a_total_that_became_estimated_on_the_way_is_one_curve(tmp_path):
    folder = write_run(tmp_path / "run", {})
    (folder / "metrics.csv").write_text(
        "step,energy/total_joules,energy/total_joules_estimated\n10,5.0,\n20,9.0,\n30,,12.0\n"
    )
    assert read_run(folder).joules.values.tolist() == [5.0, 9.0, 12.0]


def test_without_curves_the_summary_gives_the_last_point(tmp_path):
    folder = write_run(tmp_path / "run", {})
    (folder / "metrics.csv").unlink()
    run = read_run(folder)
    assert (run.joules.at(100), run.joules.at(99), run.metrics) == (1000.0, None, {})


def test_a_curve_keeps_the_later_of_two_values_at_one_step():
    curve = Curve.of([(10, 1.0), (20, 2.0), (10, 3.0), (30, float("nan"))])
    assert (curve.steps.tolist(), curve.values.tolist()[:2]) == ([10, 20, 30], [3.0, 2.0])
    assert curve.finite().steps.tolist() == [10, 20]


@pytest.mark.parametrize(
    ("measured", "estimated", "total", "kind"),
    [
        (5.0, None, 5.0, "measured"),
        (None, 5.0, 5.0, "estimated"),
        (3.0, 2.0, 5.0, "partly estimated"),
        (None, None, None, "unknown"),
    ],
)
def test_the_kind_of_joules(measured, estimated, total, kind):
    energy = {"total_joules": total, "measured_joules": measured, "estimated_joules": estimated, "sources": []}
    assert kind_of(energy) == kind
    assert ("ESTIMATED" in energy_label(energy)) == (estimated is not None)


# Bad input ----------------------------------------------------------------------------------------------------------


def test_no_folder_no_summary_and_a_file_are_told_apart(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"empty: no energy\.json in it or below\. EnergyMonitor writes it at the end"):
        read_run(tmp_path / "empty")
    with pytest.raises(RunError, match="file: expected the folder of a run, got a file"):
        read_run(tmp_path / "file")
    with pytest.raises(RunError, match="gone: expected the folder of a run, got nothing there"):
        read_run(tmp_path / "gone")


def test_several_runs_in_one_folder_are_listed(tmp_path):
    first = write_run(tmp_path / "logs" / "version_0", falling(2.0))
    shutil.copytree(first, tmp_path / "logs" / "version_1")
    with pytest.raises(RunError, match=r"logs: got 2 runs, expected one; name one of .*version_0, .*version_1"):
        read_run(tmp_path / "logs")


def test_several_runs_in_one_folder_are_named_by_their_files_and_read_without_curves(tmp_path):
    folder = write_run(tmp_path / "run", falling(2.0))
    assert read_run(folder / "energy.json").metrics.keys() == {"val_loss"}
    (folder / "energy-1.json").write_text(json.dumps(summary(watts=70.0)))
    (folder / "energy-old.json").write_text("{}")  # somebody's own
    with pytest.raises(RunError, match=r"got 2 runs, expected one; name one of .*energy-1\.json, .*energy\.json$"):
        read_run(folder)
    first, second = read_run(folder / "energy.json"), read_run(folder / "energy-1.json")
    assert [run.energy["total_joules"] for run in (first, second)] == [1000.0, 1400.0]
    assert first.metrics == second.metrics == {}  # nothing tells whose they are
    assert second.joules.at(100) == 1400.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(summary())[:400], "not readable as JSON"),
        ("", "not readable as JSON"),
        ("[1, 2]", "expected the format 'lightning_estdgm.energy', got 'list'"),
        ('{"format": "other"}', "expected the format 'lightning_estdgm.energy', got 'other'"),
        (json.dumps(summary(version=2)), "got version 2, this lightning_estdgm reads version 1"),
        (json.dumps(summary(version="1")), "expected version 1, got '1'"),
        (json.dumps(summary(energy=None)), "'energy' is missing"),
        (json.dumps(summary(run={"model": "GPT"})), "run.model: got 'GPT', expected dict"),
        (json.dumps(summary(energy={"total_joules": "9 J"})), "energy.total_joules: got '9 J', expected int or float"),
        (json.dumps(summary(energy={"sources": None})), "energy.sources: got None, expected list"),
        (json.dumps(summary(energy={"sources": ["rapl"]})), "energy.sources.0: got 'rapl', expected dict"),
        (
            json.dumps(summary(energy={"sources": [{"name": "x"}]})),
            "energy.sources.0.method: got nothing, expected str",
        ),
        (
            json.dumps(summary(energy={"sources": [{"name": "x", "method": "counter", "devices": [{"host": "a"}]}]})),
            "energy.sources.0.devices.0.kind: got nothing, expected str",
        ),
        (json.dumps(summary(energy={"absent": None})), "energy.absent: got None, expected list"),
        (json.dumps(summary(energy={"failing": [{}]})), "energy.failing.0.host: got nothing, expected str"),
    ],
)
def test_a_broken_summary_is_named_with_what_is_wrong(tmp_path, text, message):
    folder = write_run(tmp_path / "run", falling(2.0))
    (folder / "energy.json").write_text(text)
    with pytest.raises(RunError, match=r"run.energy\.json: ") as raised:
        read_run(folder)
    assert message in str(raised.value)


def test_a_summary_without_a_needed_value_says_which(tmp_path):
    folder = write_run(tmp_path / "run", falling(2.0))
    content = summary()
    del content["energy"]["seconds"]
    (folder / "energy.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"energy\.seconds: got nothing, expected int or float"):
        read_run(folder)
