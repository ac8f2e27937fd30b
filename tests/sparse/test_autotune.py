"""The never-slower choice. Times are injected: no test depends on how fast this machine is."""

import io
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_estdgm.sparse.autotune import choice as selection
from lightning_estdgm.sparse.autotune import timing_cache as measurements
from lightning_estdgm.sparse.autotune.cases import MOST_ROUNDS, Case, ConvCase, _settled, measure_case, refusals
from lightning_estdgm.sparse.autotune.choice import BackendSelector, Choice
from lightning_estdgm.sparse.autotune.timing_cache import Measurements, folder, read_file
from lightning_estdgm.sparse.backends.protocol import get_backend
from lightning_estdgm.sparse.buckets import BUCKETS, bucket_of
from lightning_estdgm.sparse.conv import ConvGeometry

LAYER = {
    "tokens": 64,
    "out_features": 64,
    "in_features": 96,
    "block_size": 16,
    "dtype": torch.float32,
    "device": torch.device("cpu"),
}


class Clock:
    """Dense takes 9 ms; sparse takes a share of it that rises with the density. Counts what it was asked."""

    def __init__(self, sparse_share=lambda density: 2 * density):
        self.sparse_share = sparse_share
        self.asked = []

    def __call__(self, case, names):
        self.asked.append((case, tuple(names)))
        return {name: 9e-3 * (1.0 if name == "dense" else self.sparse_share(case.density)) for name in names}


def _never(case, names):
    raise AssertionError(f"measured {names} on {case}")


def _case(**change):
    return Case(**{**LAYER, "density": 0.25, **change})


CONV = {
    "batch": 2,
    "height": 9,
    "width": 6,
    "out_channels": 32,
    "in_channels": 48,
    "geometry": ConvGeometry((3, 1), (2, 1), (1, 0)),
    "block_size": 16,
    "dtype": torch.float32,
    "device": torch.device("cpu"),
}
POINTWISE = ConvGeometry((1, 1))


def _conv(**change):
    return ConvCase(**{**CONV, "density": 0.5, **change})


# ------------------------------------------------------------------------------------------------------ choice


def test_sparse_where_it_is_faster():
    clock = Clock(lambda density: 0.25)
    choice = BackendSelector(measure=clock).choose(_case(density=0.125))
    assert choice == Choice("cpu", 9e-3, 2.25e-3, "sparse 4.0x faster (2.25 against 9 ms)")
    ((case, names),) = clock.asked
    assert names[0] == "dense"
    assert "cpu" in names
    assert "reference" not in names  # never the oracle
    assert case == _case(density=0.125)


@pytest.mark.parametrize(
    ("share", "backend", "why"),
    [
        (0.94, "cpu", "sparse 1.1x faster (8.46 against 9 ms)"),
        (0.96, "dense", "dense: sparse is less than 5% faster (8.64 against 9 ms)"),
        (1.00, "dense", "dense faster: sparse takes 1.0x the time (9 against 9 ms)"),
        (2.00, "dense", "dense faster: sparse takes 2.0x the time (18 against 9 ms)"),
    ],
)
def test_sparse_must_be_five_percent_faster(share, backend, why):
    choice = BackendSelector(measure=Clock(lambda density: share)).choose(_case(density=0.5))
    assert (choice.backend, choice.why) == (backend, why)
    assert (choice.dense_s, choice.sparse_s) == (9e-3, pytest.approx(9e-3 * share))


def test_densities_of_one_bucket_are_measured_once_and_never_sparser_than_asked():
    clock = Clock()
    selector = BackendSelector(measure=clock)
    choices = [selector.choose(_case(density=d)) for d in (0.11, 0.125, 0.094, 0.125 + 1e-12)]
    assert len(set(choices)) == 1
    assert [case.density for case, _ in clock.asked] == [0.125]
    selector.choose(_case(density=0.1251))
    assert [case.density for case, _ in clock.asked] == [0.125, 0.15625]


