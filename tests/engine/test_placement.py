"""Placement of weights: sharded ones come to the same masks and norms as whole ones, for any cut."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.distributed_simulated import Meeting, assembled, layouts, local_of, ranks_of, spread
from lightning_estdgm.distributed._collectives import all_reduce
from lightning_estdgm.distributed.adapters.whole import Whole
from lightning_estdgm.engine._placement import ShardedWeight, WholeWeight, placement_of
from lightning_estdgm.method._masks import keep_active_, mask_shape

SHAPES = st.one_of(
    st.tuples(st.sampled_from([2, 4, 6]), st.sampled_from([2, 4])),
    st.tuples(st.sampled_from([2, 4]), st.just(2), st.just(3)),
)
SIZES = st.sampled_from([1, 2])


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Ranks:
    """One weight spread over the ranks of a layout."""

    def __init__(self, layout: Any, block_size: int) -> None:
        self.block_size = block_size
        self.meeting = Meeting(ranks_of(layout))
        self.shards = spread(layout, self.meeting)
        self.placements = [ShardedWeight(shard, block_size) for shard in self.shards]

    def each(self, job: Any) -> list[Any]:
        """Return what `job` gives on each rank, called with its shard and placement."""
        return self.meeting.run(lambda rank: job(self.shards[rank], self.placements[rank]))

    def whole(self, locals_: list[Tensor]) -> Tensor:
        """Return masks or norms of the whole weight from what each rank holds of them."""
        if self.block_size == 1:
            return assembled(self.shards, locals_)
        assert all(torch.equal(locals_[0], other) for other in locals_)
        return locals_[0]


@given(layout=layouts(SHAPES), block_size=SIZES)
def test_unit_norms_are_those_of_the_whole_weight_on_every_rank(layout: Any, block_size: int) -> None:
    weight = random(layout[1], 0)
    expected = WholeWeight(Whole(weight), block_size).unit_norms(weight)
    assert expected.shape == mask_shape(layout[1], block_size)
    ranks = Ranks(layout, block_size)
    for norms in ranks.each(lambda shard, placement: placement.unit_norms(local_of(shard, weight))):
        torch.testing.assert_close(norms, expected)


@given(layout=layouts(SHAPES), block_size=SIZES)
def test_masks_go_to_ranks_and_back_and_address_the_same_elements(layout: Any, block_size: int) -> None:
    weight = random(layout[1], 0)
    mask = random(mask_shape(layout[1], block_size), 1) > 0

    def masked(shard: Any, placement: ShardedWeight) -> tuple[Tensor, Tensor]:
        local, weights = placement.to_local(mask), local_of(shard, weight)
        assert tuple(local.shape) == placement.mask_shape(weights)
        return placement.to_whole(local), keep_active_(weights, placement.address(local), placement.grain)

    ranks = Ranks(layout, block_size)
    results = ranks.each(masked)
    assert all(torch.equal(whole, mask) for whole, _ in results)
    whole = WholeWeight(Whole(weight), block_size)
    expected = keep_active_(weight.clone(), whole.address(whole.to_local(mask)), whole.grain)
    assert torch.equal(assembled(ranks.shards, [weights for _, weights in results]), expected)


@given(layout=layouts(SHAPES), block_size=SIZES)
def test_an_observed_gradient_has_the_norms_that_it_has_whole(layout: Any, block_size: int) -> None:
    weight, gradient = random(layout[1], 0), random(layout[1], 1)
    mask = torch.ones(mask_shape(layout[1], block_size), dtype=torch.bool)
    whole = WholeWeight(Whole(weight), block_size)
    message = whole.observation(gradient, mask)
    assert message is not None
    expected = whole.observed_norm(weight, gradient, message)

    def observed(shard: Any, placement: ShardedWeight) -> tuple[Tensor, Tensor, Tensor]:
        local, own = local_of(shard, gradient), placement.to_local(mask)
        (summed,) = all_reduce([shard], [placement.observation(local, own)])
        norms = placement.observed_norm(local_of(shard, weight), local, summed)
        return norms, placement.took_part(summed), placement.total(summed)

    ranks = Ranks(layout, block_size)
    results = ranks.each(observed)
    torch.testing.assert_close(ranks.whole([norms for norms, _, _ in results]), expected)
    for _, took_part, total in results:
        assert took_part == ranks.meeting.ranks
        assert total > 0


@pytest.mark.parametrize("block_size", [1, 2])
def test_a_rank_without_a_gradient_says_so_and_one_with_infinity_is_heard_by_all(block_size: int) -> None:
    layout = ("range", (4, 2), [0, 3, 8], False)
    ranks = Ranks(layout, block_size)
    gradient = torch.ones(4, 2)
    mask = torch.ones(mask_shape((4, 2), block_size), dtype=torch.bool)

    def summed(value: float, without: int) -> list[tuple[float, float]]:
        gradient[0, 0] = value

        def observed(shard: Any, placement: ShardedWeight) -> tuple[float, float]:
            local = None if shard is ranks.shards[without] else local_of(shard, gradient)
            (total,) = all_reduce([shard], [placement.observation(local, placement.to_local(mask))])
            return placement.took_part(total).item(), placement.total(total).item()

        return ranks.each(observed)

    assert [took_part for took_part, _ in summed(1.0, without=1)] == [1, 1]
    assert [total for _, total in summed(1.0, without=0)] == [5, 5]  # ones: their squares, or their magnitudes
    assert [total for _, total in summed(torch.inf, without=1)] == [torch.inf] * 2


@given(layout=layouts(SHAPES), block_size=SIZES)
def test_scores_come_from_the_norms_of_the_whole_weight_and_gradients(layout: Any, block_size: int) -> None:
    weight, gradient = random(layout[1], 0), random(layout[1], 1)
    whole = WholeWeight(Whole(weight), block_size)
    assert whole.evidence(weight, gradient) is None
    expected = whole.score_norms(weight, gradient, None)

    def scored(shard: Any, placement: ShardedWeight) -> tuple[Tensor, Tensor, bool]:
        local, seen = local_of(shard, weight), local_of(shard, gradient)
        (evidence,) = all_reduce([shard], [placement.evidence(local, seen)])
        norm, gradient_norm = placement.score_norms(local, seen, evidence)
        assert gradient_norm is not None
        return norm, gradient_norm, placement.holds_nan(evidence)

    ranks = Ranks(layout, block_size)
    results = ranks.each(scored)
    for index, norms in enumerate(expected):
        torch.testing.assert_close(ranks.whole([result[index] for result in results]), norms)
    assert not any(found for _, _, found in results)
    weight.view(-1)[-1] = torch.nan
    assert all(found for _, _, found in ranks.each(scored))
    assert whole.holds_nan(whole.unit_norms(weight))


def test_the_shard_says_which_placement_it_is() -> None:
    whole, spread_out = Whole(torch.zeros(4, 4)), spread(("range", (4, 4), [0, 5, 16], False), Meeting(2))[0]
    assert isinstance(placement_of(whole, 2), WholeWeight)
    assert isinstance(placement_of(spread_out, 2), ShardedWeight)
    assert not placement_of(whole, 1).mask_is_local
    assert [placement_of(spread_out, size).mask_is_local for size in (1, 2)] == [True, False]
