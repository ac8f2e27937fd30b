"""The never-slower choice. Times are injected: no test depends on how fast this machine is."""

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_estdgm.ops.cases import MOST_ROUNDS, Case, _settled, measure_case
from lightning_estdgm.ops.selection import BUCKETS, BackendSelector, Choice, bucket_of

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


# ------------------------------------------------------------------------------------------------------- state

QUESTIONS = [_case(density=density, frozen=frozen) for frozen in (False, True) for density in (0.3, 0.9, 0.1, 1.0)]


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
