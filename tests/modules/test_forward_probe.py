"""The probe of a layer's forward."""

import pytest
import torch
from torch import nn

from helpers.swapped_layers import candidate
from lightning_estdgm.modules._forward_probe import ForwardProbe, Image


@pytest.mark.parametrize(
    ("module", "x", "positions", "image"),
    [
        (nn.Conv2d(4, 8, 3, stride=2), torch.randn(5, 4, 9, 7), 5 * 4 * 3, Image(5, 9, 7, False)),
        (
            nn.Conv2d(4, 8, 3),
            torch.randn(5, 4, 9, 7).contiguous(memory_format=torch.channels_last),
            5 * 7 * 5,
            Image(5, 9, 7, True),
        ),
        (nn.Conv2d(4, 8, 3), torch.randn(4, 9, 7), 7 * 5, Image(1, 9, 7, False)),
        (nn.Conv1d(4, 8, 3), torch.randn(5, 4, 9), 5 * 7, Image(5, 1, 9, False)),
        (nn.Conv2d(4, 8, 3, groups=2), torch.randn(5, 4, 9, 7), 5 * 7 * 5, None),
        (nn.Linear(4, 8), torch.randn(5, 3, 4), 15, None),
    ],
)
def test_a_probe_sees_what_a_layer_is_given(module, x, positions, image):
    probe = ForwardProbe(candidate(module))
    module.register_forward_hook(probe)
    module(x)
    assert (probe.positions, probe.dtype, probe.image) == (positions, torch.float32, image)
