"""Cases of stacked experts: what is timed, how they are named, and the choice from them."""

import dataclasses
import math

import pytest
import torch

from helpers.autotune_cases import Clock, linear_case, never, saved_and_loaded
from lightning_estdgm.sparse.autotune import _expert_case
from lightning_estdgm.sparse.autotune._cases import DENSE, is_layer, layer_of
from lightning_estdgm.sparse.autotune._choice import BackendSelector
from lightning_estdgm.sparse.autotune._expert_case import DENSE_FORMS, ExpertCase
from lightning_estdgm.sparse.autotune._timing import measure_case
from lightning_estdgm.sparse.autotune._timing_cache import TimingCache


def expert_case(**change):
    fields = dataclasses.asdict(linear_case()) | {"experts": 3, "dense": "grouped"}
    return ExpertCase(**fields | change)


@pytest.mark.parametrize("dense", DENSE_FORMS)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_way_computes_the_same(dense, transposed):
    problem = expert_case(dense=dense, transposed=transposed, dtype=torch.float64).problem()
    x, stored = problem.leaves
    assert stored.shape == ((3, 96, 64) if transposed else (3, 64, 96))
    wanted = problem.forward("reference")
    assert wanted.shape == problem.dy.shape
    torch.testing.assert_close(problem.forward("cpu"), wanted)
    torch.testing.assert_close(problem.forward(DENSE), wanted)
    single = expert_case(dense=dense, transposed=transposed).problem()
    torch.testing.assert_close(single.forward(DENSE), single.forward("reference"))
    assert len(x) == (66 if dense == "batched" else 64)  # 22 rows for each of three


def test_few_rows_leave_experts_without():
    assert expert_case(tokens=2).counts() == [1, 1, 0]
    problem = expert_case(tokens=2).problem()
    torch.testing.assert_close(problem.forward(DENSE), problem.forward("reference"))


def test_of_a_stack_that_is_too_large_a_part_is_timed(monkeypatch):
    monkeypatch.setattr(_expert_case, "_TIMED_WEIGHTS", 2 * 64 * 96)
    case = expert_case()
    assert case.counts() == [21, 21]
    assert case.problem().leaves[1].shape == (2, 64, 96)
    assert expert_case(out_features=1600, in_features=1600).timed_experts == 1


def test_dense_and_sparse_are_timed_forward_and_backward():
    seconds = measure_case(expert_case(), [DENSE, "cpu"], rounds=1).seconds
    assert set(seconds) == {DENSE, "cpu"}
    assert all(math.isfinite(s) and s > 0 for s in seconds.values())


@pytest.mark.parametrize(
    ("change", "said"), [({"experts": 0}, "experts must be at least 1"), ({"dense": "x"}, "grouped, batched, loop")]
)
def test_what_cannot_be_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        expert_case(**change)


def test_a_stack_is_named_by_all_that_decides_its_time():
    layer = layer_of(expert_case())
    assert is_layer(layer)
    assert layer["experts"] == 3
    assert layer["dense"] == "grouped"
    others = [expert_case(experts=4), expert_case(dense="loop"), linear_case()]
    assert all(layer_of(other) != layer for other in others)


def test_choices_of_stacks_survive_a_checkpoint():
    selector = BackendSelector(measure=Clock())
    case = expert_case()
    assert selector.choose(case).backend != DENSE
    assert selector.choose(dataclasses.replace(case, density=1.0)).backend == DENSE
    loaded = BackendSelector(measure=never)
    loaded.load_state_dict(saved_and_loaded(selector.state_dict()))
    assert loaded.choose(case).backend == selector.choose(case).backend


def test_times_of_stacks_are_kept_for_the_next_run(monkeypatch, tmp_path):
    monkeypatch.setenv("ESTDGM_CHOICES", str(tmp_path))
    BackendSelector(measure=Clock(), kept=TimingCache()).choose(expert_case())
    assert "measured on" in BackendSelector(measure=never, kept=TimingCache()).choose(expert_case()).why