def test_a_win_answers_lower_densities_and_a_loss_higher_ones():
    clock = Clock()  # sparse pays below 0.475
    selector = BackendSelector(measure=clock)
    assert selector.choose(_case(density=0.25)).backend == "cpu"
    assert selector.choose(_case(density=0.75)).backend == "dense"
    assert len(clock.asked) == 2
    lower, higher = selector.choose(_case(density=0.10)), selector.choose(_case(density=1.0))
    assert lower == Choice("cpu", None, None, "sparse already faster at density 0.25")
    assert higher == Choice("dense", None, None, "dense already faster at density 0.75")
    assert len(clock.asked) == 2
    selector.choose(_case(density=0.5))  # between the two: not known yet
    assert len(clock.asked) == 3


@given(st.floats(0.001, 1.0))
def test_buckets_round_up_and_are_their_own_buckets(density):
    bucket = bucket_of(density)
    assert density <= bucket / BUCKETS + 1e-9 <= max(1.5 * density, density + 1 / BUCKETS) + 1e-8
    assert bucket <= BUCKETS
    assert bucket_of(bucket / BUCKETS) == bucket


def test_buckets_are_few():
    assert {bucket_of(d / 1000) for d in range(1, 1001)} == {*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32}


@given(st.lists(st.floats(0.001, 1.0), max_size=40), st.floats(0.5, 8.0))
def test_inference_never_changes_the_answer_and_saves_measurements(densities, slope):
    clock = Clock(lambda density: slope * density)
    selector = BackendSelector(measure=clock)
    for density in densities:
        bucket = bucket_of(density) / BUCKETS
        expected = "cpu" if slope * bucket <= 0.95 else "dense"
        assert selector.choose(_case(density=density)).backend == expected
    measured = [case.density for case, _ in clock.asked]
    assert len(measured) == len(set(measured))
    # Asked again in any order, everything is known.
    asked = len(clock.asked)
    for density in reversed(densities):
        selector.choose(_case(density=density))
    assert len(clock.asked) == asked


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 65},
        {"out_features": 128},
        {"in_features": 128},
        {"block_size": 8},
        {"dtype": torch.bfloat16},
        {"frozen": True},
        {"transposed": True},
    ],
    ids=str,
)
def test_another_layer_is_measured_by_itself(change):
    clock = Clock()
    selector = BackendSelector(measure=clock)
    selector.choose(_case(density=0.125))
    selector.choose(_case(density=0.125, **change))
    assert [case for case, _ in clock.asked] == [_case(density=0.125), _case(density=0.125, **change)]


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 3},
        {"height": 8},
        {"width": 5},
        {"out_channels": 64},
        {"in_channels": 64},
        {"geometry": ConvGeometry((1, 1), (2, 1))},
        {"dtype": torch.float64},
        {"frozen": True},
        {"channels_last": False},
    ],
    ids=str,
)
def test_another_convolution_is_measured_by_itself(change):
    clock = Clock()
    selector = BackendSelector(measure=clock)
    cases = [_conv(geometry=POINTWISE), _conv(**{"geometry": POINTWISE, **change})]
    for case in [*cases, *cases]:
        selector.choose(case)
    assert [case for case, _ in clock.asked] == cases


def test_single_weight_masks_run_dense():
    choice = BackendSelector(measure=_never).choose(_case(block_size=1, density=0.1))
    assert choice == Choice("dense", None, None, "single-weight masks have no sparse operator")


def test_without_a_backend_for_the_case_dense_says_why():
    choice = BackendSelector(measure=_never).choose(_case(block_size=4, density=0.1))
    assert (choice.backend, choice.dense_s, choice.sparse_s) == ("dense", None, None)
    assert choice.why.startswith("no sparse backend: ")
    assert "cpu needs blocks of at least 8" in choice.why


# ------------------------------------------------------------------------------------------------------ forced


@pytest.mark.parametrize("name", ["dense", "cpu", "reference"])
def test_a_forced_backend_is_used_without_measuring(name):
    choice = BackendSelector(forced=name, measure=_never).choose(_case(density=0.9))
    assert choice == Choice(name, None, None, "forced")


@pytest.mark.parametrize("name", ["dense", "reference"])
def test_forced_on_single_weights(name):
    assert BackendSelector(name).choose(_case(block_size=1, density=0.5)).backend == name


