"""Density-aware step size: steps scaled as the density asks, from a copy of the weights before them."""

import copy

import pytest
import torch

from helpers.controller_runs import BLOCKS, STEPS, adamw, batch, constant, fit, full_masks, loss_of, sgd
from helpers.masked_weights import numbered
from lightning_estdgm.config import DGMConfig, StepSize, Units
from lightning_estdgm.engine._controller import DGMController


@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("make", [adamw, sgd])
def test_a_layer_steps_as_its_density_asks(mlp, make, exponent):
    config = DGMConfig(
        constant(0.25), units=Units(size=1, distribution="uniform"), step_size=StepSize(exponent=exponent)
    )
    model = mlp(32, 128, 64, 4, dtype=torch.float64)
    optimizer = make(model)
    with DGMController(model, optimizer, config, total_steps=STEPS, audit=False) as dgm:
        for step in range(5):
            twin = copy.deepcopy(model)
            plain = make(twin)
            plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            before = {name: p.clone() for name, p in model.named_parameters()}
            for net, stepper in ((model, optimizer), (twin, plain)):
                stepper.zero_grad()
                loss_of(net, batch(step, 32).double()).backward()
            masks = full_masks(dgm)
            for name, mask in masks.items():
                twin.get_submodule(name).weight.grad.mul_(mask)
            dgm.mask_gradients()
            optimizer.step()
            plain.step()
            for name, p in twin.named_parameters():
                scale = 0.25**-exponent if name in ("0.weight", "2.weight") else 1.0
                expected = before[name] + scale * (p - before[name])
                torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-12, atol=1e-14)
                assert (p - before[name]).abs().max() > 1e-6
            dgm.advance()


def test_the_copy_before_a_step_holds_few_active_blocks_alone(mlp):
    model = mlp(64, 128, 64, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, BLOCKS, total_steps=STEPS, audit=False) as dgm:
        for _ in fit(model, optimizer, dgm, width=64):
            kept = [layer.snapshot.values for layer in dgm.masked_weights]
            for layer, copied in zip(dgm.masked_weights, kept, strict=True):
                if copied is not None:  # not right after an update of the masks
                    few = layer.density <= 1 / 3
                    assert copied.numel() == (layer.active * 16 * 16 if few else layer.weight.numel())
    assert copied is not None
    assert few


@pytest.mark.parametrize("mask", [[[1, 0, 0, 0]], [[1, 1, 0, 0]]], ids=["few blocks", "many blocks"])
def test_a_snapshot_scales_the_step_since_it_was_taken(mask):
    weight = numbered(mask, block_size=2)
    before, few = weight.weight.clone(), sum(mask[0]) == 1
    weight.snapshot.take(weight, active_only=True)
    assert weight.snapshot.values.numel() == (4 if few else 16)
    assert (weight.snapshot.slices is not None) == few
    weight.weight.add_(1.0)
    weight.snapshot.scale_step_(weight, 1.0)
    assert torch.equal(weight.weight, before + 1.0)
    weight.snapshot.scale_step_(weight, 3.0)
    active = weight.weight[:, : 2 * sum(mask[0])]
    torch.testing.assert_close(active, before[:, : 2 * sum(mask[0])] + 3.0)
    weight.snapshot.forget()
    after = weight.weight.clone()
    weight.snapshot.scale_step_(weight, 5.0)
    assert torch.equal(weight.weight, after)
    assert weight.snapshot.values is None


def test_a_snapshot_is_whole_where_inactive_weights_are_needed_and_gives_them_back():
    weight = numbered([[1, 0, 0, 0]], block_size=2)
    before = weight.weight.clone()
    weight.snapshot.take(weight, active_only=False)
    assert weight.snapshot.slices is None
    weight.weight.add_(1.0)
    weight.snapshot.undo_inactive_(weight)
    assert torch.equal(weight.weight[:, :2], before[:, :2] + 1.0)
    assert torch.equal(weight.weight[:, 2:], before[:, 2:])


def test_a_snapshot_of_new_masks_is_taken_of_their_blocks():
    weight = numbered([[1, 0, 0, 0]], block_size=2)
    weight.snapshot.take(weight, active_only=True)
    weight.set_mask(torch.tensor([[False, False, False, True]]))
    weight.snapshot.take(weight, active_only=True)
    assert sorted(weight.snapshot.values.flatten().tolist()) == [7, 8, 15, 16]


def test_a_snapshot_follows_its_weight_to_another_layout_in_memory():
    weight = numbered([[1, 0, 0, 0]], block_size=2)
    weight.snapshot.take(weight, active_only=True)
    torch.utils.swap_tensors(weight.parameter, torch.nn.Parameter(weight.weight.t().contiguous().t()))
    weight.snapshot.take(weight, active_only=True)
    assert sorted(weight.snapshot.values.flatten().tolist()) == [1, 2, 9, 10]
