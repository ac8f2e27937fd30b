"""Inactive weights: zero, frozen, or learning outside the forward."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from helpers.controller_runs import SCHEDULE, STEPS, batch, full_masks, loss_of
from lightning_estdgm.config import DGMConfig, Units
from lightning_estdgm.engine.controller import DGMController
from lightning_estdgm.presets import preset


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


def test_steps_of_weights_outside_the_forward_are_scaled_like_the_others(mlp):
    def after_one_step(exponent):
        config = preset(
            "top-kast", 0.25, penalty=0.0, backward_density=1.0, units={"size": 16}, step_size={"exponent": exponent}
        )
        model = mlp(32, 64, 4)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with DGMController(model, optimizer, replace(config, backend="cpu"), total_steps=8) as dgm:
            (layer,) = dgm.masked_weights
            before = model[0].weight.detach() + layer.inactive.shadow.weights
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
            F.mse_loss(model(x), x[:, :4]).backward()
            gradient = model[0].weight.grad.clone()
            optimizer.step()
            return before, gradient, model[0].weight.detach() + layer.inactive.shadow.weights

    for exponent, factor in ((0.0, 1.0), (1.0, 4.0)):
        before, gradient, after = after_one_step(exponent)
        assert torch.count_nonzero(gradient) == gradient.numel()
        torch.testing.assert_close(after, before - 0.1 * factor * gradient)


def test_a_scaler_that_skips_and_scales_changes_nothing(mlp):
    """With a fused optimizer, which steps by scaled gradients and is called for infinite ones, too."""

    def weights(scaler, infinite_at=()):
        model = mlp(12, 24, 4)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
        data = torch.Generator().manual_seed(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100, backoff_factor=0.5, enabled=scaler)
        config = preset("top-kast", 0.2, update_every=4, penalty=0.05)
        with DGMController(model, optimizer, config, total_steps=100) as dgm:
            for step in range(12 + len(infinite_at)):
                infinite = step in infinite_at
                x = torch.full((8, 12), torch.inf) if infinite else torch.randn(8, 12, generator=data)
                optimizer.zero_grad()
                loss = model(x).square().mean()
                scaler.scale(loss).backward()
                if infinite:
                    model[0].weight.grad.fill_(torch.inf)
                dgm.mask_gradients(grad_scale=scaler.get_scale())
                scaler.step(optimizer)
                scaler.update()
                dgm.advance()
                mask = dgm.masks()["0"]
                assert torch.count_nonzero(model[0].weight[~mask]) == 0
        return [p.detach().clone() for p in model.parameters()]

    plain = weights(scaler=False)
    for a, b, c in zip(plain, weights(scaler=True), weights(scaler=True, infinite_at=(3, 6)), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


def test_a_step_without_a_gradient_leaves_the_shadow_weights_where_they_are(mlp):
    model = mlp(12, 24, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    with DGMController(model, optimizer, preset("top-kast", 0.2), total_steps=8) as dgm:
        (layer,) = dgm.masked_weights
        weight, held = model[0].weight.detach().clone(), layer.inactive.shadow.weights.clone()
        optimizer.step()
        optimizer.step(lambda: None)
        assert torch.equal(model[0].weight, weight)
        assert torch.equal(layer.inactive.shadow.weights, held)
