"""Layer densities from one budget."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_estdgm.method._distributions import DISTRIBUTIONS, allocate, erk, uniform

side = st.integers(1, 64)
shape = st.tuples(side, side) | st.tuples(side, side, st.integers(1, 5), st.integers(1, 5))
shapes = st.lists(shape, min_size=1, max_size=6)
density = st.floats(0.001, 1.0)


@given(shapes, density)
def test_erk_keeps_to_the_budget_and_caps_at_one(shapes, density):
    got = erk(shapes, density)
    sizes = [math.prod(s) for s in shapes]
    assert all(0.0 < rho <= 1.0 for rho in got)
    assert sum(r * n for r, n in zip(got, sizes, strict=True)) == pytest.approx(density * sum(sizes), rel=1e-9)


@given(shapes, density)
def test_erk_is_proportional_below_the_cap_and_dense_only_where_it_would_exceed_one(shapes, density):
    got = erk(shapes, density)
    raw = [sum(s) / math.prod(s) for s in shapes]
    factors = [rho / r for rho, r in zip(got, raw, strict=True) if rho < 1.0]
    if factors:
        assert factors == pytest.approx([factors[0]] * len(factors))
        assert all(factors[0] * r >= 1.0 - 1e-9 for rho, r in zip(got, raw, strict=True) if rho == 1.0)


def test_erk_by_hand():
    # raw = 20/100 and 25/100 of 100 and 100 weights: epsilon = 0.2 * 200 / (20 + 25).
    assert erk([(10, 10), (5, 20)], 0.2) == pytest.approx([40 / 45 * 0.2, 40 / 45 * 0.25])
    # The small layer is capped; the other takes the rest.
    assert erk([(2, 2), (100, 100)], 0.5) == pytest.approx([1.0, (0.5 * 10_004 - 4) / 10_000])


@given(shapes, density)
def test_uniform_is_uniform(shapes, density):
    assert uniform(shapes, density) == [density] * len(shapes)


@given(shapes, density, st.sampled_from(sorted(DISTRIBUTIONS)))
def test_single_weights_meet_the_budget_exactly(shapes, density, name):
    counts = [math.prod(s) for s in shapes]
    got = allocate(counts, [1] * len(counts), DISTRIBUTIONS[name](shapes, density), density)
    assert all(1 <= k <= n for k, n in zip(got, counts, strict=True))
    assert sum(got) == max(round(density * sum(counts)), len(counts))


@given(shapes, density)
def test_each_layer_gets_its_share_rounded_up_or_down(shapes, density):
    counts = [math.prod(s) for s in shapes]
    ideal = [r * n for r, n in zip(erk(shapes, density), counts, strict=True)]
    got = allocate(counts, [1] * len(counts), erk(shapes, density), density)
    if min(ideal) >= 1.0:
        assert all(abs(k - x) < 1.0 + 1e-6 for k, x in zip(got, ideal, strict=True))


@given(
    layers=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 16, 32])), min_size=1, max_size=6
    ),
    density=density,
    name=st.sampled_from(sorted(DISTRIBUTIONS)),
)
def test_blocks_miss_the_budget_by_at_most_half_a_unit_or_what_one_unit_a_layer_costs(layers, density, name):
    shapes = [(r * b, c * b) for r, c, b in layers]
    counts, sizes = [r * c for r, c, _ in layers], [b * b for _, _, b in layers]
    got = allocate(counts, sizes, DISTRIBUTIONS[name](shapes, density), density)
    assert all(1 <= k <= n for k, n in zip(got, counts, strict=True))
    budget = round(density * sum(n * size for n, size in zip(counts, sizes, strict=True)))
    used = sum(k * size for k, size in zip(got, sizes, strict=True))
    assert abs(used - budget) <= max(max(sizes) / 2, sum(sizes) - budget)


def test_the_budget_is_met_to_the_nearest_unit():
    assert allocate([128], [256], [0.1], 0.1) == [13]  # 12.8 units
    assert allocate([124], [256], [0.1], 0.1) == [12]  # 12.4


def test_remainders_go_to_the_largest_and_ties_to_the_first():
    assert allocate([10, 10, 10], [1, 1, 1], [0.26, 0.29, 0.25], 8 / 30) == [3, 3, 2]
    assert allocate([10, 10], [1, 1], [0.25, 0.25], 0.25) == [3, 2]


def test_every_layer_keeps_a_unit_and_the_fattest_pays():
    assert allocate([100, 10, 10], [1, 1, 1], [0.1, 0.01, 0.01], 0.1) == [10, 1, 1]
    assert allocate([100, 10, 10], [1, 1, 1], [0.118, 0.01, 0.01], 0.1) == [10, 1, 1]
    assert allocate([5, 5], [1, 1], [0.001, 0.001], 0.001) == [1, 1]


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, math.nan])
@pytest.mark.parametrize(
    "call",
    [
        lambda d: erk([(4, 4)], d),
        lambda d: uniform([(4, 4)], d),
        lambda d: allocate([16], [1], [0.5], d),
    ],
)
def test_densities_outside_zero_to_one_are_refused(call, density):
    with pytest.raises(ValueError, match=rf"density must lie in \(0, 1\], got {density}"):
        call(density)
