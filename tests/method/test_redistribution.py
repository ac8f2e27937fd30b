"""Budgets that move between layers, against counting by hand."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_estdgm.method._redistribution import Budget, Scored, by_growth, globally


def layer(mask, keep, grow):
    return Scored(torch.tensor(mask, dtype=torch.bool), torch.tensor(keep), torch.tensor(grow))


LAYERS = [
    layer([1, 1, 1, 0, 0], [5.0, 1.0, 4.0, 9.0, 9.0], [2.0, 2.0, 2.0, 0.0, 7.0]),
    layer([1, 1, 0], [3.0, 2.0, 9.0], [1.0, 1.0, 8.0]),
]


def test_global_budgets_count_the_best_active_units_first():
    assert globally(LAYERS, 3, 0.0, False) == [Budget(2, 2), Budget(1, 1)]  # 5, 4, 3
    assert globally(LAYERS, 4, 0.5, True) == [Budget(1, 2), Budget(1, 2)]  # 5, 4, 3, 2
    assert globally(LAYERS, 6, 0.0, False) == [Budget(3, 3), Budget(2, 3)]  # and the inactive one of growth 8
    assert globally(LAYERS, 8, 0.0, False) == [Budget(3, 5), Budget(2, 3)]


def test_no_layer_is_left_without_a_unit():
    small = layer([1, 1, 1], [0.1, 0.2, 0.3], [0.0, 0.0, 0.0])
    assert globally([LAYERS[0], small], 2, 0.0, False) == [Budget(1, 1), Budget(1, 1)]


def test_growth_budgets_are_shared_out_by_mean_growth_score():
    # Half of 3 and of 2 are dropped: 1 and 1. Of the 2, layer 0 gets 2/3 by its mean of 2 against 1.
    assert by_growth(LAYERS, 5, 0.5, True) == [Budget(2, 3), Budget(1, 2)]
    assert by_growth(LAYERS, 7, 0.5, True) == [Budget(2, 5), Budget(1, 2)]  # 4 x 2/3 = 2.67, 4 x 1/3 = 1.33
    assert by_growth(LAYERS, 8, 0.5, True) == [Budget(2, 5), Budget(1, 3)]  # the first is full


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.floats(0, 5)), min_size=1, max_size=5),
    st.floats(0, 1),
    st.floats(0, 1),
    st.booleans(),
)
def test_growth_budgets_meet_the_total_and_fit_every_layer(sizes, drop, where, regrow):
    layers = [
        layer([1] * min(n, active) + [0] * (n - min(n, active)), [1.0] * n, [score] * n) for n, active, score in sizes
    ]
    kept = [int(x.mask.sum()) - int(drop * int(x.mask.sum())) for x in layers]
    room = [x.mask.numel() - (k if regrow else int(x.mask.sum())) for x, k in zip(layers, kept, strict=True)]
    total = sum(kept) + round(where * sum(room))
    budgets = by_growth(layers, total, drop, regrow)
    assert [b.keep for b in budgets] == kept
    assert sum(b.k for b in budgets) == total
    assert all(0 <= b.k - b.keep <= r for b, r in zip(budgets, room, strict=True))


def test_what_cannot_be_shared_out_is_refused():
    with pytest.raises(
        ValueError,
        match=re.escape(
            "a density that does not fall: 5 units stay of 4; take a schedule whose density stays or rises"
        ),
    ):
        by_growth(LAYERS, 4, 0.0, True)
    with pytest.raises(ValueError, match=re.escape("4 units are to be grown where 3 were inactive")):
        by_growth(LAYERS, 7, 0.5, False)
