"""Inactive weights: zero, frozen, or learning outside the forward."""

import copy

import pytest
import torch

from helpers.controller_runs import SCHEDULE, STEPS, batch, full_masks, loss_of
from lightning_estdgm.config import DGMConfig, Units
from lightning_estdgm.engine.controller import DGMController


@pytest.mark.parametrize("block_size", [1, 16])
def test_frozen_keeps_inactive_weights_bitwise_and_never_scales(mlp, block_size):
    config = DGMConfig(SCHEDULE, units=Units(size=block_size), inactive="frozen")
    model = mlp(32, 128, 64, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    start = copy.deepcopy(model.state_dict())
    with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
        assert all(torch.equal(start[name], value) for name, value in model.state_dict().items())
        for step in range(STEPS):
            before = {name: value.clone() for name, value in model.state_dict().items()}
            masks = full_masks(dgm)
            optimizer.zero_grad()
            loss_of(model, batch(step, 32)).backward()
            raw = {name: model.get_submodule(name).weight.grad.clone() for name in masks}
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
            for name, mask in masks.items():
                old = before[f"{name}.weight"]
                expected = torch.where(mask, old - 0.1 * (raw[name] + 0.1 * old), old)
                torch.testing.assert_close(model.get_submodule(name).weight, expected)
                assert torch.equal(model.get_submodule(name).weight[~mask], old[~mask])
                assert (~mask).any()
        assert dgm.density < 0.2
