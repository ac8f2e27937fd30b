"""Timings kept on disk: used by the next run, on the same machine alone, and never in the way of a run."""

import json
import os
import subprocess
import sys

import pytest
import torch

from helpers.autotune_cases import LAYER, POINTWISE, Clock, conv_case, linear_case, never, saved_and_loaded
from lightning_estdgm._environment import processor_name
from lightning_estdgm.sparse.autotune import _choice as choice_module
from lightning_estdgm.sparse.autotune import _timing_cache as timing_cache
from lightning_estdgm.sparse.autotune._cases import refusals
from lightning_estdgm.sparse.autotune._choice import BackendSelector
from lightning_estdgm.sparse.autotune._timing import Timing
from lightning_estdgm.sparse.autotune._timing_cache import TimingCache, folder, read_file
from lightning_estdgm.sparse.backends._protocol import get_backend


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A machine on which nothing was measured yet: the folder of its measurements."""
    monkeypatch.setenv(timing_cache.ENVIRONMENT, str(tmp_path / "choices"))
    return tmp_path / "choices"


def _file(kept):
    (path,) = kept.glob("*.json")
    return path


def _rows(kept):
    return read_file(_file(kept))[1]


def test_no_test_touches_the_users_measurements():
    assert os.environ[timing_cache.ENVIRONMENT] == "off"
    assert folder() is None
    clock = Clock()
    for _ in range(2):
        BackendSelector(measure=clock, kept=TimingCache()).choose(linear_case())
    assert len(clock.asked) == 2


def test_without_a_word_they_lie_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for word in (None, ""):
        monkeypatch.delenv(timing_cache.ENVIRONMENT) if word is None else monkeypatch.setenv("ESTDGM_CHOICES", word)
        assert folder() == tmp_path / "lightning_estdgm"
    monkeypatch.setenv("ESTDGM_CHOICES", "off")
    assert folder() is None


@pytest.mark.parametrize(
    "case", [linear_case, lambda **change: conv_case(geometry=POINTWISE, **change)], ids=["linear", "conv"]
)
def test_what_was_measured_once_is_not_measured_by_the_next_run(kept, case):
    clock = Clock()
    densities = (0.25, 0.75, 0.125, 1.0)
    first = [BackendSelector(measure=clock, kept=TimingCache()).choose(case(density=densities[0]))]
    selector = BackendSelector(measure=clock, kept=TimingCache())
    first += [selector.choose(case(density=density)) for density in densities[1:]]
    assert [row.density for row in _rows(kept)] == [0.25, 0.75]  # and neither of the two that were inferred
    selector = BackendSelector(measure=never, kept=TimingCache())
    again = [selector.choose(case(density=density)) for density in densities]
    assert [choice.backend for choice in again] == [choice.backend for choice in first]
    assert [choice.dense_s for choice in again] == [9e-3, 9e-3, None, None]
    day = _rows(kept)[0].when[:10]
    assert [choice.why for choice in again] == [
        f"sparse 2.0x faster (4.5 against 9 ms), measured on {day}",
        f"dense faster: sparse takes 1.5x the time (13.5 against 9 ms), measured on {day}",
        "sparse already faster at density 0.25",
        "dense already faster at density 0.75",
    ]


def test_forced_choices_are_not_kept(kept):
    BackendSelector("cpu", measure=never, kept=TimingCache()).choose(linear_case())
    assert not kept.exists()


def test_the_file_is_for_people_too(kept):
    BackendSelector(measure=Clock(), kept=TimingCache()).choose(linear_case())
    content = json.loads(_file(kept).read_text())
    assert content["machine"]["device"] == processor_name()
    assert content["machine"]["threads"] == torch.get_num_threads()
    assert content["machine"]["torch"] == torch.__version__
    (row,) = content["measurements"]
    assert row["layer"] == {**LAYER, "dtype": "float32", "device": "cpu", "frozen": False, "transposed": False}
    assert set(row["timing"]["turns"]) == {"dense", *(n for n, why in refusals(linear_case()).items() if why is None)}


CHANGES = {
    "device": lambda m: m.setattr(timing_cache, "processor_name", lambda: "Another CPU"),
    "threads": lambda m: m.setattr(torch, "get_num_threads", lambda: 99),
    "torch": lambda m: m.setattr(torch, "__version__", "9.9"),
    "cores": lambda m: m.setattr(timing_cache, "_cores", lambda: 99),
    "instructions": lambda m: m.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER"),
    "onednn": lambda m: m.setattr(torch.backends.mkldnn, "is_available", lambda: False),
    "precision": lambda m: m.setattr(torch, "get_float32_matmul_precision", lambda: "medium"),
    "determinism": lambda m: m.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True),
    "a version": lambda m: m.setattr(timing_cache, "package_version", lambda distribution: f"{distribution} 9.9"),
    "the source": lambda m: m.setattr(timing_cache, "_digest", lambda module: "other"),
    "a build": lambda m: m.setattr(type(get_backend("native")), "build", lambda self, device: "other"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_machine_or_version_measures_by_itself(kept, monkeypatch, change):
    BackendSelector(measure=Clock(), kept=TimingCache()).choose(linear_case())
    clock = Clock()
    with monkeypatch.context() as patch:
        CHANGES[change](patch)
        BackendSelector(measure=clock, kept=TimingCache()).choose(linear_case())
    assert len(clock.asked) == 1
    assert len(list(kept.glob("*.json"))) == 2
    BackendSelector(measure=never, kept=TimingCache()).choose(linear_case())


def test_backends_that_come_or_go_are_measured_with_the_others(kept, monkeypatch):
    if refusals(linear_case())["native"] is not None:
        pytest.skip("the native backend is not here")
    with monkeypatch.context() as patch:
        patch.setattr(choice_module, "refusals", lambda case: {**refusals(case), "native": "is gone"})
        BackendSelector(measure=Clock(), kept=TimingCache()).choose(linear_case())
    assert set(_rows(kept)[0].seconds) == {"dense", "cpu"}
    clock = Clock()
    BackendSelector(measure=clock, kept=TimingCache()).choose(linear_case())
    assert len(clock.asked) == 1
    assert [set(row.seconds) for row in _rows(kept)] == [{"dense", "cpu", "native"}]


def _content(change):
    row = {"layer": {**LAYER, "dtype": "float32", "device": "cpu", "frozen": False, "transposed": False}}
    timing = {"turns": {"dense": [1.0, 1.0], "cpu": [2.0, 2.0]}, "own_share": 0.99, "load": None}
    row |= {"density": 0.25, "timing": timing, "when": "2026-01-01T00:00Z"}
    content = {"format": 2, "machine": {}, "measurements": [row]}
    change(content, row)
    return json.dumps(content).encode()


BROKEN = {
    "empty": b"",
    "cut off": _content(lambda content, row: None)[:-30],
    "not text": b"\xff\x00",
    "not a table": b"[1, 2]",
    "of a later format": _content(lambda content, row: content.update(format=3)),
    "of an earlier format": _content(lambda content, row: content.update(format=1)),
    "rows of something else": _content(lambda content, row: row.update(layer={"tokens": 3})),
    "a row too short": _content(lambda content, row: row.pop("when")),
    "no time": _content(lambda content, row: row["timing"]["turns"].update(cpu=[1.0, float("nan")])),
    "a turn too few": _content(lambda content, row: row["timing"]["turns"]["cpu"].pop()),
    "no turns": _content(lambda content, row: row["timing"].update(turns={"dense": [], "cpu": []})),
    "nothing to compare": _content(lambda content, row: row["timing"]["turns"].pop("cpu")),
    "a list of times": _content(lambda content, row: row["timing"].update(turns=[1.0, 2.0])),
    "a load in words": _content(lambda content, row: row["timing"].update(load="high")),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_file_is_said_once_and_written_anew(kept, broken):
    BackendSelector(measure=Clock(), kept=TimingCache()).choose(linear_case())
    _file(kept).write_bytes(BROKEN[broken])
    selector = BackendSelector(measure=Clock(), kept=TimingCache())
    with pytest.warns(RuntimeWarning, match="measured times of layers are not used.*does not hold") as said:
        choices = [selector.choose(linear_case(density=density)) for density in (0.25, 0.75)]
    assert len(said) == 1
    assert [choice.dense_s for choice in choices] == [9e-3, 9e-3]
    assert len(_rows(kept)) == 2


def test_what_the_broken_files_are_made_of_is_a_whole_one(kept):
    kept.mkdir()
    (kept / "whole.json").write_bytes(_content(lambda content, row: None))
    assert len(_rows(kept)) == 1


def test_a_folder_that_cannot_be_used_is_said_once_and_stops_nothing(kept):
    (kept.parent / "choices").write_text("no folder")
    selector = BackendSelector(measure=Clock(), kept=TimingCache())
    with pytest.warns(RuntimeWarning, match="measured times of layers") as said:
        chosen = [selector.choose(linear_case(density=density)).backend for density in (0.25, 0.75)]
    assert chosen == ["cpu", "dense"]
    assert ["cannot be kept" in str(warning.message) for warning in said] == [False, True]  # nor read


def test_a_full_disk_leaves_the_old_file_whole(kept, monkeypatch):
    BackendSelector(measure=Clock(), kept=TimingCache()).choose(linear_case())
    before = _file(kept).read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(timing_cache.json, "dump", full)
        with pytest.warns(RuntimeWarning, match="cannot be kept.*No space left"):
            BackendSelector(measure=Clock(), kept=TimingCache()).choose(linear_case(tokens=3))
    assert _file(kept).read_bytes() == before
    assert {path.suffix for path in kept.iterdir()} == {".json", ".lock"}


WRITER = """
import sys, time
from pathlib import Path
import torch
from lightning_estdgm.sparse.autotune._cases import Case
from lightning_estdgm.sparse.autotune._timing_cache import TimingCache