@pytest.mark.parametrize("change", [{"block_size": 1}, {"block_size": 4}, {"dtype": torch.int32}], ids=str)
def test_a_forced_backend_never_falls_back(change):
    with pytest.raises(ValueError, match="backend 'cpu' was forced, but cannot run this layer: it needs"):
        BackendSelector("cpu").choose(_case(density=0.5, **change))


def test_an_unknown_forced_backend_raises():
    with pytest.raises(ValueError, match=r"unknown backend 'cuda', expected one of: dense, .*cpu.*reference"):
        BackendSelector("cuda")


# ----------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"out_features": 60}, "out_features must be a positive multiple of block size 16, got 60"),
        ({"in_features": 0}, "in_features must be a positive multiple of block size 16, got 0"),
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"density": 1.01}, r"density must be in \(0, 1\], got 1.01"),
        ({"density": float("nan")}, r"density must be in \(0, 1\], got nan"),
    ],
)
def test_a_case_that_cannot_be_raises(change, message):
    with pytest.raises(ValueError, match=message):
        _case(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"in_channels": 40}, "in_channels must be a positive multiple of block size 16, got 40"),
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"geometry": ConvGeometry((11, 1))}, "an input of 9 x 6 is too small for ConvGeometry"),
    ],
)
def test_a_convolution_that_cannot_be_raises(change, message):
    with pytest.raises(ValueError, match=message):
        _conv(**change)


# ------------------------------------------------------------------------------------------------------- state

QUESTIONS = [
    case(density=density, frozen=frozen)
    for case in (_case, lambda **change: _conv(geometry=POINTWISE, **change))
    for frozen in (False, True)
    for density in (0.3, 0.9, 0.1, 1.0)
]


def _saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_a_restored_selector_gives_the_very_same_choices_without_measuring():
    first = BackendSelector(measure=Clock())
    choices = [first.choose(question) for question in QUESTIONS]
    assert {choice.backend for choice in choices} == {"dense", "cpu"}
    restored = BackendSelector(measure=_never)
    restored.load_state_dict(_saved_and_loaded(first.state_dict()))
    assert [restored.choose(question) for question in QUESTIONS] == choices
    assert restored.state_dict() == first.state_dict()
    # The control: on a machine where sparse is slow, a selector that was not restored chooses otherwise.
    other = BackendSelector(measure=Clock(lambda density: 3.0))
    assert [other.choose(question) for question in QUESTIONS] != choices


def test_a_state_from_before_convolutions_is_understood():
    row = {
        "tokens": 64, "out_features": 64, "in_features": 96, "block_size": 16, "dtype": "float32", "device": "cpu",
        "frozen": False, "transposed": False, "bucket": 8,
        "backend": "cpu", "dense_s": 2.0, "sparse_s": 1.0, "why": "once measured",
    }  # fmt: skip
    selector = BackendSelector(measure=_never)
    selector.load_state_dict({"choices": [row]})
    assert selector.choose(_case(density=0.25)) == Choice("cpu", 2.0, 1.0, "once measured")


def test_restoring_replaces_what_was_known():
    known = BackendSelector(measure=Clock())
    known.choose(_case(density=0.1))
    known.load_state_dict(BackendSelector().state_dict())
    assert known.state_dict() == {"choices": []}


@pytest.mark.parametrize("state", [{}, {"choices": [{"tokens": 3}]}, {"choices": 3}, None], ids=str)
def test_a_state_of_something_else_raises_and_changes_nothing(state):
    selector = BackendSelector(measure=Clock())
    selector.choose(_case(density=0.1))
    before = selector.state_dict()
    with pytest.raises(ValueError, match=r"expected a state from BackendSelector\.state_dict\(\), got"):
        selector.load_state_dict(state)
    assert selector.state_dict() == before


def test_a_restored_choice_of_a_backend_that_is_gone_raises():
    selector = BackendSelector(measure=Clock())
    selector.choose(_case(density=0.1))
    state = selector.state_dict()
    state["choices"][0]["backend"] = "gone"
    selector.load_state_dict(state)
    with pytest.raises(ValueError, match="unknown backend 'gone', expected one of"):
        selector.choose(_case(density=0.1))


