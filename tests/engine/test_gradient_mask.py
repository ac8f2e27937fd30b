"""Masked gradients: what the optimizer gets, and when a gradient is masked again."""

import pytest
import torch

from helpers.controller_runs import BLOCKS, STEPS, WEIGHTS, batch, full_masks, loss_of, sgd
from helpers.masked_weights import numbered
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.engine._gradient_mask import mask_gradients_


def test_gradients_are_masked_also_where_they_are_infinite_and_without_the_call(mlp):
    model = mlp(32, 64, 4)
    optimizer = sgd(model)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        off = ~dgm.masks()["0"]
        loss_of(model, batch(0, 32)).backward()
        model[0].weight.grad[off] = float("inf")
        dgm.mask_gradients()
        assert torch.count_nonzero(model[0].weight.grad[off]) == 0
        assert model[0].weight.grad.isfinite().all()
        model[0].weight.grad[off] = float("nan")
        optimizer.step()  # a loop that forgot the call: the hook masks before the step
        assert model[0].weight.isfinite().all()


def write(model, gradient):
    gradient.fill_(1.0)


def write_to_a_view(model, gradient):
    gradient.t().add_(1.0)


def backward_again(model, gradient):
    model[0].weight.square().sum().add(model[0].weight.sum()).backward()


def replace(model, gradient):
    model[0].weight.grad = torch.ones_like(gradient)


@pytest.mark.parametrize("touch", [write, write_to_a_view, backward_again, replace])
@pytest.mark.parametrize("config", [WEIGHTS, BLOCKS], ids=["weights", "blocks"])
def test_the_optimizer_gets_masked_gradients_and_untouched_ones_are_not_masked_again(mlp, config, touch):
    model = mlp(32, 128, 64, 4)
    optimizer = sgd(model)
    with DGMController(model, optimizer, config, total_steps=STEPS, audit=False) as dgm:
        seen = []
        optimizer.register_step_pre_hook(lambda *_: seen.append((weight.grad.clone(), weight.grad._version)))
        weight, off = model[0].weight, ~full_masks(dgm)["0"]
        for touched in (False, True, False):
            optimizer.zero_grad(set_to_none=not touched)
            loss_of(model, batch(0, 32)).backward()
            dgm.mask_gradients()
            if touched:
                touch(model, weight.grad)
                assert torch.count_nonzero(weight.grad[off]) > 0
            writes = weight.grad._version
            optimizer.step()
            dgm.advance()
            gradient, version = seen[-1]
            assert torch.count_nonzero(gradient[off]) == 0
            assert version == writes + touched


def test_views_of_one_buffer_are_told_to_be_masked(mlp):
    """As DDP and FSDP make gradients: torch counts the writes to all of them together."""
    model = mlp(32, 64, 64, 4)
    optimizer = sgd(model)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        loss_of(model, batch(0, 32)).backward()
        buffer = torch.cat([p.grad.flatten() for p in model.parameters()])
        for p, part in zip(model.parameters(), buffer.split([p.numel() for p in model.parameters()]), strict=True):
            p.grad = part.view_as(p)
        dgm.mask_gradients()
        writes = buffer._version
        optimizer.step()
        assert buffer._version == writes


# ------------------------------------------------------------------ one gradient by itself


def masked_once():
    """Return a weight with a masked gradient, and the gradient."""
    weight = numbered([[1, 0], [0, 1]])
    weight.parameter.grad = torch.ones(2, 2)
    mask_gradients_([weight])
    return weight, weight.parameter.grad


def test_inactive_gradients_become_zero_and_a_weight_without_gradient_is_left_out():
    weight, gradient = masked_once()
    other = numbered([[1, 0]])
    mask_gradients_([weight, other])
    assert gradient.tolist() == [[1, 0], [0, 1]]
    assert other.parameter.grad is None


def test_an_untouched_gradient_is_masked_again_only_if_asked_for():
    weight, gradient = masked_once()
    writes = gradient._version
    mask_gradients_([weight], if_touched=True)
    assert gradient._version == writes
    mask_gradients_([weight])
    assert gradient._version > writes


@pytest.mark.parametrize("how", ["the gradient", "a view", "another tensor", "forgotten"])
def test_a_write_is_seen(how):
    weight, gradient = masked_once()
    assert weight.masked_gradient.is_current(weight)
    if how == "the gradient":
        gradient.add_(1.0)
    elif how == "a view":
        gradient.view(-1)[1:].add_(1.0)
    elif how == "another tensor":
        weight.parameter.grad = torch.ones(2, 2)
        while weight.parameter.grad._version < gradient._version:  # told apart by more than the count of writes
            weight.parameter.grad.mul_(1.0)
    else:
        weight.masked_gradient.forget()
    assert not weight.masked_gradient.is_current(weight)
    mask_gradients_([weight], if_touched=True)
    assert weight.masked_gradient.is_current(weight)
    assert torch.count_nonzero(weight.parameter.grad[~weight.mask]) == 0


def test_nothing_is_current_without_a_gradient():
    weight, _ = masked_once()
    weight.parameter.grad = None
    assert not weight.masked_gradient.is_current(weight)
    weight.masked_gradient.remember(weight)
    assert not weight.masked_gradient.is_current(weight)
