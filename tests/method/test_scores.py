"""Scores of mask units, against their formulas worked out unit by unit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_estdgm.method._masks import pool_norm
from lightning_estdgm.method._scores import SCORES, Evidence, WeightAndGradient, consistency, growth


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_magnitude_is_the_norm_of_each_unit(block_size, dtype):
    weight = torch.randn(8, 12, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    if block_size == 1:
        expected = weight.double().abs()
    else:
        expected = torch.zeros(2, 3, dtype=torch.float64)
        for r in range(2):
            for c in range(3):
                expected[r, c] = (weight[4 * r : 4 * r + 4, 4 * c : 4 * c + 4].double() ** 2).sum().sqrt()
    got = pool_norm(weight, block_size)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8))
def test_consistency_of_a_weight_is_the_share_of_its_gradients_that_agrees(gradients):
    g = torch.tensor(gradients, dtype=torch.float64)
    mean_norm = g.abs().mean()
    c = consistency(g.mean().abs(), mean_norm)
    assert 0.0 <= c <= 1.0
    if mean_norm == 0:
        assert c == 0
    else:
        assert c.item() == pytest.approx((g.mean().abs() / mean_norm).item(), abs=1e-12)
        if (g >= 0).all() or (g <= 0).all():
            assert c.item() == pytest.approx(1.0)


@given(seed=st.integers(0, 10**6), steps=st.integers(1, 6), gamma=st.floats(0, 3))
def test_growth_of_a_block_lies_between_the_mean_gradient_and_the_mean_norm(seed, steps, gamma):
    g = torch.randn(steps, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    norm, mean_norm = g.mean(0).norm(), g.norm(dim=1).mean()
    score = growth(norm, mean_norm, gamma)
    assert score <= mean_norm
    assert score.item() == pytest.approx((mean_norm * (norm / mean_norm) ** gamma).item(), rel=1e-9)
    assert growth(norm, mean_norm, 0.0) == mean_norm
    assert growth(norm, mean_norm, 1.0).item() == pytest.approx(norm.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cancelling_and_absent_gradients_score_zero(dtype):
    norm = torch.tensor([0.0, 0.0, 2.0], dtype=dtype)
    mean_norm = torch.tensor([0.0, 3.0, 2.0], dtype=dtype)
    assert consistency(norm, mean_norm).tolist() == [0.0, 0.0, 1.0]
    assert growth(norm, mean_norm, 1.0).tolist() == [0.0, 0.0, 2.0]
    assert growth(norm, mean_norm, 0.5).dtype == dtype
    tiny = torch.tensor([torch.finfo(dtype).tiny], dtype=dtype)
    assert consistency(tiny, tiny).item() == 1.0


def test_absent_gradients_score_zero_also_where_subnormals_are_flushed():
    zero = torch.zeros(3)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        scores = growth(zero, zero, 1.0)
    finally:
        torch.set_flush_denormal(False)
    assert scores.tolist() == [0.0, 0.0, 0.0]


def test_scores_by_name():
    shape, generator = (4, 6), torch.Generator().manual_seed(0)
    weight, mean_gradient, mean_norm = (torch.rand(shape, generator=generator) for _ in range(3))

    def evidence(seed=0):
        mask = torch.ones(shape, dtype=torch.bool)
        return Evidence(mask, weight, mean_gradient, mean_norm, 0.5, torch.Generator().manual_seed(seed))

    got = {name: score(evidence()) for name, score in SCORES.items()}
    assert torch.equal(got["magnitude"], weight)
    assert torch.equal(got["gradient"], mean_norm)
    assert torch.equal(got["momentum"], mean_gradient)
    assert torch.equal(got["consistency"], growth(mean_gradient, mean_norm, 0.5))
    assert torch.equal(got["random"], SCORES["random"](evidence()))
    assert not torch.equal(got["random"], SCORES["random"](evidence(1)))
    assert torch.equal(WeightAndGradient(0.25)(evidence()), weight + 0.25 * mean_norm)
    assert torch.equal(got["weight_and_gradient"], WeightAndGradient(1.0, relative=True)(evidence()))
    with pytest.raises(ValueError, match="scale must be a finite number of at least 0, got -1"):
        WeightAndGradient(-1)


def _evidence(weight, norm, mask):
    return Evidence(mask, weight, norm, norm, 1.0, torch.Generator())


@given(st.integers(0, 2**16), st.sampled_from([2.0**-30, 0.5, 2.0**20]), st.sampled_from([2.0**-30, 4.0]))
def test_relative_weight_and_gradient_are_over_their_means_whatever_their_scale(seed, loss_scale, weight_scale):
    generator = torch.Generator().manual_seed(seed)
    weight, norm = (torch.rand(5, 7, generator=generator) for _ in range(2))
    mask = torch.rand(5, 7, generator=generator) < 0.5
    mask[0, 0] = True
    got = WeightAndGradient(0.5, relative=True)(_evidence(weight * weight_scale, norm * loss_scale, mask))
    w, g, m = (x.double().numpy() for x in (weight, norm, mask))
    expected = w / (w * m).sum() * m.sum() + 0.5 * g / (g * m).sum() * m.sum()
    torch.testing.assert_close(got, torch.tensor(expected).float(), rtol=1e-5, atol=0)


def test_what_is_zero_everywhere_counts_for_nothing():
    some, zero, mask = torch.tensor([1.0, 3.0, 8.0]), torch.zeros(3), torch.tensor([True, True, False])
    score = SCORES["weight_and_gradient"]
    assert score(_evidence(some, zero, mask)).tolist() == [0.5, 1.5, 4.0]
    assert score(_evidence(zero, some, mask)).tolist() == [0.5, 1.5, 4.0]
    assert score(_evidence(some, some, torch.zeros(3, dtype=torch.bool))).isfinite().all()
