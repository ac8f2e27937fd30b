"""Layers that a pattern does not fit stay dense with the reason; what the user has asked for by name is an error."""

import pytest
import torch
from torch import nn

from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.presets import preset


def images():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    )


def controller(model, m=4, density=0.5, **settings):
    optimizer = torch.optim.AdamW(model.parameters())
    return DGMController(
        model, optimizer, preset("n:m", density, m=m, **settings), total_steps=10, audit=False
    ), optimizer


def test_a_first_convolution_of_three_channels_stays_dense():
    model = images()
    before = model[0].weight.detach().clone()
    dgm, optimizer = controller(model)
    with dgm:
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 8, 8)).square().mean().backward()
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
        first, second, _ = dgm.decisions()
    assert not first.masked
    assert first.why == "N:4 needs inputs that are a multiple of 4, got a mask of (16, 3, 3, 3)"
    assert torch.count_nonzero(model[0].weight) == before.numel()
    assert second.masked
    assert (model[2].weight != 0).reshape(16, 4, 4, 9).sum(2).eq(2).all()  # 2 of each 4 neighbouring channels


def test_a_layer_that_is_named_in_include_has_to_fit():
    with pytest.raises(ValueError, match=r"layer '0': N:4 needs .* named in include=, leave it out to keep it dense"):
        controller(images(), selection={"include": ("0",)})


def test_a_pattern_that_fits_no_layer_is_refused():
    with pytest.raises(ValueError, match=r"NofM\(m=7\) fits no layer: \{'0': .*pass another UpdateRule\(pattern="):
        controller(images(), m=7, density=3 / 7)