first, folder = int(sys.argv[1]), Path(sys.argv[2])
kept = TimingCache()
kept.path(torch.device("cpu"))
(folder / f"ready{first}").touch()
while len(list(folder.glob("ready*"))) < 2:
    time.sleep(0.001)
for tokens in range(first, 80 + first, 2):
    case = Case(tokens, 64, 96, 16, 0.25, torch.float32, torch.device("cpu"))
    kept.add(case, {"dense": float(tokens), "cpu": 1.0})
"""


def test_two_processes_that_write_at_once_lose_nothing(kept, tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(n), str(tmp_path)]) for n in (1, 2)]
    assert [writer.wait(timeout=300) for writer in writers] == [0, 0]
    assert {row.layer["tokens"]: row.seconds["dense"] for row in _rows(kept)} == {n: float(n) for n in range(1, 81)}


@pytest.mark.parametrize(("load", "again"), [(0.2, True), (0.9, False), (None, False)])
def test_what_a_busy_machine_has_measured_is_measured_again_once_it_is_calm(kept, load, again):
    busy = Timing({"dense": [2.0], "cpu": [1.0], "native": [1.5]}, own_share=0.6, load=2.0)
    busy = Timing({name: busy.turns[name] for name in ("dense", *_able())}, busy.own_share, busy.load)
    BackendSelector(measure=lambda case, names: busy, kept=TimingCache()).choose(linear_case())
    slow = Clock(lambda density: 3.0)
    choice = BackendSelector(measure=slow, kept=TimingCache(), load=lambda: load).choose(linear_case())
    assert len(slow.asked) == again
    assert choice.backend == ("dense" if again else "cpu")
    day = _rows(kept)[0].when[:10]
    if not again:
        assert (
            choice.why == f"sparse 2.0x faster (1e+03 against 2e+03 ms), measured on {day} while the machine was busy"
        )
    # The next run takes what the calm machine has measured.
    assert BackendSelector(measure=never, kept=TimingCache(), load=lambda: load).choose(linear_case()).backend == (
        choice.backend
    )


def test_what_is_kept_makes_the_choice_that_was_made(kept):
    """Rounds that disagree leave dense, in the run that timed them and in the next."""
    turns = {name: [1.0, 3.0, 1.0, 3.0] for name in _able()}
    timing = Timing({"dense": [2.0] * 4, **turns}, own_share=1.0, load=0.1)
    first = BackendSelector(measure=lambda case, names: timing, kept=TimingCache()).choose(linear_case())
    second = BackendSelector(measure=never, kept=TimingCache()).choose(linear_case())
    assert first.backend == second.backend == "dense"
    assert second.why == first.why + f", measured on {_rows(kept)[0].when[:10]}"


def _able():
    return [name for name, reason in refusals(linear_case()).items() if reason is None]


def test_a_restored_choice_counts_for_more_than_the_file(kept):
    first = BackendSelector(measure=Clock())
    choice = first.choose(linear_case())
    slow = Clock(lambda density: 3.0)
    assert BackendSelector(measure=slow, kept=TimingCache()).choose(linear_case()).backend == "dense"
    resumed = BackendSelector(measure=never, kept=TimingCache())
    resumed.load_state_dict(saved_and_loaded(first.state_dict()))
    assert resumed.choose(linear_case()) == choice
    assert choice.backend == "cpu"
    # The control: a run that was not resumed asks the file.
    assert BackendSelector(measure=never, kept=TimingCache()).choose(linear_case()).backend == "dense"
