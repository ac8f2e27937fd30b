"""How parts lie in the whole, for any cut of any weight: checked against the whole weight on one device."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.distributed_simulated import assembled, layouts, local_of, spread
from lightning_estdgm.distributed.adapters.whole import Whole
from lightning_estdgm.method._masks import keep_active_, mask_shape

SHAPES = st.one_of(
    st.tuples(st.sampled_from([2, 4, 6, 8]), st.sampled_from([2, 4, 6])),
    st.tuples(st.sampled_from([2, 4]), st.sampled_from([2, 4]), st.just(3)),
    st.tuples(st.sampled_from([2, 4]), st.sampled_from([2, 4]), st.just(2), st.just(3)),
)


@given(layout=layouts(SHAPES))
def test_parts_make_up_the_whole_and_know_where_they_lie(layout: tuple[Any, ...]) -> None:
    shape = layout[1]
    whole = torch.arange(int(torch.Size(shape).numel())).view(shape)
    shards = spread(layout)
    parts = [local_of(s, whole) for s in shards]
    assert torch.equal(assembled(shards, parts), whole)
    assert sum(p.numel() for p in parts) == whole.numel()
    for shard, part in zip(shards, parts, strict=True):
        assert torch.equal(shard.index(torch.device("cpu")), part)
        assert part.untyped_storage().nbytes() == part.nbytes  # not the whole, kept alive by a view


@given(layout=layouts(SHAPES), data=st.data())
def test_units_cut_by_a_border_are_summed_and_masked_as_on_one_device(layout: tuple[Any, ...], data: Any) -> None:
    shape, block_size = layout[1], data.draw(st.sampled_from([2, (2, 1), (1, 2)]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    active = torch.rand(mask_shape(shape, block_size), generator=generator) < 0.5
    shards = spread(layout)
    expected = Whole(weight)
    sums = sum(s.pool(local_of(s, weight).square(), block_size) for s in shards)
    torch.testing.assert_close(sums, expected.pool(weight.square(), block_size))
    masked = []
    for shard in shards:
        local = local_of(shard, weight)
        masked.append(keep_active_(local, shard.expand(active, block_size), shard.grain(block_size)))
    assert torch.equal(assembled(shards, masked), keep_active_(weight.clone(), active, block_size))
