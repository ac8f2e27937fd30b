"""Masks over units: exact top-k, drop-and-grow, packing, and filling on any strides."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_estdgm.method._masks import (
    BlockSize,
    active_units,
    drop_and_grow,
    initial_mask,
    keep_active_,
    kept_units,
    mask_shape,
    masked_select_units,
    pack_bits,
    pool_norm,
    sides,
    top_k,
    top_k_in_groups,
    unit_size,
    unpack_bits,
)


def expand(mask: Tensor, weight: Tensor, block_size: BlockSize) -> Tensor:
    """Naive weight mask: one entry for each weight."""
    out = torch.zeros(weight.shape, dtype=torch.bool)
    for index in torch.cartesian_prod(*[torch.arange(n) for n in weight.shape]).tolist():
        rows, columns = sides(block_size)
        unit = tuple(index) if block_size == 1 else (index[0] // rows, index[1] // columns)
        out[tuple(index)] = mask[unit]
    return out


def naive_top_k(scores: Tensor, k: int) -> Tensor:
    flat = scores.flatten().tolist()
    chosen = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:k]
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[chosen] = True
    return mask.view_as(scores)


# Few distinct values, so that most examples have ties.
tied = st.lists(st.sampled_from([-float("inf"), -1.0, 0.0, 0.5, 2.0, float("inf")]), min_size=1, max_size=40)
distinct = st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=40)


@given(st.data(), tied | distinct, st.booleans())
def test_top_k_equals_a_naive_stable_sort(data, values, strided):
    scores = torch.tensor(values)
    if strided:
        scores = torch.stack([scores, -scores]).t()[:, 0]
    k = data.draw(st.integers(0, len(values)))
    mask = top_k(scores, k)
    assert active_units(mask) == k
    assert torch.equal(mask, naive_top_k(scores, k))


MANY = 1 << 17  # of which a sample is taken first


@pytest.mark.parametrize(
    "scores",
    [
        pytest.param(torch.rand(MANY, generator=torch.Generator().manual_seed(0)), id="random"),
        pytest.param(torch.arange(MANY).float(), id="rising"),
        pytest.param(-torch.arange(MANY).float(), id="falling"),
        pytest.param((torch.arange(MANY) % 32 == 0).float(), id="a sample of the largest alone"),
        pytest.param((torch.arange(MANY) % 32 == 1).float(), id="a sample of the smallest alone"),
        pytest.param((torch.arange(MANY) % 7).float(), id="ties"),
        pytest.param(torch.zeros(MANY), id="one value"),
        pytest.param(torch.where(torch.arange(MANY) % 10 > 0, -torch.inf, torch.arange(MANY).sin()), id="mostly -inf"),
        pytest.param(torch.where(torch.arange(MANY) % 10 > 0, torch.inf, torch.arange(MANY).sin()), id="mostly inf"),
    ],
)
@pytest.mark.parametrize("k", [1, 13, MANY // 200, MANY // 20, MANY // 10 + 5, MANY // 2, MANY - 3])
def test_top_k_of_many_equals_a_naive_stable_sort(scores, k):
    assert torch.equal(top_k(scores, k), naive_top_k(scores, k))


def test_top_k_keeps_the_shape_and_breaks_ties_by_reading_order():
    scores = torch.zeros(4, 6).t()
    expected = torch.zeros(6, 4, dtype=torch.bool)
    expected.view(-1)[:7] = True
    assert torch.equal(top_k(scores, 7), expected)


@pytest.mark.parametrize("k", [-1, 7])
def test_top_k_refuses_an_impossible_k(k):
    with pytest.raises(ValueError, match=re.escape(f"k must lie in [0, 6] for 6 scores, got {k}")):
        top_k(torch.zeros(2, 3), k)


def test_top_k_refuses_nan():
    with pytest.raises(ValueError, match="scores must not be NaN"):
        top_k(torch.tensor([0.0, float("nan")]), 1)


@given(n=st.integers(1, 60), data=st.data(), seed=st.integers(0, 2**32))
def test_random_masks_have_exactly_k_units_and_repeat_with_the_seed(n, data, seed):
    k = data.draw(st.integers(0, n))
    first = initial_mask(torch.ones(n), k, torch.Generator().manual_seed(seed))
    assert active_units(first) == k
    assert torch.equal(first, initial_mask(torch.ones(n), k, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("largest", [False, True])
def test_initial_masks_take_units_that_hold_weights_first(largest):
    norms = torch.tensor([0.0, 3.0, 0.0, 1.0, 2.0, 0.0, 0.0, 4.0])
    held = norms > 0
    for k in range(9):
        mask = initial_mask(norms, k, torch.Generator().manual_seed(k), largest=largest)
        assert mask.sum() == k
        assert (mask & held).sum() == min(k, 4)
        if largest and k <= 4:
            assert mask.nonzero().flatten().tolist() == sorted([7, 1, 4, 3][:k])
    drawn = {tuple(initial_mask(norms, 5, torch.Generator().manual_seed(i), largest=True).tolist()) for i in range(40)}
    assert len(drawn) == 4, "each of the four units of zeros is drawn at some time"


def test_random_masks_are_spread_evenly():
    generator = torch.Generator().manual_seed(0)
    total = sum(initial_mask(torch.ones(5, 10), 10, generator).double() for _ in range(2000))
    assert (total / 2000 - 0.2).abs().max() < 0.05


@st.composite
def decisions(draw):
    n = draw(st.integers(1, 40))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    grid = st.sampled_from([0.0, 1.0, 2.0, 3.0])
    weights = torch.tensor(draw(st.lists(grid, min_size=n, max_size=n)))
    gradients = torch.tensor(draw(st.lists(grid, min_size=n, max_size=n)))
    return mask, weights, gradients, draw(st.integers(0, n)), draw(st.floats(0, 1))


def decide(mask, weights, growth, k, drop_fraction, *, regrow=False):
    keep = kept_units(active_units(mask), active_units(~mask), k, drop_fraction, regrow=regrow)
    return drop_and_grow(mask, weights, growth, k, keep, regrow=regrow)


@given(decisions())
def test_decide_keeps_the_largest_active_and_grows_the_best_inactive(case):
    mask, weights, gradients, k, drop = case
    new = decide(mask, weights, gradients, k, drop)
    assert active_units(new) == k
    survivors = min(active_units(mask), k)
    keep = max(survivors - int(drop * survivors), k - active_units(~mask))
    # What survives is a top-k among the active alone, what is new one among the inactive alone.
    minus_inf = torch.tensor(-torch.inf)
    assert torch.equal(new & mask, naive_top_k(torch.where(mask, weights, minus_inf), keep))
    assert torch.equal(new & ~mask, naive_top_k(torch.where(mask, minus_inf, gradients), k - keep))


@given(decisions())
def test_decide_reads_only_the_scores_that_count(case):
    mask, weights, gradients, k, drop = case
    nan = torch.tensor(float("nan"))
    with_nan = decide(mask, torch.where(mask, weights, nan), torch.where(mask, nan, gradients), k, drop)
    assert torch.equal(with_nan, decide(mask, weights, gradients, k, drop))


@given(decisions())
def test_with_regrowth_the_dropped_compete_with_the_inactive(case):
    mask, weights, growth, k, fraction = case
    survivors = min(active_units(mask), k)
    keep = survivors - int(fraction * survivors)
    new = decide(mask, weights, growth, k, fraction, regrow=True)
    kept = top_k(weights.masked_fill(~mask, -torch.inf), keep)
    assert torch.equal(new, kept | top_k(growth.masked_fill(kept, -torch.inf), k - keep))
    assert torch.equal(new, drop_and_grow(mask, weights, growth, k, keep, regrow=True))


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 10**6))
def test_top_k_in_groups_is_top_k_of_each_row(groups, size, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (groups, size), generator=generator).float()
    counts = torch.randint(0, size + 1, (groups,), generator=generator)
    expected = [top_k(row, int(k)) for row, k in zip(scores, counts, strict=True)]
    assert torch.equal(top_k_in_groups(scores, counts), torch.stack(expected))


def test_top_k_in_groups_refuses_bad_counts_and_nan():
    with pytest.raises(ValueError, match=re.escape("counts must be 2 numbers in [0, 3], got [1, 4]")):
        top_k_in_groups(torch.zeros(2, 3), torch.tensor([1, 4]))
    with pytest.raises(ValueError, match="NaN"):
        top_k_in_groups(torch.full((1, 2), torch.nan), torch.tensor([1]))


def test_decide_by_hand():
    mask = torch.tensor([True, True, True, True, False, False])
    weights = torch.tensor([4.0, 1.0, 3.0, 2.0, 9.0, 9.0])
    growth = torch.tensor([9.0, 9.0, 9.0, 9.0, 1.0, 2.0])
    assert decide(mask, weights, growth, 4, 0.25).tolist() == [True, False, True, True, False, True]
    assert decide(mask, weights, growth, 2, 0.0).tolist() == [True, False, True, False, False, False]
    assert decide(mask, weights, growth, 5, 0.0).tolist() == [True, True, True, True, False, True]
    # Two are wanted new, and there are two; a third drop would leave a hole.
    assert decide(mask, weights, growth, 4, 0.9).tolist() == [True, False, True, False, True, True]


def test_decide_refuses_what_makes_no_sense():
    mask, scores = torch.tensor([True, False]), torch.ones(2)
    with pytest.raises(ValueError, match=re.escape("drop_fraction must lie in [0, 1], got 1.5")):
        decide(mask, scores, scores, 1, 1.5)
    with pytest.raises(ValueError, match="scores must not be NaN"):
        decide(mask, scores * float("nan"), scores, 1, 0.0)


def test_decide_refuses_more_units_than_there_are():
    with pytest.raises(ValueError, match="k must lie in"):
        decide(torch.tensor([True, False]), torch.ones(2), torch.ones(2), 3, 0.0)


@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 10**6))
def test_packing_round_trips_any_shape(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == (mask.numel() + 7) // 8
    assert torch.equal(unpack_bits(packed, tuple(shape)), mask)


def test_packing_is_lowest_bit_first():
    bits = torch.tensor([[True, False, False, True, False], [False, False, False, True, True]])
    assert pack_bits(bits).tolist() == [0b00001001, 0b11]


def test_packing_does_not_care_about_strides():
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(unpack_bits(pack_bits(mask.t()), (7, 5)), mask.t())


@pytest.mark.parametrize("packed", [torch.zeros(2, dtype=torch.uint8), torch.zeros(1, dtype=torch.int8)])
def test_unpacking_refuses_other_bits(packed):
    with pytest.raises(ValueError, match=r"packed mask must be uint8 with 1 bytes for shape \(2, 3\), got torch"):
        unpack_bits(packed, (2, 3))


LAYOUTS = {
    "matrix": lambda: torch.randn(8, 12),
    "transposed": lambda: torch.randn(12, 8).t(),
    "slice": lambda: torch.randn(16, 24)[::2, ::2],
    "conv": lambda: torch.randn(8, 4, 3, 2),
    "channels_last": lambda: torch.randn(8, 4, 3, 2).contiguous(memory_format=torch.channels_last),
    "conv1d": lambda: torch.randn(4, 8, 3),
}


@pytest.mark.parametrize("block_size", [1, 4, (4, 1), (2, 4)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_filling_selecting_and_pooling_on_any_strides(layout, block_size):
    torch.manual_seed(0)
    weight = LAYOUTS[layout]()
    mask = torch.rand(mask_shape(weight.shape, block_size)) < 0.5
    full = expand(mask, weight, block_size)

    pooled = pool_norm(weight, block_size)
    assert pooled.shape == mask.shape
    square = (weight.double() ** 2).masked_fill(~full, 0.0).sum()
    assert (pooled[mask].double() ** 2).sum().item() == pytest.approx(square.item())

    other = torch.randn(weight.shape)
    assert torch.equal(masked_select_units(mask, weight, other, block_size), torch.where(full, weight, other))

    bad = weight.clone()
    bad[~full] = torch.where(torch.rand(int((~full).sum())) < 0.5, float("inf"), float("nan"))
    strides = bad.stride()
    assert keep_active_(bad, mask, block_size) is bad
    assert bad.stride() == strides
    assert torch.equal(bad, torch.where(full, weight, torch.zeros(())))


def test_filling_a_view_reaches_the_weight_itself():
    stored = torch.randn(12, 8)
    mask = torch.eye(2, 3, dtype=torch.bool)
    keep_active_(stored.t(), mask, 4)
    assert torch.equal(stored != 0, expand(mask, stored.t(), 4).t())


def test_shapes_and_sizes_of_units():
    assert mask_shape((8, 12, 3, 3), 1) == (8, 12, 3, 3)
    assert mask_shape((8, 12, 3, 3), 4) == (2, 3)
    assert unit_size((8, 12, 3, 3), 1) == 1
    assert unit_size((8, 12, 3, 3), 4) == 4 * 4 * 9


def test_bad_block_sizes_are_refused():
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        mask_shape((8, 12), 0)
    with pytest.raises(ValueError, match=r"block_size 8 does not divide a weight .* 8 x 12 must be multiples of 8 x 8"):
        mask_shape((8, 12), 8)
