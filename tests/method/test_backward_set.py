"""Shadow weights: which of them learn, how they go into the weight for a step and come out, and their penalty."""

import re

import pytest
import torch

from lightning_estdgm.method._backward_set import BackwardSet, ShadowWeights

MASK = torch.tensor([[True, False, False, False], [False, False, False, True]])


def shadow_of(density=0.5, block_size=1, **decays):
    """Return a weight of 1, 2, 3, ... without its inactive ones, and those as its shadow."""
    side = block_size
    weight = torch.arange(1.0, 8.0 * side**2 + 1.0).view(2 * side, 4 * side)
    shadow = ShadowWeights(BackwardSet(density, **decays), weight, MASK, block_size)
    shadow.take_all(weight, MASK)
    active = MASK.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return weight * active, shadow, weight, active


@pytest.mark.parametrize(("density", "learning"), [(1.0, 8), (0.75, 6), (0.5, 4), (0.25, 2), (0.01, 2)])
def test_the_largest_inactive_weights_learn_beside_the_active_ones(density, learning):
    _, shadow, weight, _ = shadow_of(density)
    assert shadow.learning[MASK].all()
    inactive = weight[~MASK]
    largest = inactive.topk(learning - 2).values
    assert sorted(weight[shadow.learning & ~MASK].tolist()) == sorted(largest.tolist())
    assert shadow.density == learning / 8
    assert torch.equal(shadow.weights, weight * ~MASK)


def test_blocks_learn_as_a_whole_by_their_norm():
    _, shadow, weight, active = shadow_of(0.5, block_size=2)
    assert shadow.learning.tolist() == [[True, False, False, False], [False, True, True, True]]
    assert torch.equal(shadow.weights, weight * ~active)


def test_a_step_moves_learning_weights_and_resting_ones_keep_their_value():
    weight, shadow, everything, _ = shadow_of()
    for _ in range(2):  # putting in twice is putting in once
        shadow.put_in_(weight)
    assert torch.equal(weight, everything)
    weight += 1.0
    for _ in range(2):
        shadow.take_out(weight, MASK)
    assert torch.equal(shadow.weights, (everything + shadow.learning) * ~MASK)
    weight *= MASK
    shadow.put_in_(weight)
    assert torch.equal(weight, everything + shadow.learning)


def test_what_was_not_put_in_is_not_taken_out():
    weight, shadow, everything, _ = shadow_of()
    weight += 1.0
    shadow.take_out(weight, MASK)
    assert torch.equal(shadow.weights, everything * ~MASK)


def test_resting_weights_get_no_gradient():
    _, shadow, _, _ = shadow_of()
    gradient = torch.full((2, 4), torch.inf)
    shadow.mask_gradient_(gradient)
    assert torch.equal(gradient, torch.where(shadow.learning, torch.inf, 0.0))


@pytest.mark.parametrize(
    ("decays", "active", "others"),
    [({}, 0, 0), ({"active_decay": 0.5}, 0.5, 0), ({"active_decay": 0.5, "shadow_decay": 2.0}, 0.5, 2.0)],
)
def test_the_penalty_holds_learning_weights_down(decays, active, others):
    weight, shadow, everything, _ = shadow_of(**decays)
    shadow.put_in_(weight)
    gradient = torch.ones(2, 4)
    shadow.penalize_(gradient, weight, MASK, 4.0)
    expected = torch.where(MASK, active, others) * everything * shadow.learning
    assert torch.equal(gradient, 1.0 + 4.0 * expected)


def test_a_state_holds_the_weights_and_which_of_them_learn():
    _, shadow, _, _ = shadow_of()
    state = shadow.state_dict()
    again = ShadowWeights(BackwardSet(0.5), torch.zeros(2, 4), MASK, 1)
    assert again.density == 1.0
    again.load_state_dict(state)
    assert torch.equal(again.weights, shadow.weights)
    assert torch.equal(again.learning, shadow.learning)
    before = shadow.weights.clone()
    shadow.weights += 1.0
    again.weights += 1.0
    assert torch.equal(state["weights"], before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, "density must lie in (0, 1], got 0.0"),
        ({"density": 1.5}, "density must lie in (0, 1], got 1.5"),
        ({"density": float("nan")}, "density must lie in (0, 1], got nan"),
        ({"active_decay": -0.1}, "active_decay must be a finite number of at least 0, got -0.1"),
        ({"shadow_decay": float("inf")}, "shadow_decay must be a finite number of at least 0, got inf"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BackwardSet(**settings)
