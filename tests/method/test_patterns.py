"""N:M and constant fan-in, group by group in plain loops."""

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_estdgm.method._masks import active_units
from lightning_estdgm.method._patterns import FanIn, NofM, draw, drop_and_grow_in_groups, fitted


def cells(shape, m):
    """The index tuples of each group: `m` neighbours along the inputs, at one output and one place of the kernel."""
    groups = []
    for out in range(shape[0]):
        for place in itertools.product(*map(range, shape[2:])):
            groups += [[(out, first + i, *place) for i in range(m)] for first in range(0, shape[1], m)]
    return groups


def ranked(scores, where):
    return sorted(where, key=lambda at: (-scores[at].item(), at[1]))


masks_and_scores = st.tuples(st.sampled_from([(3, 8), (2, 4, 3), (2, 8, 2, 2)]), st.integers(0, 10**6))


def drawn(shape, seed, p=0.5):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, 6, shape, generator=generator).float() for _ in range(2)]  # with ties
    return torch.rand(shape, generator=generator) < p, *scores


@given(masks_and_scores, st.integers(0, 4))
def test_n_of_m_takes_the_largest_of_each_group(case, n):
    shape, _ = case
    _, scores, _ = drawn(*case)
    k = scores.numel() * n // 4
    mask = draw(NofM(4), scores, k)
    for group in cells(shape, 4):
        assert {at for at in group if mask[at]} == set(ranked(scores, group)[:n])
    assert active_units(mask) == fitted(NofM(4), scores.shape, k) == k


@given(masks_and_scores, st.integers(1, 4), st.floats(0, 1))
def test_an_exchange_keeps_the_best_and_fills_each_group(case, n, share):
    shape, _ = case
    mask, keep_scores, grow_scores = drawn(*case)
    keep = int(share * active_units(mask))
    new = drop_and_grow_in_groups(NofM(4), mask, keep_scores, grow_scores, mask.numel() * n // 4, keep)
    active = sorted((tuple(at) for at in mask.nonzero().tolist()), key=lambda at: (-keep_scores[at].item(), at))
    kept = set(active[:keep])
    for group in cells(shape, 4):
        stay = ranked(keep_scores, [at for at in group if at in kept])[:n]
        grown = ranked(grow_scores, [at for at in group if at not in stay])[: n - len(stay)]
        assert {at for at in group if new[at]} == {*stay, *grown}


@given(masks_and_scores, st.integers(1, 40), st.floats(0, 0.99))
def test_fan_in_is_constant_among_the_outputs_that_are_left(case, k, ablate):
    shape, _ = case
    mask, keep_scores, grow_scores = drawn(*case)
    k = min(k, mask.numel())
    size = mask[0].numel()
    keep = active_units(mask) // 2
    new = drop_and_grow_in_groups(FanIn(ablate), mask, keep_scores, grow_scores, k, keep)
    counts = {int(row.sum()) for row in new}
    assert len(counts - {0}) == 1
    fan_in = max(1, round(k / shape[0]))
    if ablate == 0.0:
        assert counts == {fan_in}
    assert active_units(new) <= fan_in * shape[0]
    assert max(counts) <= size
    assert draw(FanIn(ablate), keep_scores, k).flatten(1).sum(1).tolist() == [fan_in] * shape[0]


def test_an_output_without_salient_weights_goes_out_and_may_come_back():
    keep_scores = torch.tensor([[9.0, 8, 7, 6], [1, 1, 0, 0], [5, 4, 0, 0]])
    grow_scores = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 3, 2]])
    mask = torch.tensor([[True, True, False, False]] * 3)
    new = drop_and_grow_in_groups(FanIn(0.5), mask, keep_scores, grow_scores, 6, 4)
    assert new.tolist() == [[True, True, True, False], [False] * 4, [True, True, True, False]]
    grow_scores[1] = 9.0
    back = drop_and_grow_in_groups(FanIn(0.5), new, keep_scores, grow_scores, 6, 3)
    assert back.sum(1).tolist() == [3, 3, 0]
    spread = drop_and_grow_in_groups(
        FanIn(0.9), torch.eye(4, dtype=torch.bool), torch.ones(4, 4), torch.ones(4, 4), 12, 4
    )
    assert spread.sum(1).tolist() == [3, 3, 3, 3]  # one salient unit each, where 2.7 are asked for: never no output


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NofM(1), "m must be an int of at least 2, got 1"),
        (lambda: NofM(2.0), "m must be an int of at least 2, got 2.0"),
        (lambda: FanIn(1.0), "ablate must lie in [0, 1), got 1.0"),
        (lambda: draw(NofM(4), torch.rand(2, 6), 6), "inputs that are a multiple of 4, got a mask of (2, 6)"),
        (lambda: draw(NofM(4), torch.rand(2, 8), 6), "whole number of 4ths in every layer, got 0.375"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
