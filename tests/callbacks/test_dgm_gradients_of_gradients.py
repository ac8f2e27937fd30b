"""Losses of the model's gradients, through layers that a Trainer's run turns sparse: as dense with the same masks."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.models import Batches, assert_masked, callback_for, make_trainer

STEPS = 20


class _Task(pl.LightningModule):
    excluded = ()

    def __init__(self):
        super().__init__()
        self.penalties = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)

    def training_step(self, batch, batch_idx):
        loss, penalty = self.losses(batch.to(self.dtype))
        self.penalties.append(penalty.item())
        return loss + penalty


class Critic(_Task):
    """Gradient penalty of WGAN-GP (arXiv 1704.00028), through convolutions and linear layers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1),
            nn.Softplus(),
            nn.Conv2d(32, 64, 1, stride=2),
            nn.Softplus(),
            nn.Flatten(),
            nn.Linear(256, 64),
            nn.Softplus(),
            nn.Linear(64, 1),
        )

    def losses(self, batch):
        real, fake = batch.view(-1, 32, 4, 4).chunk(2)
        share = torch.linspace(0, 1, len(real), dtype=real.dtype).view(-1, 1, 1, 1)
        between = (share * real + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(self.net(between).sum(), between, create_graph=True)
        return self.net(fake).mean() - self.net(real).mean(), 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()


class Forces(_Task):
    """An energy whose negative gradient are forces."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(512, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def losses(self, batch):
        at = batch.detach().requires_grad_()
        energy = self.net(at)
        (slope,) = torch.autograd.grad(energy.sum(), at, create_graph=True)
        return F.mse_loss(energy[:, 0], at[:, 0].sin()), F.mse_loss(-slope[:, 0], at[:, 0].cos())


class Poisson(_Task):
    """A physics-informed network: the residual has second derivatives, so its gradient has third ones."""

    excluded = ("net.0",)  # of two inputs

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def losses(self, batch):
        at = batch[:, :2].detach().requires_grad_()
        u = self.net(at)
        (slope,) = torch.autograd.grad(u.sum(), at, create_graph=True)
        curvature = sum(torch.autograd.grad(slope[:, i].sum(), at, create_graph=True)[0][:, i] for i in range(2))
        return u[batch[:, 0] > 1].square().mean(), F.mse_loss(curvature, at.prod(1).sin())


def fit(task, backend, precision, size=16, **config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = task()
    callback = callback_for(backend=backend, units={"size": size}, selection={"exclude": task.excluded}, **config)
    generator = torch.Generator().manual_seed(1)
    batches = Batches(torch.randn(16, 512, generator=generator) for _ in range(STEPS))
    make_trainer(callback, max_epochs=1, precision=precision).fit(module, batches)
    return module, callback


def largest_difference(one, other):
    """Largest distance of two tensors of the modules' parameters, over the second one's norm."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


@pytest.mark.parametrize("inactive", ["zero", "frozen"])
@pytest.mark.parametrize(("backend", "precision"), [("cpu", "64-true"), ("native", "32-true")])
@pytest.mark.parametrize("task", [Critic, Forces, Poisson])
def test_a_run_equals_that_of_dense_layers_with_masks(task, backend, precision, inactive):
    right, its = fit(task, "dense", "64-true", inactive=inactive)
    module, callback = fit(task, backend, precision, inactive=inactive)
    assert {d.backend for d in callback.decisions() if d.masked} == {backend}
    assert callback.density < 0.25
    if inactive == "zero":
        assert_masked(module, callback)
    for name, mask in its.masks().items():
        assert torch.equal(callback.masks()[name], mask), name
    tolerance = 1e-10 if precision == "64-true" else 1e-4
    assert largest_difference(module, right) < tolerance
    assert module.penalties == pytest.approx(right.penalties, rel=tolerance)
    assert min(right.penalties) > 0


@pytest.mark.parametrize("size", [1, (4, 1)], ids=str)
def test_a_run_of_fine_units_equals_that_of_dense_layers_with_masks(size):
    right, its = fit(Critic, "dense", "64-true", size)
    module, callback = fit(Critic, "native", "32-true", size)
    assert [(d.backend, d.block_size) for d in callback.decisions() if d.masked] == 3 * [("native", size)]
    assert callback.density < 0.25
    assert_masked(module, callback)
    for name, mask in its.masks().items():
        assert torch.equal(callback.masks()[name], mask), name
    assert largest_difference(module, right) < 1e-4
    assert module.penalties == pytest.approx(right.penalties, rel=1e-4)


def test_a_weaker_penalty_makes_another_run(monkeypatch):
    right, _ = fit(Critic, "cpu", "64-true")
    given = Critic.losses

    def weaker(self, batch):
        loss, penalty = given(self, batch)
        return loss, 0.9 * penalty

    monkeypatch.setattr(Critic, "losses", weaker)
    assert largest_difference(fit(Critic, "cpu", "64-true")[0], right) > 1e-3
