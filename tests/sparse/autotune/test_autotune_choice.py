"""The never-slower choice. Times are injected: no test depends on how fast this machine is."""

import os
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.autotune_cases import POINTWISE, Clock, conv_case, linear_case, never, saved_and_loaded
from lightning_estdgm.sparse._buckets import BUCKETS, bucket_of, search_order
from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse.autotune._choice import BackendSelector, Choice
from lightning_estdgm.sparse.autotune._timing import Timing


def test_sparse_where_it_is_faster():
    clock = Clock(lambda density: 0.25)
    choice = BackendSelector(measure=clock).choose(linear_case(density=0.125))
    assert choice == Choice("cpu", 9e-3, 2.25e-3, "sparse 4.0x faster (2.25 against 9 ms)")
    ((case, names),) = clock.asked
    assert names[0] == "dense"
    assert "cpu" in names
    assert "reference" not in names  # never the oracle
    assert case == linear_case(density=0.125)


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
    choice = BackendSelector(measure=Clock(lambda density: share)).choose(linear_case(density=0.5))
    assert (choice.backend, choice.why) == (backend, why)
    assert (choice.dense_s, choice.sparse_s) == (9e-3, pytest.approx(9e-3 * share))


def test_densities_of_one_bucket_are_measured_once_and_never_sparser_than_asked():
    clock = Clock()
    selector = BackendSelector(measure=clock)
    choices = [selector.choose(linear_case(density=d)) for d in (0.11, 0.125, 0.094, 0.125 + 1e-12)]
    assert len(set(choices)) == 1
    assert [case.density for case, _ in clock.asked] == [0.125]
    selector.choose(linear_case(density=0.1251))
    assert [case.density for case, _ in clock.asked] == [0.125, 0.15625]


def test_a_win_answers_lower_densities_and_a_loss_higher_ones():
    clock = Clock()  # sparse pays below 0.475
    selector = BackendSelector(measure=clock)
    assert selector.choose(linear_case(density=0.25)).backend == "cpu"
    assert selector.choose(linear_case(density=0.75)).backend == "dense"
    assert len(clock.asked) == 2
    lower, higher = selector.choose(linear_case(density=0.10)), selector.choose(linear_case(density=1.0))
    assert lower == Choice("cpu", None, None, "sparse already faster at density 0.25")
    assert higher == Choice("dense", None, None, "dense already faster at density 0.75")
    assert len(clock.asked) == 2
    selector.choose(linear_case(density=0.5))  # between the two: not known yet
    assert len(clock.asked) == 3


def test_token_counts_of_one_bucket_are_measured_once_and_it_is_said():
    """As tokens scatter over experts: 16 counts around 128."""
    clock = Clock()
    selector = BackendSelector(measure=clock)
    counts = (102, 111, 117, 119, 121, 124, 126, 128, 129, 131, 133, 136, 140, 144, 150, 155)
    choices = {count: selector.choose(linear_case(tokens=count)) for count in counts}
    assert [case.tokens for case, _ in clock.asked] == [128]
    assert choices[128].why == "sparse 2.0x faster (4.5 against 9 ms)"
    assert choices[102].why == "sparse 2.0x faster (4.5 against 9 ms), timed with 128 tokens for 102"
    image = conv_case(geometry=POINTWISE, batch=33, density=0.25)
    assert selector.choose(image).why.endswith(", timed with 32 images for 33")
    # What follows from another density was not timed, so nothing is said of how.
    assert selector.choose(linear_case(tokens=102, density=0.1)).why == "sparse already faster at density 0.25"


