"""Mask updates: which units stay and which are grown."""

import pytest
import torch
from torch import nn

from helpers.controller_runs import STEPS, WEIGHTS, adamw, fit
from lightning_estdgm.engine.controller import DGMController


class Branches(nn.Module):
    """A network of which one layer gets no gradient."""

    def __init__(self, mlp):
        super().__init__()
        self.used = mlp(32, 64, 64)
        self.unused = nn.Linear(64, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        return self.head(self.used(x))


def test_a_layer_without_gradient_follows_the_budget_and_grows_nothing(mlp):
    torch.manual_seed(0)
    model = Branches(mlp)
    optimizer = adamw(model)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS) as dgm:
        start = model.unused.weight.detach().clone()
        before = dgm.masks()["unused"]
        for _ in fit(model, optimizer, dgm):
            after = dgm.masks()["unused"]
            assert not (after & ~before).any()
            before = after
            assert torch.equal(model.unused.weight, start * after)
        assert dgm.density == pytest.approx(0.10, abs=1e-4)
        dropped = start[~after & (start != 0)].abs()
        assert dropped.max() <= start[after].abs().min()
