"""Top-k of scores that lie over ranks equals top-k of the gathered scores, bit for bit."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import distributed_jobs as jobs
from helpers.distributed_simulated import Meeting, assembled, layouts, local_of, ranks_of, spread
from lightning_estdgm.distributed._top_k import Ranking, top_k
from lightning_estdgm.distributed.adapters.fsdp1 import RangeShard
from lightning_estdgm.method import _masks as masks

INF = float("inf")
# Ties, both zeros, subnormal numbers, neighbours in the last bit, and both ends of the range.
VALUES = [0.0, -0.0, 1.0, 1.0 + 2**-23, 1.0 - 2**-24, 1e-45, -1e-45, 1e-38, 3e38, -3e38, -1.0, 0.1, INF, -INF]
SHAPES = st.one_of(
    st.tuples(st.sampled_from([3, 6, 12]), st.sampled_from([1, 4, 25])),
    st.tuples(st.just(6), st.just(2), st.just(3)),
)


def gathered_top_k(scores: Tensor, counts: list[int]) -> Tensor:
    return torch.cat([masks.top_k(s, k) for s, k in zip(scores.chunk(len(counts)), counts, strict=True)])


def sharded_top_k(layouts_: list[Any], all_scores: list[Tensor], all_counts: list[list[int]]) -> tuple[Any, int]:
    """Choose for several weights at once; all of them must be spread over the same number of ranks."""
    meeting = Meeting(ranks_of(layouts_[0]))
    shards = [spread(layout, meeting) for layout in layouts_]

    def job(rank: int) -> list[Tensor]:
        rankings = [
            Ranking(s[rank], lambda s=s, x=x: local_of(s[rank], x), k)
            for s, x, k in zip(shards, all_scores, all_counts, strict=True)
        ]
        return [mask() for mask in top_k(rankings)]

    results = meeting.run(job)
    whole = [assembled(s, [r[i] for r in results]) for i, s in enumerate(shards)]
    return whole, meeting.calls


@given(layout=layouts(SHAPES), data=st.data())
def test_it_equals_top_k_of_the_gathered_scores(layout: tuple[Any, ...], data: Any) -> None:
    shape = layout[1]
    n = int(torch.Size(shape).numel())
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    values = data.draw(
        st.lists(st.one_of(st.sampled_from(VALUES), st.floats(width=32, allow_nan=False)), min_size=n, max_size=n)
    )
    scores = torch.tensor(values, dtype=dtype).view(shape)
    parts = data.draw(st.sampled_from([1, 3]))
    counts = [data.draw(st.integers(0, n // parts)) for _ in range(parts)]
    (got,), _ = sharded_top_k([layout], [scores], [counts])
    assert torch.equal(got, gathered_top_k(scores, counts))


@pytest.mark.parametrize("k", [0, 1, 500, 999, 1000])
def test_one_value_everywhere_leaves_it_to_the_index(k: int) -> None:
    layout = ("range", (40, 25), [0, 7, 7, 300, 1000], True)
    (got,), _ = sharded_top_k([layout], [torch.full((40, 25), 0.5)], [[k]])
    assert torch.equal(got.flatten(), torch.arange(1000) < k)


def test_all_layers_share_a_few_all_reduces() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 32), (16, 8), (128, 16)]
    scores = [torch.randn(shape, generator=generator).abs() for shape in shapes]
    spans = [("range", shape, [0, 5, shape[0] * shape[1] // 2, shape[0] * shape[1]], False) for shape in shapes]
    wanted = [[300], [5], [1999]]
    got, calls = sharded_top_k(spans, scores, wanted)
    assert all(torch.equal(g, gathered_top_k(s, k)) for g, s, k in zip(got, scores, wanted, strict=True))
    assert calls == 1 + 4  # NaNs; the bytes of float32. No ties: none for the index
    _, calls = sharded_top_k(spans, [s.round() for s in scores], wanted)
    assert calls == 1 + 4 + 2  # 2,048 positions need two bytes


def test_bad_input_is_refused_on_every_rank() -> None:
    layout = ("range", (4, 5), [0, 3, 20], False)
    with pytest.raises(ValueError, match=r"k must lie in \[0, 20\] for 20 scores, got \[21\]"):
        sharded_top_k([layout], [torch.zeros(4, 5)], [[21]])
    scores = torch.zeros(4, 5)
    scores[0, 0] = float("nan")
    with pytest.raises(ValueError, match="scores must not be NaN"):
        sharded_top_k([layout], [scores], [[3]])


def select_in_a_job(seed: int, cuts: list[int], counts: list[int]) -> tuple[int, Tensor]:
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    scores = torch.randn(96, 50, generator=torch.Generator().manual_seed(seed)).mul(8).round().abs()
    shard = RangeShard((96, 50), cuts[rank], cuts[rank + 1] - cuts[rank], groups=(group,))
    (mask,) = top_k([Ranking(shard, lambda: shard.part(scores), counts)])
    return int(mask().sum()), shard.spread(mask().to(torch.uint8))


def test_four_processes() -> None:
    """Uneven and empty parts; 8 levels of score, so that nearly every element is tied."""
    results = jobs.run(select_in_a_job, 4, 3, [0, 1700, 1700, 4799, 4800], [700, 1, 1600])
    scores = torch.randn(96, 50, generator=torch.Generator().manual_seed(3)).mul(8).round().abs()
    whole = sum(part for _, part in results)
    assert torch.equal(whole.bool(), gathered_top_k(scores, [700, 1, 1600]))
    assert sum(n for n, _ in results) == 2301
    assert results[1][0] == 0
