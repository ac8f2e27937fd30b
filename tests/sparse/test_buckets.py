"""Buckets of densities and of token counts."""

import math

from hypothesis import given
from hypothesis import strategies as st

from lightning_estdgm.sparse._buckets import BUCKETS, bucket_of, count_bucket, search_order


@given(st.floats(0.001, 1.0))
def test_buckets_round_up_and_are_their_own_buckets(density):
    bucket = bucket_of(density)
    assert density <= bucket / BUCKETS + 1e-9 <= max(1.5 * density, density + 1 / BUCKETS) + 1e-8
    assert bucket <= BUCKETS
    assert bucket_of(bucket / BUCKETS) == bucket


def test_buckets_are_few():
    assert {bucket_of(d / 1000) for d in range(1, 1001)} == {*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32}


@given(st.integers(1, 2**40))
def test_counts_go_to_the_nearest_power_of_two_by_ratio(count):
    bucket = count_bucket(count)
    assert bucket & (bucket - 1) == 0
    assert max(bucket / count, count / bucket) <= math.sqrt(2) * (1 + 1e-12)
    assert count_bucket(bucket) == bucket


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=40))
def test_a_search_asks_the_ends_first_and_for_each_bucket_once(densities):
    order = [bucket_of(density) for density in search_order(densities)]
    assert sorted(order) == sorted({bucket_of(density) for density in densities})
    assert order[0] == min(order)
    assert order[:2][-1] == max(order)