# ----------------------------------------------------------------------------------------------- measured for real


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "estdgm":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def test_a_real_measurement_has_the_right_structure():
    choice = BackendSelector().choose(_case(density=0.25))
    assert choice.backend in {"dense", "cpu", "native"}
    assert choice.dense_s is not None
    assert choice.sparse_s is not None
    assert choice.dense_s > 0
    assert choice.sparse_s > 0
    assert "ms)" in choice.why
    if choice.backend != "dense":
        assert choice.sparse_s < choice.dense_s


@pytest.mark.parametrize(
    "ambient",
    [
        torch.enable_grad,
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
    ],
    ids=["enable_grad", "no_grad", "inference_mode", "autocast", "device"],
)
@pytest.mark.parametrize("change", [{}, {"frozen": True}, {"transposed": True}], ids=str)
def test_measuring_runs_forward_and_backward_in_the_dtype_asked_and_leaves_no_trace(ambient, change):
    state, threads, mode = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()
    with ambient(), _Operators() as operators:
        times = measure_case(_case(**change), ["dense", "cpu"], rounds=2)
    assert set(times) == {"dense", "cpu"}
    assert all(0 < seconds < math.inf for seconds in times.values())
    names = [func.name().removeprefix("estdgm::") for func, _ in operators.calls]
    assert sorted(set(names)) == ["masked_linear", "masked_linear_grad_input", "masked_linear_grad_weight"]
    assert 3 <= names.count("masked_linear") <= 1 + MOST_ROUNDS  # one to warm up, two or more that count
    for func, args in operators.calls:
        assert args[0].dtype == torch.float32
        if func.name() == "estdgm::masked_linear":
            assert args[-1] is bool(change.get("frozen"))
            assert args[1].shape == (64, 96)
            assert (args[1].stride(0) == 1) == bool(change.get("transposed"))
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, mode)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_convolution_is_measured_as_it_lies_in_memory(frozen, channels_last):
    case = _conv(frozen=frozen, channels_last=channels_last)
    with _Operators() as operators:
        times = measure_case(case, ["dense", "reference"], rounds=1)
    assert set(times) == {"dense", "reference"}
    names = [func.name() for func, _ in operators.calls]
    assert sorted(set(names)) == [f"estdgm::masked_conv2d{part}" for part in ("", "_grad_input", "_grad_weight")]
    for func, args in operators.calls:
        if func.name() == "estdgm::masked_conv2d":
            assert args[0].shape == (2, 48, 9, 6)
            assert args[1].shape == (32, 48, 3, 1)
            assert args[1].is_contiguous(memory_format=torch.channels_last) == channels_last
            assert args[-1] is frozen
    problem = case.problem()
    for name in ("dense", "reference"):
        y = problem.forward(name)
        assert y.shape == problem.dy.shape
        assert y.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_refusals_of_a_convolution_know_its_geometry():
    assert refusals(_conv(geometry=POINTWISE))["cpu"] is None
    assert "needs blocks of at least 8" in refusals(_conv(block_size=4, geometry=POINTWISE))["cpu"]


@pytest.mark.parametrize(
    ("seconds", "settled"),
    [([5.0, 1.0, 1.09], True), ([5.0, 1.0, 1.11], False), ([2.0, 1.0, 2.0], False), ([3.0, 3.0, 3.0], True)],
)
def test_a_timing_counts_once_its_two_fastest_turns_agree(seconds, settled):
    assert _settled(seconds) is settled


@pytest.mark.parametrize("density", [1e-6, 0.25, 1.0])
def test_the_measured_mask_has_the_density_asked_and_is_always_the_same(density):
    case = _case(density=density)
    topology = case.topology()
    assert topology.shape == (64, 96)
    assert topology.nnz == max(1, round(density * 24))
    assert torch.equal(topology.mask(), case.topology().mask())


