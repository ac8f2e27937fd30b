"""Buckets of densities."""

from hypothesis import given
from hypothesis import strategies as st

from lightning_estdgm.sparse._buckets import BUCKETS, bucket_of


@given(st.floats(0.001, 1.0))
def test_buckets_round_up_and_are_their_own_buckets(density):
    bucket = bucket_of(density)
    assert density <= bucket / BUCKETS + 1e-9 <= max(1.5 * density, density + 1 / BUCKETS) + 1e-8
    assert bucket <= BUCKETS
    assert bucket_of(bucket / BUCKETS) == bucket


def test_buckets_are_few():
    assert {bucket_of(d / 1000) for d in range(1, 1001)} == {*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32}