@given(st.lists(st.floats(0.001, 1.0), max_size=40), st.floats(0.5, 8.0))
def test_inference_never_changes_the_answer_and_saves_measurements(densities, slope):
    clock = Clock(lambda density: slope * density)
    selector = BackendSelector(measure=clock)
    for density in densities:
        bucket = bucket_of(density) / BUCKETS
        expected = "cpu" if slope * bucket <= 0.95 else "dense"
        assert selector.choose(linear_case(density=density)).backend == expected
    measured = [case.density for case, _ in clock.asked]
    assert len(measured) == len(set(measured))
    # Asked again in any order, everything is known.
    asked = len(clock.asked)
    for density in reversed(densities):
        selector.choose(linear_case(density=density))
    assert len(clock.asked) == asked


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 128},
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
    selector.choose(linear_case(density=0.125))
    selector.choose(linear_case(density=0.125, **change))
    assert [case for case, _ in clock.asked] == [linear_case(density=0.125), linear_case(density=0.125, **change)]


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 4},
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
    cases = [conv_case(geometry=POINTWISE), conv_case(**{"geometry": POINTWISE, **change})]
    for case in [*cases, *cases]:
        selector.choose(case)
    assert [case for case, _ in clock.asked] == cases


def test_single_weights_are_measured_where_a_backend_computes_them():
    clock = Clock()
    BackendSelector(measure=clock).choose(linear_case(block_size=1, density=0.1))
    assert [names for _, names in clock.asked] == [("dense", "native")]


def test_without_a_backend_for_the_case_dense_says_why():
    choice = BackendSelector(measure=never).choose(linear_case(block_size=2, density=0.1))
    assert (choice.backend, choice.dense_s, choice.sparse_s) == ("dense", None, None)
    assert choice.why.startswith("no sparse backend: ")
    assert "cpu needs blocks of at least 8" in choice.why


@pytest.mark.parametrize("name", ["dense", "cpu", "reference"])
def test_a_forced_backend_is_used_without_measuring(name):
    choice = BackendSelector(forced=name, measure=never).choose(linear_case(density=0.9))
    assert choice == Choice(name, None, None, "forced")


@pytest.mark.parametrize("name", ["dense", "reference"])
def test_forced_on_single_weights(name):
    assert BackendSelector(name).choose(linear_case(block_size=1, density=0.5)).backend == name


@pytest.mark.parametrize("change", [{"block_size": 1}, {"block_size": 4}, {"dtype": torch.int32}], ids=str)
def test_a_forced_backend_never_falls_back(change):
    with pytest.raises(ValueError, match="backend 'cpu' was forced, but cannot run this layer: it needs"):
        BackendSelector("cpu").choose(linear_case(density=0.5, **change))


def test_an_unknown_forced_backend_raises():
    with pytest.raises(ValueError, match=r"unknown backend 'cuda', expected one of: dense, .*cpu.*reference"):
        BackendSelector("cuda")


QUESTIONS = [
    case(density=density, frozen=frozen)
    for case in (linear_case, lambda **change: conv_case(geometry=POINTWISE, **change))
    for frozen in (False, True)
    for density in (0.3, 0.9, 0.1, 1.0)
]


def test_a_restored_selector_gives_the_very_same_choices_without_measuring():
    first = BackendSelector(measure=Clock())
    choices = [first.choose(question) for question in QUESTIONS]
    assert {choice.backend for choice in choices} == {"dense", "cpu"}
    restored = BackendSelector(measure=never)
    restored.load_state_dict(saved_and_loaded(first.state_dict()))
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
    selector = BackendSelector(measure=never)
    selector.load_state_dict({"choices": [row]})
    assert selector.choose(linear_case(density=0.25)) == Choice("cpu", 2.0, 1.0, "once measured")


def test_a_state_from_before_buckets_of_tokens_answers_for_its_bucket():
    known = BackendSelector(measure=Clock())
    known.choose(linear_case(density=0.25))
    (row,) = known.state_dict()["choices"]
    rows = [{**row, "tokens": tokens, "why": f"once measured with {tokens}"} for tokens in (60, 70)]
    selector = BackendSelector(measure=never)
    selector.load_state_dict({"choices": rows})
    assert selector.choose(linear_case(density=0.25)).why == "once measured with 60"
    assert selector.choose(linear_case(tokens=70, density=0.25)).backend == "cpu"


def test_restoring_replaces_what_was_known():
    known = BackendSelector(measure=Clock())
    known.choose(linear_case(density=0.1))
    known.load_state_dict(BackendSelector().state_dict())
    assert known.state_dict() == {"choices": []}


