"""Top-KAST and SR-STE against their definitions, simulated with dense weights and a masked copy in the forward."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from helpers.published_runs import DENSITY, WIDTHS, best
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.presets import preset


def simulated(mlp, steps, lr, momentum, choose, penalty, learns, every, widths=WIDTHS):
    """Top-KAST and SR-STE from their definitions: dense weights, a masked copy in the forward, its gradient on all.

    `choose` gives the forward mask of dense weights, `learns` the weights that are updated, `penalty` what is added to
    the gradient. Returns the masked weights after each step.
    """
    model = mlp(*widths)
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    velocity = {n: torch.zeros_like(p) for n, p in dense.items()}
    masked = ("0.weight", "2.weight")
    data = torch.Generator().manual_seed(0)
    seen = []
    for step in range(steps):
        if step % every == 0:
            active = {n: choose(dense[n]) for n in masked}
            moving = {n: learns(dense[n]) | active[n] for n in masked}
        x = torch.randn(16, widths[0], generator=data)
        forward = {n: (w * active.get(n, 1)).requires_grad_() for n, w in dense.items()}
        F.mse_loss(torch.func.functional_call(model, forward, x), x[:, : widths[-1]].sin() * 3).backward()
        for n, w in dense.items():
            gradient = forward[n].grad
            if n in masked:
                gradient = torch.where(moving[n], gradient + penalty(w, active[n]), 0.0)
            velocity[n] = momentum * velocity[n] + gradient
            moved = w - lr * velocity[n]
            dense[n] = torch.where(moving[n], moved, w) if n in masked else moved
        chosen = active
        if (step + 1) % every == 0 and step + 1 < steps:
            chosen = {n: choose(dense[n]) for n in masked}
        seen.append({n: (w * chosen.get(n, 1)).detach().clone() for n, w in dense.items()})
    return seen


def largest(weight, k):
    return torch.from_numpy(best(weight.abs().numpy(), np.ones(weight.shape, bool), k))


def two_of_four(weight):
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for row in range(weight.shape[0]):
        for first in range(0, weight.shape[1], 4):
            mask[row, first : first + 4] = largest(weight[row, first : first + 4], 2)
    return mask


def fitted_weights(mlp, config, steps, closure, widths=WIDTHS):
    model = mlp(*widths)
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    data = torch.Generator().manual_seed(0)
    seen = []
    with DGMController(model, optimizer, config, total_steps=steps, audit=False) as dgm:
        for _ in range(steps):
            x = torch.randn(16, widths[0], generator=data)

            def backward(x=x):
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), x[:, : widths[-1]].sin() * 3)
                loss.backward()
                dgm.mask_gradients()
                return loss

            if closure:
                optimizer.step(backward)
            else:
                backward()
                optimizer.step()
            dgm.advance()
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return seen, dgm


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("every", [1, 4])
def test_top_kast_learns_outside_the_forward(mlp, closure, every):
    config = preset("top-kast", DENSITY, update_every=every, backward_density=0.5, penalty=0.01)
    got, dgm = fitted_weights(mlp, config, 32, closure)
    expected = simulated(
        mlp,
        32,
        0.3,
        0.9,
        choose=lambda w: largest(w, round(DENSITY * w.numel())),
        learns=lambda w: largest(w, round(0.5 * w.numel())),
        penalty=lambda w, active: torch.where(active, 0.01 * w, 0.01 / DENSITY * w),
        every=every,
    )
    for step, (a, b) in enumerate(zip(got, expected, strict=True)):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=f"{name} after step {step}")
    assert dgm.explored > DENSITY + 0.1
    assert dgm.flops_ratio == pytest.approx((2 * DENSITY + 0.5) / 3, abs=0.25)


def test_n_of_m_is_sr_ste(mlp):
    config = preset("n:m", 0.5, m=4, update_every=1, decay=0.02)
    widths = (12, 24, 20, 4)
    got, dgm = fitted_weights(mlp, config, 24, True, widths)
    expected = simulated(
        mlp,
        24,
        0.3,
        0.9,
        choose=two_of_four,
        learns=lambda w: torch.ones_like(w, dtype=torch.bool),
        penalty=lambda w, active: torch.where(active, 0.0, 0.02 * w),
        every=1,
    )
    for step, (a, b) in enumerate(zip(got, expected, strict=True)):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=f"{name} after step {step}")
    for mask in dgm.masks().values():
        assert (mask.view(mask.shape[0], -1, 4).sum(2) == 2).all()
    assert dgm.explored > 0.6