# ------------------------------------------------------------------------------------------------- kept on disk


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A machine on which nothing was measured yet: the folder of its measurements."""
    monkeypatch.setenv(measurements.ENVIRONMENT, str(tmp_path / "choices"))
    return tmp_path / "choices"


def _file(kept):
    (path,) = kept.glob("*.json")
    return path


def _rows(kept):
    return read_file(_file(kept))[1]


def test_no_test_touches_the_users_measurements():
    assert os.environ[measurements.ENVIRONMENT] == "off"
    assert folder() is None
    clock = Clock()
    for _ in range(2):
        BackendSelector(measure=clock, kept=Measurements()).choose(_case())
    assert len(clock.asked) == 2


def test_without_a_word_they_lie_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for word in (None, ""):
        monkeypatch.delenv(measurements.ENVIRONMENT) if word is None else monkeypatch.setenv("ESTDGM_CHOICES", word)
        assert folder() == tmp_path / "lightning_estdgm"
    monkeypatch.setenv("ESTDGM_CHOICES", "off")
    assert folder() is None


@pytest.mark.parametrize("case", [_case, lambda **change: _conv(geometry=POINTWISE, **change)], ids=["linear", "conv"])
def test_what_was_measured_once_is_not_measured_by_the_next_run(kept, case):
    clock = Clock()
    densities = (0.25, 0.75, 0.125, 1.0)
    first = [BackendSelector(measure=clock, kept=Measurements()).choose(case(density=densities[0]))]
    selector = BackendSelector(measure=clock, kept=Measurements())
    first += [selector.choose(case(density=density)) for density in densities[1:]]
    assert [row.density for row in _rows(kept)] == [0.25, 0.75]  # and neither of the two that were inferred
    selector = BackendSelector(measure=_never, kept=Measurements())
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
    BackendSelector("cpu", measure=_never, kept=Measurements()).choose(_case())
    assert not kept.exists()


def test_the_file_is_for_people_too(kept):
    BackendSelector(measure=Clock(), kept=Measurements()).choose(_case())
    content = json.loads(_file(kept).read_text())
    assert content["machine"]["device"] == measurements.cpu_model()
    assert content["machine"]["threads"] == torch.get_num_threads()
    assert content["machine"]["torch"] == torch.__version__
    (row,) = content["measurements"]
    assert row["layer"] == {**LAYER, "dtype": "float32", "device": "cpu", "frozen": False, "transposed": False}
    assert set(row["seconds"]) == {"dense", *(n for n, why in refusals(_case()).items() if why is None)}


CHANGES = {
    "device": lambda m: m.setattr(measurements, "cpu_model", lambda: "Another CPU"),
    "threads": lambda m: m.setattr(torch, "get_num_threads", lambda: 99),
    "torch": lambda m: m.setattr(torch, "__version__", "9.9"),
    "a version": lambda m: m.setattr(measurements, "_version", lambda distribution: f"{distribution} 9.9"),
    "the source": lambda m: m.setattr(measurements, "_digest", lambda module: "other"),
    "a build": lambda m: m.setattr(type(get_backend("native")), "build", lambda self, device: "other"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_machine_or_version_measures_by_itself(kept, monkeypatch, change):
    BackendSelector(measure=Clock(), kept=Measurements()).choose(_case())
    clock = Clock()
    with monkeypatch.context() as patch:
        CHANGES[change](patch)
        BackendSelector(measure=clock, kept=Measurements()).choose(_case())
    assert len(clock.asked) == 1
    assert len(list(kept.glob("*.json"))) == 2
    BackendSelector(measure=_never, kept=Measurements()).choose(_case())


def test_backends_that_come_or_go_are_measured_with_the_others(kept, monkeypatch):
    if refusals(_case())["native"] is not None:
        pytest.skip("the native backend is not here")
    with monkeypatch.context() as patch:
        patch.setattr(selection, "refusals", lambda case: {**refusals(case), "native": "is gone"})
        BackendSelector(measure=Clock(), kept=Measurements()).choose(_case())
    assert set(_rows(kept)[0].seconds) == {"dense", "cpu"}
    clock = Clock()
    BackendSelector(measure=clock, kept=Measurements()).choose(_case())
    assert len(clock.asked) == 1
    assert [set(row.seconds) for row in _rows(kept)] == [{"dense", "cpu", "native"}]


def _content(change):
    row = {"layer": {**LAYER, "dtype": "float32", "device": "cpu", "frozen": False, "transposed": False}}
    row |= {"density": 0.25, "seconds": {"dense": 1.0, "cpu": 2.0}, "when": "2026-01-01T00:00Z"}
    content = {"format": 1, "machine": {}, "measurements": [row]}
    change(content, row)
    return json.dumps(content).encode()


BROKEN = {
    "empty": b"",
    "cut off": _content(lambda content, row: None)[:-30],
    "not text": b"\xff\x00",
    "not a table": b"[1, 2]",
    "of a later format": _content(lambda content, row: content.update(format=2)),
    "rows of something else": _content(lambda content, row: row.update(layer={"tokens": 3})),
    "a row too short": _content(lambda content, row: row.pop("when")),
    "no time": _content(lambda content, row: row["seconds"].update(cpu=float("nan"))),
    "nothing to compare": _content(lambda content, row: row["seconds"].pop("cpu")),
    "a list of times": _content(lambda content, row: row.update(seconds=[1.0, 2.0])),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_file_is_said_once_and_written_anew(kept, broken):
    BackendSelector(measure=Clock(), kept=Measurements()).choose(_case())
    _file(kept).write_bytes(BROKEN[broken])
    selector = BackendSelector(measure=Clock(), kept=Measurements())
    with pytest.warns(RuntimeWarning, match="measured times of layers are not used.*does not hold") as said:
        choices = [selector.choose(_case(density=density)) for density in (0.25, 0.75)]
    assert len(said) == 1
    assert [choice.dense_s for choice in choices] == [9e-3, 9e-3]
    assert len(_rows(kept)) == 2


def test_what_the_broken_files_are_made_of_is_a_whole_one(kept):
    kept.mkdir()
    (kept / "whole.json").write_bytes(_content(lambda content, row: None))
    assert len(_rows(kept)) == 1


def test_a_folder_that_cannot_be_used_is_said_once_and_stops_nothing(kept):
    (kept.parent / "choices").write_text("no folder")
    selector = BackendSelector(measure=Clock(), kept=Measurements())
    with pytest.warns(RuntimeWarning, match="measured times of layers") as said:
        chosen = [selector.choose(_case(density=density)).backend for density in (0.25, 0.75)]
    assert chosen == ["cpu", "dense"]
    assert ["cannot be kept" in str(warning.message) for warning in said] == [False, True]  # nor read


def test_a_full_disk_leaves_the_old_file_whole(kept, monkeypatch):
    BackendSelector(measure=Clock(), kept=Measurements()).choose(_case())
    before = _file(kept).read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(measurements.json, "dump", full)
        with pytest.warns(RuntimeWarning, match="cannot be kept.*No space left"):
            BackendSelector(measure=Clock(), kept=Measurements()).choose(_case(tokens=3))
    assert _file(kept).read_bytes() == before
    assert {path.suffix for path in kept.iterdir()} == {".json", ".lock"}


WRITER = """
import sys, time
from pathlib import Path
import torch
from lightning_estdgm.ops.cases import Case
from lightning_estdgm.ops.measurements import Measurements

first, folder = int(sys.argv[1]), Path(sys.argv[2])
kept = Measurements()
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


def test_a_restored_choice_counts_for_more_than_the_file(kept):
    first = BackendSelector(measure=Clock())
    choice = first.choose(_case())
    slow = Clock(lambda density: 3.0)
    assert BackendSelector(measure=slow, kept=Measurements()).choose(_case()).backend == "dense"
    resumed = BackendSelector(measure=_never, kept=Measurements())
    resumed.load_state_dict(_saved_and_loaded(first.state_dict()))
    assert resumed.choose(_case()) == choice
    assert choice.backend == "cpu"
    # The control: a run that was not resumed asks the file.
    assert BackendSelector(measure=_never, kept=Measurements()).choose(_case()).backend == "dense"