@pytest.mark.parametrize("state", [{}, {"choices": [{"tokens": 3}]}, {"choices": 3}, None], ids=str)
def test_a_state_of_something_else_raises_and_changes_nothing(state):
    selector = BackendSelector(measure=Clock())
    selector.choose(linear_case(density=0.1))
    before = selector.state_dict()
    with pytest.raises(ValueError, match=r"expected a state from BackendSelector\.state_dict\(\), got"):
        selector.load_state_dict(state)
    assert selector.state_dict() == before


def test_a_restored_choice_of_a_backend_that_is_gone_raises():
    selector = BackendSelector(measure=Clock())
    selector.choose(linear_case(density=0.1))
    state = selector.state_dict()
    state["choices"][0]["backend"] = "gone"
    selector.load_state_dict(state)
    with pytest.raises(ValueError, match="unknown backend 'gone', expected one of"):
        selector.choose(linear_case(density=0.1))


def test_a_real_measurement_has_the_right_structure():
    choice = BackendSelector().choose(linear_case(density=0.25))
    assert choice.backend in {"dense", "cpu", "native"}
    assert choice.dense_s is not None
    assert choice.sparse_s is not None
    assert choice.dense_s > 0
    assert choice.sparse_s > 0
    assert "ms)" in choice.why
    if choice.backend != "dense":
        assert choice.sparse_s < choice.dense_s


# ------------------------------------------------------------------ what is going to be measured, and what was


def test_what_will_be_measured_is_told_before_and_what_was_after():
    selector = BackendSelector(measure=Clock())
    assert selector.report() == ""
    cases = [linear_case(tokens=tokens, density=d) for tokens in (60, 64, 256) for d in (0.1, 0.25, 0.3, 0.9, 1.0)]
    plan = selector.plan(cases)
    assert plan.startswith("dense and sparse products are timed on this machine: up to 8 cases (2 shapes of layer and ")
    assert re.search(r"about \d+ s$", plan)
    assert not any(map(selector.answers, cases))
    for case in cases:
        selector.choose(case)
    assert all(map(selector.answers, cases))
    assert re.fullmatch(r"8 cases timed in 0\.0 s\.", selector.report())
    assert selector.report() == ""
    assert selector.plan(cases) == ""


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=30), st.floats(0.3, 30.0))
def test_no_more_is_measured_than_was_planned(densities, slope):
    """The density that users are shown first, which may be any, then those of the search."""
    clock = Clock(lambda density: slope * density)
    selector = BackendSelector(measure=clock)
    cases = [linear_case(density=density) for density in (densities[0], *search_order(densities))]
    (most,) = re.findall(r"up to (\d+) case", selector.plan(cases))
    for case in cases:
        selector.choose(case)
    assert 1 <= len(clock.asked) <= int(most)
    assert all(selector.answers(linear_case(density=density)) for density in densities)


@pytest.mark.parametrize(
    ("selector", "case"),
    [
        (BackendSelector("cpu", measure=never), linear_case()),
        (BackendSelector(measure=never), linear_case(block_size=2)),
    ],
    ids=["forced", "no backend"],
)
def test_nothing_is_planned_where_nothing_can_be_measured(selector, case):
    assert selector.plan([case]) == ""
    selector.choose(case)
    assert selector.report() == ""


def test_a_busy_machine_and_rounds_that_disagree_are_reported():
    timings = [
        Timing({"dense": [2.0, 2.0], "cpu": [1.0, 3.0]}, own_share=0.62, load=0.5),
        Timing({"dense": [2.0, 2.0], "cpu": [1.0, 1.0]}, own_share=0.99, load=0.5),
    ]
    left = list(timings)
    selector = BackendSelector(measure=lambda case, names: left.pop())
    for tokens in (64, 256):
        selector.choose(linear_case(tokens=tokens))
    cores = os.cpu_count()
    assert selector.report() == (
        "2 cases timed in 0.0 s; 1 with rounds that did not all say the same, timed again. The machine was busy during "
        f"1 of them (this process had 62% of its core, load average {cores / 2:.1f} on {cores} core{'s' * (cores > 1)})"
        ": choices may be others where it is not, and are timed again by the next run that finds it calm."
    )
