"""Masked gradients: what the optimizer gets, and when a gradient is masked again."""

import pytest
import torch

from helpers.controller_runs import BLOCKS, STEPS, WEIGHTS, batch, full_masks, loss_of, sgd
from lightning_estdgm.engine.controller import DGMController


def test_gradients_are_masked_also_where_they_are_infinite_and_without_the_call(mlp):
    model = mlp(32, 64, 4)
    optimizer = sgd(model)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS) as dgm:
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
    with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
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
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS) as dgm:
        loss_of(model, batch(0, 32)).backward()
        buffer = torch.cat([p.grad.flatten() for p in model.parameters()])
        for p, part in zip(model.parameters(), buffer.split([p.numel() for p in model.parameters()]), strict=True):
            p.grad = part.view_as(p)
        dgm.mask_gradients()
        writes = buffer._version
        optimizer.step()
        assert buffer._version == writes
